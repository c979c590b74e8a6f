"""A trace holds what the plans did, finds images in batches, stays within its limit, and refuses to be misread."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traces import COLUMNS, EXPERTS, KEY, LAYERS, RANKS, ROWS, TOP_K, picture, record, shown

from sglang_macs import trace
from sglang_macs.errors import MacsError


def test_counts_are_the_sum_of_the_ranks_plans(tmp_path):
    plans = record(tmp_path)
    read = trace.load(str(tmp_path))
    assert (read.ranks, read.experts, read.top_k, read.layers) == (RANKS, EXPERTS, TOP_K, list(LAYERS))
    assert len(read.steps) == 3 and not read.full and read.config["gamma"] == 1.0
    for step, layers in zip(read.steps, plans, strict=True):
        assert step.tokens == 70
        for i, ranks in enumerate(layers):
            assert np.array_equal(step.counts[i], sum(result.counts for result in ranks).numpy())
            _, _, visual, total = ranks[0].group[-4:].tolist()
            assert step.visual_share[i] == pytest.approx(visual / total if visual else 0, abs=1e-4)
            assert step.bound[i] == ranks[0].cut[0, 3]
    before, after = read.rank_rows()
    assert before.shape == (3, len(LAYERS), RANKS)
    assert (before.sum(axis=-1) == 70 * TOP_K).all()
    assert (after.max(axis=-1) <= read.steps[0].bound[0]).all() and (before.max(axis=-1) > read.steps[0].bound[0]).any()


def test_a_picture_has_the_fate_of_its_own_rows(tmp_path):
    plans = record(tmp_path, reroute="none")
    (got,) = trace.load(str(tmp_path)).pictures
    rows = slice(3, 3 + ROWS * COLUMNS)
    for i in range(len(LAYERS)):
        result = plans[0][i][0]
        assert np.allclose(got.weight[i].ravel(), result.weight[rows].numpy(), atol=1 / 255)
        dropped = (result.topk_ids[rows] < 0).sum(dim=1).numpy()
        assert np.array_equal(got.dropped[i].ravel(), dropped) and np.array_equal(got.clipped[i].ravel(), dropped)
    assert got.dropped.sum() > 0, "a case that drops nothing proves nothing"


def test_the_picture_itself_is_put_together_from_its_patches():
    pixels = trace.picture(shown())
    assert np.array_equal(pixels, (picture() * 255).round().to(torch.uint8).numpy())


def test_chunks_of_a_picture_are_put_together_and_repeats_left_out(tmp_path):
    plans = record(tmp_path, passes=3, parts=[[shown(20, 0, 10)], [shown(0, 10, 14)], [shown()]])
    (got,) = trace.load(str(tmp_path)).pictures
    for i in range(len(LAYERS)):
        seen = torch.cat([plans[0][i][0].weight[20:30], plans[1][i][0].weight[:14]])
        assert np.allclose(got.weight[i].ravel(), seen.numpy(), atol=1 / 255)
    assert got.jpeg is not None


def test_a_scattered_rank_records_its_share(tmp_path):
    recorder = trace.Recorder(trace.MacsConfig.from_preset("rank", trace=str(tmp_path)), 0)
    assert recorder.rank == 0
    weight = torch.arange(10) / 255
    result = SimpleNamespace(weight=weight)
    recorder._layers = [trace._Layer(0, 2, result, *(torch.arange(10, dtype=torch.uint8),) * 2)]
    got = recorder._picture(shown(row=6, count=ROWS * COLUMNS), 1)  # this rank has rows 10 to 19 of the batch
    assert got["first"] == 4 and got["jpeg"] is not None
    assert trace._unpack(got["clipped"], np.uint8, (-1,)).tolist() == list(range(10))
    got = recorder._picture(shown(row=17, count=5), 1)
    assert got["first"] == 0 and trace._unpack(got["clipped"], np.uint8, (-1,)).tolist() == [7, 8, 9]


def test_a_file_stays_within_its_limit_and_says_so(tmp_path):
    record(tmp_path, passes=40, trace_limit_mb=0.01)
    assert all(file.stat().st_size <= 10_020 for file in tmp_path.iterdir())
    read = trace.load(str(tmp_path))
    assert read.full and 0 < len(read.steps) < 40


def item(begin: int, last: int, image: bool = True, **grid):
    return SimpleNamespace(
        is_image=lambda: image,
        offsets=[(begin, last)],
        feature=None,
        pad_value=KEY,
        model_specific_data=grid or {"image_grid_thw": torch.tensor([[1, 4, 6]])},
    )


def test_images_are_found_in_batches_with_cached_prefixes_and_chunks():
    batch = SimpleNamespace(
        mm_inputs=[None, SimpleNamespace(mm_items=[item(2, 7), item(20, 25)]), SimpleNamespace(mm_items=[item(0, 5)])],
        extend_prefix_lens_cpu=[0, 4, 6],
        extend_seq_lens_cpu=[5, 18, 9],  # rows 0-4 text; 5-22 tokens 4-21 of the second request; the third is cached
    )
    found = [(part.row, part.first, part.count, part.token_grid) for part in trace.shown_in(batch)]
    assert found == [(5, 2, 4, (2, 3)), (5 + 16, 0, 2, (2, 3))]


@pytest.mark.parametrize(
    "odd",
    [item(0, 5, image=False), item(0, 5, other=1), item(0, 4), item(0, 5, image_grid_thw=torch.tensor([[2, 4, 6]]))],
)
def test_what_is_no_plain_image_has_no_grid(odd):
    batch = SimpleNamespace(
        mm_inputs=[SimpleNamespace(mm_items=[odd])], extend_prefix_lens_cpu=[0], extend_seq_lens_cpu=[9]
    )
    assert all(part.token_grid is None for part in trace.shown_in(batch))


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    record(tmp_path)
    file = tmp_path / "rank-1.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    assert len(trace.load(str(tmp_path)).steps) == 2


def change(tmp_path, edit) -> None:
    file = tmp_path / "rank-1.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    edit(lines)
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[0].update(schema="sglang-macs/trace/9"),
        lambda lines: lines[0].update(rank=0),
        lambda lines: lines[0].pop("ranks") and lines.clear(),
        lambda lines: lines[1].update(step=7),
        lambda lines: lines[1].update(layers=[0, 1]),
        lambda lines: lines[2].update(counts="AAAA"),
        lambda lines: lines[2].update(counts=lines[2]["counts"][:20]),
        lambda lines: lines[1].pop("tokens"),
        lambda lines: lines.__delitem__(slice(1, None)),
    ],
)
def test_a_foreign_or_damaged_trace_is_refused(tmp_path, edit):
    record(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(MacsError):
        trace.load(str(tmp_path))


def test_a_missing_rank_and_a_missing_folder_are_refused(tmp_path):
    record(tmp_path)
    (tmp_path / "rank-1.jsonl").unlink()
    with pytest.raises(MacsError, match="other hosts"):
        trace.load(str(tmp_path))
    with pytest.raises(MacsError, match="No such file"):
        trace.load(str(tmp_path / "nowhere"))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_raises_anything_but_a_macs_error(tmp_path_factory, recorded, data):
    """One value of a good trace replaced by junk, or its bytes cut, flipped or inserted."""
    raw = recorded
    if data.draw(st.booleans()):
        lines = raw.decode().splitlines()
        at = data.draw(st.integers(0, len(lines) - 1))
        line = json.loads(lines[at])
        target = line
        for _ in range(data.draw(st.integers(0, 2))):
            inner = [
                v for v in (target.values() if isinstance(target, dict) else target) if isinstance(v, dict | list) and v
            ]
            target = data.draw(st.sampled_from(inner)) if inner else target
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        target[key] = data.draw(JUNK)
        lines[at] = json.dumps(line)
        raw = "\n".join(lines).encode() + b"\n"
    else:
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
        raw = raw[:at] + data.draw(st.binary(max_size=12)) + raw[min(end, at + data.draw(st.integers(0, 40))) :]
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "rank-0.jsonl").write_bytes(raw)
    try:
        read = trace.load(str(folder))
    except MacsError:
        return
    from sglang_macs import report

    assert "</html>" in report.page(read)  # what is accepted can be drawn


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> bytes:
    """A trace of one rank."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    lines = [json.loads(line) for line in (folder / "rank-0.jsonl").read_text().splitlines()]
    lines[0]["ranks"] = 1
    return "\n".join(json.dumps(line) for line in lines).encode() + b"\n"
