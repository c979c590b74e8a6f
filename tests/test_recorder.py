"""A recorder finds images in batches, stays within its limit, keeps users' pictures private, and costs no request."""

import errno
import json
import os
import stat
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import dispatchers, launcher, worker
from sglang_macs.errors import MacsError
from sglang_macs.observe import recorder, report, trace
from sglang_macs.observe.recorder import Place, Recorder
from sglang_macs.observe.shared_state import merged
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch as batches
from sglang_macs.plan.plan import Plan, PlanResult
from tests.support.traces import (
    COLUMNS,
    EXPERTS,
    KEY,
    LAYERS,
    RANKS,
    ROWS,
    RUN,
    TOP_K,
    batch,
    config,
    picture,
    rank_file,
    record,
    shown,
)


def test_the_halves_of_an_overlapped_batch_are_one_pass(tmp_path):
    """Two-batch overlap plans each layer twice; the rows of both halves count, their pictures are left out."""
    (whole,) = record(tmp_path / "whole", passes=1)
    for rank in range(RANKS):
        one = Recorder(config(tmp_path / "halves"), Place(rank), RUN)
        with one.forward_pass([shown()], 0):
            for layer, plans in zip(LAYERS, whole, strict=True):
                for _ in range(2):
                    one.add(layer, RANKS, plans[rank].topk_ids, plans[rank].topk_weights, plans[rank])
    once, twice = (trace.load(str(tmp_path / name)).steps[0] for name in ("whole", "halves"))
    assert np.array_equal(twice.outcomes, 2 * once.outcomes) and np.array_equal(twice.bound, 2 * once.bound)
    assert twice.tokens == 2 * once.tokens and np.allclose(twice.visual_share, once.visual_share)
    assert trace.load(str(tmp_path / "halves")).pictures == []


def test_the_picture_itself_is_put_together_from_its_patches():
    pixels = recorder.picture(shown())
    assert np.array_equal(pixels, (picture() * 255).round().to(torch.uint8).numpy())


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
    found = [(part.row, part.first, part.count, part.token_grid) for part in recorder.shown_in(batch)]
    assert found == [(5, 2, 4, (2, 3)), (5 + 16, 0, 2, (2, 3))]


@pytest.mark.parametrize(
    "odd",
    [item(0, 5, image=False), item(0, 5, other=1), item(0, 4), item(0, 5, image_grid_thw=torch.tensor([[2, 4, 6]]))],
)
def test_what_is_no_plain_image_has_no_grid(odd):
    batch = SimpleNamespace(
        mm_inputs=[SimpleNamespace(mm_items=[odd])], extend_prefix_lens_cpu=[0], extend_seq_lens_cpu=[9]
    )
    assert all(part.token_grid is None for part in recorder.shown_in(batch))


# ---- What is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gate", "entropy", "entropy_gate"])
def test_importance_is_what_the_plan_goes_by_for_the_weakest_assignment(kind):
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    gates, weight = torch.tensor([[0.7, 0.3], [0.9, 0.0], [0.0, 0.0]]), torch.tensor([0.5, 0.25, 1.0])
    expected = {"gate": [0.3, 0.9, 0.0], "entropy": [0.5, 0.25, 1.0], "entropy_gate": [0.15, 0.225, 0.0]}[kind]
    assert recorder.importance_of(kind, ids, gates, weight).tolist() == pytest.approx(expected)


def plan_of(ids: torch.Tensor, gates: torch.Tensor) -> PlanResult:
    """That leaves everything as it is, and weighs all tokens alike."""
    counts = torch.zeros(3, EXPERTS, 2, dtype=torch.int32)
    sums, cut = torch.ones(4, dtype=torch.int32), torch.ones(1, 4, dtype=torch.int32)
    return PlanResult(ids, gates, torch.full((len(ids),), 0.5), sums, sums, cut, counts)


