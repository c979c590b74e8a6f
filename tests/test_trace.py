"""What is read is what the plans did, ranks, stages and chunks put together; what is no trace is refused, cheaply."""

import base64
import functools
import json
import math
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_macs.errors import MacsError
from sglang_macs.observe import trace
from sglang_macs.observe.recorder import Place, Recorder
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.traces import (
    COLUMNS,
    EXPERTS,
    LAYERS,
    RANKS,
    ROWS,
    RUN,
    TOP_K,
    batch,
    config,
    rank_file,
    record,
    shown,
)


def test_counts_are_the_sum_of_the_ranks_plans(tmp_path):
    plans = record(tmp_path)
    read = trace.load(str(tmp_path))
    assert (read.ranks, read.experts, read.top_k, read.layers) == (RANKS, EXPERTS, TOP_K, list(LAYERS))
    assert len(read.steps) == 3 and not read.full and read.config["gamma"] == 1.0
    for step, layers in zip(read.steps, plans, strict=True):
        assert step.tokens == 70
        for i, ranks in enumerate(layers):
            counts = sum(result.counts for result in ranks).long()
            assert np.array_equal(step.outcomes[i], counts.sum(dim=1).numpy())
            before, after = counts[:2].sum(dim=(0, 2)), counts[[0, 2]].sum(dim=(0, 2))
            for rows, expected in ((step.before, before), (step.after, after)):
                assert rows[i].tolist() == expected.view(RANKS, -1).sum(dim=1).tolist()
            _, _, visual, total = ranks[0].group[-4:].tolist()
            assert step.visual_share[i] == pytest.approx(visual / total if visual else 0, abs=1e-4)
            assert step.bound[i] == ranks[0].cut[0, 3]
    before, after = read.rank_rows()
    assert before.shape == (3, len(LAYERS), RANKS)
    assert (before.sum(axis=-1) == 70 * TOP_K).all()
    assert (after.max(axis=-1) <= read.steps[0].bound[0]).all() and (before.max(axis=-1) > read.steps[0].bound[0]).any()


def test_an_idle_rank_takes_part_and_little_room(tmp_path):
    record(tmp_path, passes=2, tokens=(40, 0))
    assert [step.before.sum() for step in trace.load(str(tmp_path)).steps] == [40 * TOP_K * len(LAYERS)] * 2
    lines = rank_file(tmp_path, 1).read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[1])["counts"] == ""


def test_a_picture_has_the_outcome_of_its_own_rows(tmp_path):
    plans = record(tmp_path, reroute="none")
    (got,) = trace.load(str(tmp_path)).pictures
    rows = slice(3, 3 + ROWS * COLUMNS)
    for i in range(len(LAYERS)):
        result = plans[0][i][0]
        gates = batch(40, 10 * LAYERS[i], [])["topk_weights"].amin(dim=1)  # of the first pass, as `record` makes it
        assert np.allclose(got.importance[i].ravel(), gates[rows].numpy(), atol=float(gates.max()) / 255)
        dropped = (result.topk_ids[rows] < 0).sum(dim=1).numpy()
        assert np.array_equal(got.dropped[i].ravel(), dropped) and np.array_equal(got.clipped[i].ravel(), dropped)
    assert got.dropped.sum() > 0, "a case that drops nothing proves nothing"


def test_chunks_of_a_picture_are_put_together_and_repeats_left_out(tmp_path):
    plans = record(tmp_path, passes=3, parts=[[shown(20, 0, 10)], [shown(0, 10, 14)], [shown()]], gamma=math.inf)
    (got,) = trace.load(str(tmp_path)).pictures
    for i in range(len(LAYERS)):
        seen = torch.cat([plans[0][i][0].topk_weights[20:30], plans[1][i][0].topk_weights[:14]]).amin(dim=1)
        assert np.allclose(got.importance[i].ravel(), seen.numpy(), atol=float(seen.max()) / 255)
    assert got.jpeg is not None


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    record(tmp_path)
    file = rank_file(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:-40])
    assert len(trace.load(str(tmp_path)).steps) == 2


