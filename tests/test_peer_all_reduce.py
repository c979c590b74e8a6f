"""The exchange over peers' memory without a GPU: who uses it, what it says, and what a fault becomes. The kernel is in
test_peer_all_reduce_emulated.py and test_gpu.py, and between processes in benchmarks/gpu/overhead.py.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from reference import fused_c as fc
from reference.peer_reduce_case import PeerReduceLayout
from sglang_macs import ops
from sglang_macs.comm.peer_all_reduce import PeerAllReduce
from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import transport
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.errors import MacsError, MacsNotActive
from sglang_macs.observe.stats import Stats
from sglang_macs.plan.plan import Plan


def test_layout_is_that_of_the_kernel():
    assert ops.PeerReduceLayout._fields == tuple(name for name, _ in PeerReduceLayout._fields_)
    layout = ops.peer_reduce_layout(8, 1000)
    assert list(layout) == sorted(layout) and layout.bytes == layout.inbox + 2 * 8 * 1000 * 8
    assert layout.epochs - layout.status >= ctypes.sizeof(fc.FusedStatus)
    with pytest.raises(ValueError, match="num_ranks: got 17, expected 1 to 16"):
        ops.peer_reduce_layout(17, 1)


def test_it_is_as_large_as_what_a_plan_exchanges():
    plan = Plan(MacsConfig(buckets=64), 16, 2)
    ids, weights = torch.tensor([[1, 5]]), torch.tensor([[0.5, 0.5]])
    own = plan.histogram(ids, weights, torch.ones(1), torch.full((1,), -1, dtype=torch.int32))
    assert own.numel() == plan.histogram_size


# ---- Who uses it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ranks(monkeypatch):
    """A group of two, of which this process is the first, on GPUs that would do; memory is not shared."""
    monkeypatch.setattr(transport, "unfit_device", lambda: "")
    monkeypatch.setattr(transport.peer_memory, "unreachable", lambda group, unfit: unfit)
    monkeypatch.setattr(
        transport.peer_memory, "share", lambda size, group: PeerMemory(0, torch.zeros(size).byte(), [0, 0])
    )
    monkeypatch.setattr(transport.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(transport.dist, "get_world_size", lambda group: 2)


def chosen(**options) -> PeerAllReduce | None:
    return transport.Transports(MacsConfig.from_preset(**options)).all_reduce(500, group=None)


def test_auto_takes_it_for_all_layers_and_says_so_once(two_ranks, capsys):
    transports = transport.Transports(MacsConfig.from_preset(all_reduce="auto"))
    made = transports.all_reduce(500, group=None)
    assert made is not None and transports.all_reduce(500, group=None) is made
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "one kernel over the peers' memory sums the exchange" in said
    assert transports.all_reduce(400, group=None) is None, "a layer with other experts"


@pytest.mark.parametrize(
    ("options", "words"), [({"exchange": "local"}, "--macs-exchange local"), ({"preset": "off"}, "MACS is off")]
)
def test_where_nothing_is_exchanged_auto_says_why_not(two_ranks, capsys, options, words):
    assert chosen(all_reduce="auto", **options) is None
    said = capsys.readouterr().err
    assert said.startswith("sglang-macs: the process group sums the exchange") and words in said
    with pytest.raises(MacsNotActive, match=words):
        chosen(all_reduce="peer", **options)


def test_ranks_that_cannot_reach_each_other_fall_back(two_ranks, monkeypatch, capsys):
    monkeypatch.setattr(transport.peer_memory, "unreachable", lambda group, unfit: "rank 1 runs on another host")
    assert chosen(all_reduce="auto") is None
    assert "rank 1 runs on another host" in capsys.readouterr().err


def test_with_the_process_group_nobody_is_asked(capsys):
    assert chosen(all_reduce="group") is None and not capsys.readouterr().err


def test_only_histograms_go_that_way(monkeypatch):
    """The proof's recounts have another size."""
    asked = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: asked.append("group"))
    peers = SimpleNamespace(takes=lambda t: t.numel() == 500)
    planner = LayerPlanner(0, Plan(MacsConfig(), 16, 2), None, Stats(), peers=None)
    planner.all_reduce(torch.zeros(500, dtype=torch.int32))

    class Peers(SimpleNamespace):
        def __call__(self, tensor):
            asked.append("peers")

    planner.peers = Peers(**vars(peers))
    planner.all_reduce(torch.zeros(500, dtype=torch.int32))
    planner.all_reduce(torch.zeros(32, dtype=torch.int32))
    assert asked == ["group", "peers", "group"]


# ---- Faults in words ------------------------------------------------------------------------------------------------


def test_a_rank_that_never_came_is_named(two_ranks, monkeypatch):
    region = torch.zeros(ops.peer_reduce_layout(2, 500).bytes, dtype=torch.uint8)
    reduce = PeerAllReduce(PeerMemory(0, region, [0, 0]), 500)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: True))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    reduce.check()
    reduce.check()
    record = bytes(fc.FusedStatus(fc.FAULTS.index("values"), 1, -1, -1, 7, 200_000, 6, 7))
    region[: len(record)] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    reduce.check()  # sends for the record
    with pytest.raises(MacsError, match=r"rank 1 never sent its part of a sum, says rank 0 \(epoch 7\)"):
        reduce.check()


def test_the_server_looks_at_its_record(two_ranks):
    transports = transport.Transports(MacsConfig.from_preset(all_reduce="peer"))
    transports.check()
    made, looked = transports.all_reduce(500, group=None), []
    made.check = lambda: looked.append(1)
    transports.check()
    assert looked