def recorded_share(folder, attn_tp_rank: int, rows: int, part: recorder.Shown) -> list[dict]:
    """The pictures in the line of one rank of two that share a batch, whose token i has gate i / 64 in its own row."""
    gates = (torch.arange(rows).float() / 64).unsqueeze(1).repeat(1, TOP_K)
    ids = torch.arange(TOP_K).repeat(rows, 1)
    one = Recorder(config(folder), Place(attn_tp_rank, attn_tp=2), RUN)
    with one.forward_pass([part], attn_tp_rank):
        one.add(0, RANKS, ids, gates, plan_of(ids, gates))
    return json.loads(rank_file(folder, attn_tp_rank).read_text().splitlines()[1])["pictures"]


def test_ranks_that_share_a_batch_record_their_own_rows(tmp_path):
    part = shown(row=6, count=ROWS * COLUMNS)  # rows 6 to 29 of 40
    first, second = (recorded_share(tmp_path, rank, 20, part)[0] for rank in range(2))
    assert (first["first"], second["first"]) == (0, 14)
    assert first["jpeg"] is not None and second["jpeg"] is None
    assert (first["scale"], second["scale"]) == ([19 / 64], [9 / 64])


def test_a_rank_without_a_row_of_a_picture_records_none(tmp_path):
    assert recorded_share(tmp_path, 1, 40, shown(row=6)) == []


def test_what_is_planned_is_what_is_recorded(tmp_path):
    """From the planner of a layer to the file, with the router's gates of before the plan."""
    settings = MacsConfig.from_preset("rank", gamma=0.5, scope="expert", trace=str(tmp_path), exchange="local")
    traced = Recorder(settings, Place(0), RUN)
    planner = LayerPlanner(3, Plan(settings, EXPERTS, 1), None, Stats(), recorder=traced)
    made = batch(40, 1, [shown()])
    with batches.forward(batches.Batch(made["segment"], 1, skip="")), traced.forward_pass([shown()], 0):
        planned = planner(made["hidden_states"], made["topk_ids"], made["topk_weights"], made["router_logits"])
    read = trace.load(str(tmp_path))
    (got,) = read.pictures
    gates = made["topk_weights"].amin(dim=1)[3 : 3 + ROWS * COLUMNS]
    assert np.allclose(got.importance.ravel(), gates, atol=float(gates.max()) / 255) and gates.std() > 0
    clipped = (planned.topk_ids != made["topk_ids"]).sum(dim=1)[3 : 3 + ROWS * COLUMNS]
    assert got.clipped.ravel().tolist() == clipped.tolist() and clipped.sum() > 0
    assert read.layers == [3]


def test_a_layer_left_alone_is_recorded_as_it_was_routed(tmp_path):
    """Beside one that was planned; two ranks, whose visual shares differ."""
    settings = MacsConfig.from_preset("rank", gamma=0.5, trace=str(tmp_path))
    batches_made, shares = [batch(40, 1, [shown()]), batch(20, 2, [])], []
    for rank, made in enumerate(batches_made):
        traced = Recorder(settings, Place(rank), RUN)
        now = batches.Batch(made["segment"], 1, skip="", no_gain=frozenset([5]), gain={3: 70, 5: 2})
        with batches.forward(now), traced.forward_pass([shown()] if rank == 0 else [], 0):
            for layer in (3, 5):
                planner = LayerPlanner(layer, Plan(settings, EXPERTS, 2), None, Stats(), recorder=traced)
                planner.all_reduce = lambda histogram: histogram.mul_(2)
                planner(made["hidden_states"], made["topk_ids"], made["topk_weights"], made["router_logits"])
        shares.append(json.loads(rank_file(tmp_path, rank).read_text().splitlines()[1])["visual_share"][1])
    read = trace.load(str(tmp_path))
    (step,) = read.steps
    assert read.layers == [3, 5] and step.planned.tolist() == [True, False] and step.gain.tolist() == [70, 2]
    ids = torch.cat([made["topk_ids"] for made in batches_made])
    routed = torch.bincount(ids.flatten(), minlength=EXPERTS).view(2, -1).sum(1).tolist()
    assert step.before.tolist() == [routed, routed] and step.after[1].tolist() == routed != step.after[0].tolist()
    assert step.outcomes[1, 0].tolist() == [ROWS * COLUMNS * TOP_K, (60 - ROWS * COLUMNS) * TOP_K]
    assert not step.outcomes[1, 1:].any() and step.outcomes[0, 1].any()
    assert shares[0] > shares[1] == 0 and step.visual_share[1] == pytest.approx(shares[0] * 40 / 60)
    page = report.page(read)
    assert "50% of the dispatches were left alone" in page and "<td>0%</td><td>2</td>" in page


