"""Which tokens are visual, which rows of the MoE layer they are, and when MACS acts."""

import pytest
import torch

from sglang_macs import batch
from sglang_macs.config import MacsConfig

CAT, DOG, SOUND = batch.PAD_ID_BASE + 7, batch.PAD_ID_BASE + 3, batch.PAD_ID_BASE + 99


def test_segments_by_batch_and_by_image_leave_audio_out():
    ids = torch.tensor([5, CAT, CAT, 6, DOG, SOUND, 7])
    segment, count = batch.segments(ids, "batch", frozenset({SOUND}))
    assert (segment.tolist(), count) == ([-1, 0, 0, -1, 0, -1, -1], 1)
    segment, count = batch.segments(ids, "image", frozenset({SOUND}))
    assert count == 2
    assert segment.tolist() == [-1, 1, 1, -1, 0, -1, -1]  # by ascending pad id


def test_rows_follow_the_scatter_over_attention_tp():
    segment = torch.tensor([-1, 0, 0, 0, 0], dtype=torch.int32)
    shares = [batch.align(segment, 3, rank, 2, torch.device("cpu")).tolist() for rank in range(2)]
    assert shares == [[-1, 0, 0], [0, 0, -1]]
    assert batch.align(segment, 7, 0, 1, torch.device("cpu")).tolist() == [-1, 0, 0, 0, 0, -1, -1]
    assert batch.align(None, 2, 0, 1, torch.device("cpu")).tolist() == [-1, -1]


def test_rows_that_cannot_be_this_batch_are_refused():
    assert batch.align(torch.zeros(5, dtype=torch.int32), 2, 0, 2, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("options", "is_prefill", "tokens", "expected"),
    [
        ({}, True, 64, ""),
        ({}, True, 63, "small"),
        ({}, False, 4096, "decode"),
        ({"decode": True}, False, 4096, ""),
        ({"preset": "off"}, True, 4096, "off"),
        ({"preset": "off"}, False, 4096, "decode"),
        ({"preset": "off"}, True, 63, "small"),
    ],
)
def test_when_macs_acts(options, is_prefill, tokens, expected):
    config = MacsConfig.from_preset(**options)
    assert batch.skip_reason(config, is_prefill=is_prefill, group_tokens=tokens) == expected


def test_the_current_batch_is_restored_after_an_error():
    outer = batch.Batch(skip="")
    with batch.forward(outer):
        with pytest.raises(RuntimeError), batch.forward(batch.Batch(skip="decode")):
            raise RuntimeError
        assert batch.current() is outer
    assert batch.current().skip == "outside"


def test_each_half_of_a_batch_has_its_own_rows_of_the_mask():
    segment = torch.tensor([-1, 0, 0, -1, 0], dtype=torch.int32)
    whole = batch.Batch(segment, 1, "", halves=((0, 3), (3, 5)))
    assert [whole.segment_of(half).tolist() for half in (None, 0, 1)] == [[-1, 0, 0, -1, 0], [-1, 0, 0], [-1, 0]]
    assert batch.Batch(None, 0, "", halves=((0, 3), (3, 5))).segment_of(1) is None


def test_scattered_rows_put_together_are_the_padded_values():
    values = torch.arange(1.0, 11.0).view(5, 2)
    shares = [batch.scattered(values, rows=3, attn_tp_rank=rank, attn_tp_size=2) for rank in range(2)]
    assert torch.cat(shares).tolist() == [*values.tolist(), [0.0, 0.0]]


def test_the_layers_of_a_pass_share_one_segment():
    passing, cpu = batch.Batch(torch.tensor([-1, 0, 0], dtype=torch.int32), 1, "", halves=((0, 1), (1, 3))), "cpu"
    asked = [(4, None, (0, 1)), (2, None, (1, 2)), (2, 1, (0, 1)), (3, 1, (0, 1))]
    first = [passing.segment_of_rows(*rows, torch.device(cpu)) for rows in asked]
    assert [s.tolist() for s, _ in first] == [[-1, 0, 0, -1], [0, -1], [0, 0], [0, 0, -1]] and all(f for _, f in first)
    for rows, (segment, _) in zip(asked, first, strict=True):
        assert passing.segment_of_rows(*rows, torch.device(cpu))[0] is segment


def test_rows_of_another_batch_are_text_in_every_layer():
    passing = batch.Batch(torch.zeros(5, dtype=torch.int32), 1, "")
    for _ in range(2):
        segment, fits = passing.segment_of_rows(2, None, (0, 1), torch.device("cpu"))
        assert segment.tolist() == [-1, -1] and not fits
