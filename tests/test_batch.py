"""Which tokens are visual, which rows of the MoE layer they are, and when MACS acts."""

from types import SimpleNamespace

import pytest
import torch

from sglang_macs.config import MacsConfig
from sglang_macs.plan import batch

CAT, DOG, SOUND = batch.PAD_ID_BASE + 7, batch.PAD_ID_BASE + 3, batch.PAD_ID_BASE + 99


def test_segments_by_batch_and_by_image_leave_audio_out():
    ids = torch.tensor([5, CAT, CAT, 6, DOG, SOUND, 7])
    segment, count = batch.segments(ids, "batch", {SOUND: batch.NO_PAD_ID})
    assert (segment.tolist(), count) == ([-1, 0, 0, -1, 0, -1, -1], 1)
    segment, count = batch.segments(ids, "image", {SOUND: batch.NO_PAD_ID})
    assert count == 2
    assert segment.tolist() == [-1, 1, 1, -1, 0, -1, -1]  # by ascending pad id


def item(*pad_ids: int, audio: bool = False) -> SimpleNamespace:
    """SGLang's `MultimodalDataItem`; with several ids as from 0.5.23 on, which puts them by turns."""
    several = {"pad_values": pad_ids} if len(pad_ids) > 1 else {}
    return SimpleNamespace(pad_value=pad_ids[0], is_audio=lambda: audio, **several)


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_an_item_is_one_whatever_the_number_of_its_ids(scope, turns):
    """Ids of 62 bits, as from 0.5.23 on, those of different items interleaved in their order."""
    cat, dog, sound = ([(1 << 61) + 10 * turn + i for turn in range(turns)] for i in range(3))
    shown = [(5, None), *((cat[i % turns], "cat") for i in range(6)), (6, None)]
    shown += [*((dog[i % turns], "dog") for i in range(5)), *((sound[i % turns], None) for i in range(7))]
    forward_batch = SimpleNamespace(
        input_ids=torch.tensor([token for token, _ in shown]),
        forward_mode=Mode("EXTEND"),
        contains_mm_inputs=lambda: True,
        mm_inputs=[None, SimpleNamespace(mm_items=[item(*cat), item(*sound, audio=True)]),
                   SimpleNamespace(mm_items=[item(*dog)])],
        tbo_children=None,
    )  # fmt: skip
    found = batch.of_forward(forward_batch, MacsConfig.from_preset(entropy_scope=scope, min_tokens=0), 1)
    numbers = {None: -1, "cat": 0, "dog": 1 if scope == "image" else 0}
    assert found.segment.tolist() == [numbers[name] for _, name in shown]
    assert found.num_segments == (2 if scope == "image" else 1)


PADDED = batch.PAD_ID_BASE + 7


@pytest.mark.parametrize(
    ("ids", "offsets", "unmarked"),
    [
        ([5, PADDED, PADDED, 6], [(1, 2)], 0),
        ([5, 3, 3, 6], [(1, 2)], 1),
        ([3, 3, 5, PADDED], [(0, 1), (3, 3)], 0),  # a video: its frames, of which one is enough
        ([5, 6], [(1, 2)], 0),  # positions of other ids than these
        ([5, 6], None, 0),
    ],
)
def test_a_picture_without_padded_positions_is_counted(ids, offsets, unmarked):
    picture = SimpleNamespace(is_audio=lambda: False, offsets=offsets)
    sound = SimpleNamespace(is_audio=lambda: True, offsets=[(0, 0)])
    assert batch.unmarked([picture, sound], ids) == unmarked


def test_rows_follow_the_scatter_over_attention_tp():
    segment = torch.tensor([-1, 0, 0, 0, 0], dtype=torch.int32)
    shares = [batch.align(segment, 3, rank, 2, torch.device("cpu")).tolist() for rank in range(2)]
    assert shares == [[-1, 0, 0], [0, 0, -1]]
    assert batch.align(segment, 7, 0, 1, torch.device("cpu")).tolist() == [-1, 0, 0, 0, 0, -1, -1]
    assert batch.align(None, 2, 0, 1, torch.device("cpu")).tolist() == [-1, -1]


def test_rows_that_cannot_be_this_batch_are_refused():
    assert batch.align(torch.zeros(5, dtype=torch.int32), 2, 0, 2, torch.device("cpu")) is None