# ---- It costs no request -------------------------------------------------------------------------------------------


class FullDisk:
    """A file that takes `room` bytes and then raises."""

    def __init__(self, number: int, room: int) -> None:
        self.error, self.room = OSError(number, os.strerror(number)), room

    def write(self, data) -> int:
        if not self.room:
            raise self.error
        taken = min(self.room, len(data))
        self.room -= taken
        return taken

    def close(self) -> None:
        raise self.error


def forward(one: Recorder, parts=()) -> str:
    """One planned pass; returns what its caller gets."""
    ids = torch.zeros(4, TOP_K, dtype=torch.int64)
    with one.forward_pass(parts, 0):
        one.add(0, RANKS, ids, torch.ones(4, TOP_K), plan_of(ids, torch.ones(4, TOP_K)))
        return "the model's answer"


def assert_it_stopped(one: Recorder, capsys, why: str) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sglang-macs: the trace of rank 1 ends in pass ") and why in line
    assert why in one.state()["stopped"]
    assert forward(one) == "the model's answer"
    assert capsys.readouterr().err == "", "one line, not one a pass"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_fails_ends_the_recording_and_no_pass(tmp_path, capsys, number, room):
    one = Recorder(config(tmp_path), Place(1), RUN)
    assert forward(one) == "the model's answer"
    one._file = FullDisk(number, room)
    assert forward(one) == "the model's answer"
    assert_it_stopped(one, capsys, os.strerror(number))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_device_ends_the_recording_and_no_pass(tmp_path, capsys):
    one = Recorder(config(tmp_path), Place(1), RUN)
    one._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    assert forward(one) == "the model's answer"
    assert_it_stopped(one, capsys, os.strerror(errno.ENOSPC))


def test_passes_before_the_disk_was_full_are_read(tmp_path):
    record(tmp_path, passes=2)
    file = rank_file(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:-100])
    assert len(trace.load(str(tmp_path)).steps) == 1


def test_a_full_disk_under_stderr_too(tmp_path, monkeypatch):
    one = Recorder(config(tmp_path), Place(1), RUN)
    one._file = FullDisk(errno.ENOSPC, 0)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=one._file.write, flush=one._file.close))
    assert forward(one) == "the model's answer" and one.stopped


def test_a_picture_that_cannot_be_stored_ends_the_recording_and_no_pass(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recorder, "_jpeg", lambda part: 1 / 0)
    one = Recorder(config(tmp_path), Place(1), RUN)
    assert forward(one, [shown(row=0)]) == "the model's answer"
    assert_it_stopped(one, capsys, "ZeroDivisionError")


def test_a_batch_of_a_kind_that_nobody_knows_ends_the_recording_and_no_pass(tmp_path, capsys):
    one = Recorder(config(tmp_path), Place(1), RUN)
    odd = SimpleNamespace(mm_inputs=[object()], extend_prefix_lens_cpu=[0, 1], extend_seq_lens_cpu=[1])
    with one.pass_of(odd, 0):
        pass
    assert_it_stopped(one, capsys, "AttributeError")


def test_a_pass_that_fails_is_not_recorded(tmp_path):
    one = Recorder(config(tmp_path), Place(0), RUN)
    ids = torch.zeros(4, TOP_K, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="the model's own"), one.forward_pass([], 0):
        one.add(0, RANKS, ids, torch.ones(4, TOP_K), plan_of(ids, torch.ones(4, TOP_K)))
        raise RuntimeError("the model's own error")
    assert rank_file(tmp_path, 0).read_bytes() == b""
    forward(one)
    assert json.loads(rank_file(tmp_path, 0).read_text().splitlines()[1])["step"] == 0