def change(tmp_path, edit) -> None:
    file = rank_file(tmp_path, 1)
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


def test_stages_of_a_pipeline_are_put_together(tmp_path):
    """Each has some of the layers; the trace is that of one stage with all of them."""
    record(tmp_path / "one", reroute="none")
    record(tmp_path / "two", reroute="none", stages=2)
    one, two = (trace.load(str(tmp_path / name)) for name in ("one", "two"))
    assert two.layers == list(LAYERS) and len(two.steps) == 3
    for whole, parts in zip(one.steps, two.steps, strict=True):
        for name in ("tokens", "visual_share", "bound", "before", "after", "outcomes"):
            assert np.array_equal(getattr(parts, name), getattr(whole, name)), name
    for whole, parts in zip(one.pictures, two.pictures, strict=True):
        assert parts.jpeg == whole.jpeg is not None and parts.clipped.sum() > 0
        assert np.array_equal(parts.importance, whole.importance) and np.array_equal(parts.clipped, whole.clipped)
    (tmp_path / "two" / trace.file_name(RUN, 0, 1, 0)).unlink()
    with pytest.raises(MacsError, match="2 ranks of 2 stages"):
        trace.load(str(tmp_path / "two"))


def test_replicas_are_kept_apart_or_put_one_after_the_other(tmp_path):
    """Their ranks have the same numbers; their passes are other passes."""
    for replica in range(2):
        record(tmp_path, replica=replica, passes=2 + replica)
    both = trace.load(str(tmp_path))
    assert both.replicas == [0, 1] and len(both.steps) == 5
    assert [step.time for step in both.steps] == sorted(step.time for step in both.steps)
    (picture,) = both.pictures
    assert picture.copies == 2
    alone = [trace.load(str(tmp_path), replica=replica) for replica in range(2)]
    assert [(read.replicas, len(read.steps)) for read in alone] == [([0], 2), ([1], 3)]
    rows = [sum(read.rank_rows()[0].sum(axis=0) for read in alone), both.rank_rows()[0].sum(axis=0)]
    assert np.array_equal(*rows)
    with pytest.raises(MacsError, match="--replica: got 2"):
        trace.load(str(tmp_path), replica=2)
    (tmp_path / trace.file_name(RUN, 1, 0, 1)).unlink()
    with pytest.raises(MacsError, match="of replica 1"):
        trace.load(str(tmp_path))


def test_a_replica_that_served_nothing_is_left_out(tmp_path):
    record(tmp_path, passes=2)
    for rank in range(RANKS):
        (tmp_path / trace.file_name(RUN, 1, 0, rank)).touch()
    assert trace.load(str(tmp_path)).replicas == [0]


def test_the_latest_of_several_starts_is_read_or_the_one_that_is_named(tmp_path):
    names = ["20261130T120000Z-ffff", "20261130T120001Z-0000"]
    for passes, run in enumerate(names, start=1):
        record(tmp_path, passes=passes, run=run)
    latest, first = trace.load(str(tmp_path)), trace.load(str(tmp_path), names[0])
    assert (latest.run, len(latest.steps), first.run, len(first.steps)) == (names[1], 2, names[0], 1)
    assert latest.runs == first.runs == names
    with pytest.raises(MacsError, match=f"--run: got nothing, expected one of {', '.join(names)}"):
        trace.load(str(tmp_path), "nothing")
    for rank in range(RANKS):
        rank_file(tmp_path, rank, "20261130T120002Z-0000").touch()  # just started
    with pytest.raises(MacsError, match=r"no planned pass in run 20261130T120002Z-0000.*name an earlier run"):
        trace.load(str(tmp_path))


def test_files_of_an_older_version_are_refused_by_that_name(tmp_path):
    (tmp_path / "rank-0.jsonl").write_text('{"schema":"sglang-macs/trace/1"}\n')
    with pytest.raises(MacsError, match="older version"):
        trace.load(str(tmp_path))