class Mode:
    """SGLang's `ForwardMode`, as far as it is asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_extend(self) -> bool:
        return self.name in ("EXTEND", "MIXED", "TARGET_VERIFY")

    def is_target_verify(self) -> bool:
        return self.name == "TARGET_VERIFY"

    def is_decode(self) -> bool:
        return self.name == "DECODE"

    def is_mixed(self) -> bool:
        return self.name == "MIXED"


def ranks(*batches: tuple[str, int], exempts: tuple[bool, ...] = ()) -> batch.RankBatches:
    tokens, modes = [tokens for _, tokens in batches], [Mode(mode) for mode, _ in batches]
    return batch.RankBatches.of_modes(tokens, modes, exempts)


@pytest.mark.parametrize(
    ("options", "of_ranks", "expected"),
    [
        ({}, [("EXTEND", 64), ("IDLE", 0)], ""),
        ({}, [("EXTEND", 63), ("IDLE", 0)], "small"),
        ({}, [("EXTEND", 63), ("DECODE", 8)], "small"),  # decoded tokens are left alone, so they do not count
        ({}, [("EXTEND", 32), ("MIXED", 32)], ""),
        ({}, [("DECODE", 2048), ("DECODE", 2048)], "decode"),
        ({}, [("TARGET_VERIFY", 2048), ("IDLE", 0)], "decode"),
        ({"decode": True}, [("DECODE", 2048), ("IDLE", 0)], ""),
        ({"decode": True}, [("EXTEND", 60), ("DECODE", 8)], ""),
        ({"preset": "off"}, [("EXTEND", 4096), ("IDLE", 0)], "off"),
        ({"preset": "off"}, [("DECODE", 4096), ("IDLE", 0)], "decode"),
        ({"preset": "off"}, [("EXTEND", 63), ("IDLE", 0)], "small"),
    ],
)
def test_when_macs_acts(options, of_ranks, expected):
    config = MacsConfig.from_preset(min_tokens=32, **options)
    assert batch.skip_reason(config, ranks(*of_ranks), 2) == expected


def passing(mode: str, input_ids: list[int]) -> SimpleNamespace:
    """A `ForwardBatch` with one picture wherever ids say so."""
    return SimpleNamespace(
        forward_mode=Mode(mode),
        input_ids=torch.tensor(input_ids),
        tbo_children=None,
        contains_mm_inputs=lambda: max(input_ids, default=0) >= batch.PAD_ID_BASE,
        mm_inputs=[],
    )


@pytest.mark.parametrize(
    ("mode", "ids", "decoding", "segment"),
    [
        ("EXTEND", [5, CAT, 6], 0, [-1, 0, -1]),
        ("MIXED", [5, CAT, 6, 7], 2, [-1, 0, -2, -2]),
        ("MIXED", [5, 6, 7], 1, [-1, -1, -2]),
        ("DECODE", [5, 6], 0, [-2, -2]),
        ("TARGET_VERIFY", [5, 6, 7], 0, [-2, -2, -2]),
    ],
)
def test_decoded_tokens_beside_a_prefill_are_left_alone(mode, ids, decoding, segment):
    everyone = ranks((mode, len(ids)), ("EXTEND", 100))
    config = MacsConfig.from_preset(min_tokens=1)
    made = batch.of_forward(passing(mode, ids), config, 2, everyone, decoding)
    assert made.skip == "" and made.segment.tolist() == segment
    assert made.leaves_alone == (mode != "EXTEND") and made.group_tokens == 100 + len(ids)
    asked = batch.of_forward(
        passing(mode, ids), MacsConfig.from_preset(min_tokens=1, decode=True), 2, everyone, decoding
    )
    assert not asked.leaves_alone and (asked.segment is None or batch.LEFT_ALONE not in asked.segment)


@pytest.mark.parametrize("decode", [False, True])
def test_exempt_requests_are_left_alone_beside_others(decode):
    config = MacsConfig.from_preset(min_tokens=1, decode=decode)
    made = batch.of_forward(passing("MIXED", [5, CAT, CAT, 6, 7]), config, 2, None, 1, exempt=((2, 4),))
    assert made.segment.tolist() == [-1, 0, -2, -2, -1 if decode else -2]
    assert made.leaves_alone and made.makes_room and made.exempt_tokens == 2
    made = batch.of_forward(passing("DECODE", [5, 6]), config, 2, None, exempt=((0, 1),))
    assert made.skip == ("" if decode else "decode")
    assert not decode or (made.segment.tolist() == [-2, -1] and made.leaves_alone)


@pytest.mark.parametrize("exempts", [(), (False, False, False, True)])
def test_ranks_with_different_work_decide_alike(exempts):
    """Whatever each of them runs itself."""
    everyone = ranks(("EXTEND", 100), ("DECODE", 3), ("IDLE", 0), ("MIXED", 20), exempts=exempts)
    own = [("EXTEND", [CAT] * 100, 0), ("DECODE", [1] * 3, 0), ("IDLE", [], 0), ("MIXED", [1] * 20, 4)]
    for config in (MacsConfig.from_preset(), MacsConfig.from_preset(decode=True)):
        made = [
            batch.of_forward(
                passing(mode, ids), config, 4, everyone, decoding, [(0, 5)] if exempts and exempts[i] else []
            )
            for i, (mode, ids, decoding) in enumerate(own)
        ]
        assert {(one.skip, one.group_tokens) for one in made} == {("", 123)}
        assert {one.leaves_alone for one in made} == {not config.decode or bool(exempts)}
        assert {one.makes_room for one in made} == {bool(exempts)}


def test_where_chosen_requests_begin_and_end():
    assert batch.spans([True, False, False, True], [3, 1, 4, 2]) == ((0, 3), (8, 10))
    assert batch.spans([], []) == ()


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


def test_the_layers_of_a_pass_share_what_is_left_alone():
    segment = torch.tensor([0, -1, batch.LEFT_ALONE], dtype=torch.int32)
    passing = batch.Batch(segment, 1, "", leaves_alone=True)
    of_rows, _ = passing.segment_of_rows(4, None, (0, 1), torch.device("cpu"))
    left_alone, planned = passing.left_alone_of(of_rows)
    assert left_alone.tolist() == [False, False, True, False] and planned.tolist() == [0, -1, -1, -1]
    assert all(a is b for a, b in zip(passing.left_alone_of(of_rows), (left_alone, planned), strict=True))
    assert batch.Batch(segment, 1, "").left_alone_of(of_rows) == (None, of_rows)


def test_rows_of_another_batch_are_text_in_every_layer():
    passing = batch.Batch(torch.zeros(5, dtype=torch.int32), 1, "")
    for _ in range(2):
        segment, fits = passing.segment_of_rows(2, None, (0, 1), torch.device("cpu"))
        assert segment.tolist() == [-1, -1] and not fits