def test_metrics_that_cannot_be_written_end_no_pass(capsys):
    process = worker.Worker(MacsConfig.from_preset("rank"))

    def tick(stats, idle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    process._exporter = SimpleNamespace(tick=tick)
    process.tick()
    process.tick(idle=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics" in line and os.strerror(errno.ENOSPC) in line


def test_the_state_of_a_trace_is_beside_the_counters(tmp_path):
    """And an answer for several ranks says why any of them stopped."""
    processes = [worker.Worker(config(tmp_path)) for _ in range(2)]
    assert "trace" not in processes[0].state()
    first, second = (process.recorder_at(Place(rank)) for rank, process in enumerate(processes))
    forward(first)
    size = rank_file(tmp_path, 0, first.run).stat().st_size
    assert processes[0].state()["trace"] == {"run": first.run, "bytes": size, "stopped": ""}
    second._file = FullDisk(errno.ENOSPC, 0)
    forward(second)
    answer = merged([process.state() for process in processes])
    assert answer["trace"] == {"run": first.run, "bytes": size, "stopped": os.strerror(errno.ENOSPC)}


# ---- Files ---------------------------------------------------------------------------------------------------------


def test_a_file_stays_within_its_limit_and_says_so(tmp_path):
    record(tmp_path, passes=40, trace_limit_mb=0.01)
    assert all(file.stat().st_size <= 10_020 for file in tmp_path.iterdir())
    read = trace.load(str(tmp_path))
    assert read.full and 0 < len(read.steps) < 40


def test_nobody_else_reads_a_trace(tmp_path):
    mask = os.umask(0)
    try:
        record(tmp_path / "trace", passes=1)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "trace").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "trace").iterdir()} == {0o600}


def test_a_file_that_is_there_is_neither_overwritten_nor_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    rank_file(tmp_path, 0).write_text("an earlier trace")
    rank_file(tmp_path, 1).symlink_to(tmp_path / "precious")
    for rank in range(2):
        with pytest.raises(MacsError, match="--macs-trace"):
            Recorder(config(tmp_path), Place(rank), RUN)
    assert rank_file(tmp_path, 0).read_text() == "an earlier trace"
    assert (tmp_path / "precious").read_text() == "precious"


def test_replicas_stages_and_ranks_have_files_of_their_own(tmp_path):
    places = [Place(rank, stage, replica, 2) for rank in range(2) for stage in range(2) for replica in range(2)]
    for place in places:
        Recorder(config(tmp_path), place, RUN)
    assert len(list(tmp_path.iterdir())) == len(places)


def parallel(**options) -> SimpleNamespace:
    usual = {"dp_rank": None, "attn_dp_size": 1, "moe_ep_rank": 1, "pp_rank": 0, "pp_size": 1, "attn_tp_size": 1}
    return SimpleNamespace(**{**usual, **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Place(1)),
        ({"dp_rank": 1, "attn_tp_size": 2}, Place(1, replica=1, attn_tp=2)),
        ({"dp_rank": 1, "attn_dp_size": 2}, Place(1)),  # dp-attention: both ranks are of one EP group
        ({"pp_rank": 1, "pp_size": 2, "attn_tp_size": 2}, Place(1, stage=1, stages=2, attn_tp=2)),
    ],
)
def test_a_process_knows_its_place(options, expected):
    assert dispatchers._place(parallel(**options)) == expected


def test_every_launch_has_a_name_of_its_own():
    """Which its schedulers get, and those of a server without MACS do not."""

    def entry(backend: str):
        record = SimpleNamespace(moe_a2a_backend=backend)
        return launcher._launch_scheduler_processes(lambda cls, args, ports, entry: entry, None, record, None, len)

    assert entry("none") is len
    assert len({entry("macs").args[1] for _ in range(3)}) == 3


def test_the_ranks_of_several_hosts_agree_on_a_name(monkeypatch):
    """Each host's launcher has one; the first rank that asks decides. (Another test may have left a process group.)"""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setenv(recorder.RUN_ENV, "host-1")
    assert recorder.agreed_run() == "host-1"
    monkeypatch.setenv(recorder.RUN_ENV, "host-2")
    assert recorder.agreed_run() == "host-1"
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert recorder.agreed_run() == "host-2"