def shares(folder, split: int) -> None:
    """One batch of 40 rows and one picture in rows 3 to 26, whose rows `split` ranks share, as under attention-TP."""
    made, rows = batch(40, 1, [shown()]), 40 // split
    settings = config(folder, gamma=0.5, reroute="none")
    result = Plan(settings, EXPERTS, 2)(RoutedTokens(**made))
    for rank in range(2):
        one = Recorder(settings, Place(rank, attn_tp=split), RUN)
        with one.forward_pass([shown()], rank if split == 2 else 0):
            mine = slice(rank * rows, (rank + 1) * rows) if split == 2 else slice(0, 40)
            parts = {name: getattr(result, name)[mine] for name in ("topk_ids", "topk_weights", "weight")}
            own = result._replace(counts=result.counts // 2, **parts)
            one.add(0, 2, made["topk_ids"][mine], made["topk_weights"][mine], own)


def test_a_picture_whose_rows_several_ranks_share_is_one_picture(tmp_path):
    """And one that two ranks saw each on its own, in batches of their own, is shown once."""
    shares(tmp_path / "shared", 2)
    shares(tmp_path / "twice", 1)
    (shared,), (twice,) = (trace.load(str(tmp_path / name)).pictures for name in ("shared", "twice"))
    assert (shared.copies, twice.copies) == (1, 2)
    assert shared.jpeg == twice.jpeg is not None and shared.known.all() and twice.known.all()
    assert np.array_equal(shared.clipped, twice.clipped) and np.array_equal(shared.dropped, twice.dropped)
    assert np.allclose(shared.importance, twice.importance, atol=2 / 255) and shared.clipped.sum() > 0


def test_a_missing_rank_and_a_missing_folder_are_refused(tmp_path):
    record(tmp_path)
    (rank_file(tmp_path, 1)).unlink()
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
    rank_file(folder, 0).write_bytes(raw)
    try:
        read = trace.load(str(folder))
    except MacsError:
        return
    from sglang_macs.observe import report

    assert "</html>" in report.page(read)  # what is accepted can be drawn


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> bytes:
    """A trace of one rank."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    lines = [json.loads(line) for line in rank_file(folder, 0).read_text().splitlines()]
    lines[0]["ranks"] = 1
    return "\n".join(json.dumps(line) for line in lines).encode() + b"\n"


# ---- Bounds: what is read takes memory for what is there ------------------------------------------------------------

HOSTILE = """
import resource, sys
from sglang_macs.observe import report, trace
from sglang_macs.errors import MacsError

assert "torch" not in sys.modules
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for folder in sys.argv[1:]:
    try:
        print(len(report.page(trace.load(folder))), "characters")
    except MacsError as error:
        print(error)
"""


@functools.cache
def zeros(size: int) -> str:
    """That unpacks to `size` bytes, from a thousandth of them."""
    packer, block = zlib.compressobj(), bytes(min(size, 1 << 20))
    parts = [packer.compress(block) for _ in range(size // len(block))] + [packer.compress(bytes(size % len(block)))]
    return base64.b64encode(b"".join(parts) + packer.flush()).decode()


def hostile(folder, header=(), line=(), part=(), times: int = 1, raw: bytes = b"") -> str:
    """A trace of one rank in `folder`, well formed but for what is given; `times` lines; raw: in place of the last."""
    sizes = {"ranks": 1, "experts": 2, "top_k": 1, "stages": 1, "attn_tp": 1}
    place = {"schema": trace.SCHEMA, "run": RUN, "replica": 0, "stage": 0, "rank": 0}
    head = {**place, **sizes, "config": {}, **dict(header)}
    layers = dict(line).get("layers", [0])
    pictures = [{"key": "0", "grid": [2, 2], "first": 0, "scale": [1.0], "jpeg": None, **dict(one)} for one in part]
    for one in pictures:
        for name in ("importance", "clipped", "dropped"):
            one.setdefault(name, zeros(4 * len(layers)))
    values = [0] * len(layers)
    body = {"time": 0, "tokens": 1, "layers": layers, "visual_share": values, "bound": values, "pictures": pictures}
    body["counts"] = zeros(len(layers) * 3 * head["experts"] * 2 * 4)
    lines = [json.dumps(head)] + [json.dumps({"step": i, **body, **dict(line)}) for i in range(times)]
    folder.mkdir()
    rank_file(folder, 0).write_bytes("\n".join(lines).encode() + b"\n" + raw)
    return str(folder)


def jpeg_of(side: int) -> str:
    """That claims so many pixels a side."""
    frame = b"\xff\xc0\x00\x11\x08" + 2 * side.to_bytes(2, "big") + b"\x03" + 9 * b"\x01"
    return base64.b64encode(b"\xff\xd8" + frame + b"\xff\xd9").decode()


def test_a_file_takes_memory_for_what_is_in_it_and_not_for_what_it_claims(tmp_path):
    """Each of these took gigabytes, or would have; they get one. All but the first and the last are refused in one
    line.
    """
    huge, cells = {"grid": [16384, 16384]}, {"grid": [256, 256]}
    layers = list(range(512))
    many = {"layers": layers, "visual_share": [0] * 512, "bound": [0] * 512}
    folders = {
        "good": hostile(tmp_path / "good", part=[{"jpeg": jpeg_of(512)}]),
        "16384 x 16384 tokens in 100 bytes": hostile(tmp_path / "huge", part=[huge]),
        "256 x 256 tokens in 512 layers": hostile(
            tmp_path / "deep", line=many, part=[cells | {"key": str(i), "scale": [1.0] * 512} for i in range(16)]
        ),
        "17 pictures": hostile(tmp_path / "pictures", part=[{"key": str(i)} for i in range(17)]),
        "counts that unpack to 1 GB each": hostile(tmp_path / "bomb", line={"counts": zeros(1 << 30)}, times=2),
        "60 passes of 50 MB": hostile(tmp_path / "passes", {"experts": 4096}, many, times=60),
        "weights that unpack to 1 GB": hostile(tmp_path / "weights", part=[{"importance": zeros(1 << 30)}]),
        "a JPEG of 60,000 pixels a side": hostile(tmp_path / "jpeg", part=[{"jpeg": jpeg_of(60_000)}]),
        "a million layers": hostile(tmp_path / "layers", line=dict.fromkeys(many, [0] * 1_000_000)),
        "a million experts": hostile(tmp_path / "experts", {"experts": 1_000_000}, {"counts": ""}),
        "a line of 20 MB": hostile(tmp_path / "line", raw=b"[" + b"[]," * 7_000_000),
        "a number of 5,000 digits": hostile(tmp_path / "digits", raw=b'{"step":' + b"9" * 5000 + b"}\n"),
        "100,000 lists in one another": hostile(tmp_path / "nested", raw=b"[" * 100_000 + b"\n"),
        "a long good one": hostile(tmp_path / "long", times=5_000),
    }
    for name, kind in (("device", lambda path: path.symlink_to("/dev/zero")), ("pipe", os.mkfifo)):
        folder = tmp_path / name
        folder.mkdir()
        kind(rank_file(folder, 0))
        folders[name] = str(folder)
    assert all(size_of(folder) < 32 << 20 for folder in folders.values())
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, *folders.values()],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(zip(folders, done.stdout.splitlines(), strict=True))
    accepted = {name for name, line in said.items() if line.endswith("characters")}
    assert accepted == {"good", "a long good one"}, said
    assert all(
        line.startswith("trace: got ") and len(line) < 800 for name, line in said.items() if name not in accepted
    )


def size_of(folder: str) -> int:
    return sum(os.lstat(os.path.join(folder, name)).st_size for name in os.listdir(folder))
