"""Faults of the fused dispatch: what the host learns of them, in words, before tokens leave, and how ranks recover."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reference import fused_c as fc
from sglang_macs.comm import peer_status
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import transport
from sglang_macs.dispatch.fused import FusedDispatch
from sglang_macs.engine import scheduler
from sglang_macs.errors import MacsError
from tests.support.fused_dispatch import dispatch_of
from tests.support.ranks import run_ranks


def status(fault: int, peer: int = 1, block: int = 2, layer: int = 3, limit_ms: int = 8000) -> torch.Tensor:
    packed = bytes(fc.FusedStatus(fault, peer, block, layer, 7, limit_ms, 5, 6))
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def seen(fault: int, **options: int) -> peer_status.Record | None:
    return peer_status.read(status(fault, **options))


@pytest.fixture
def dispatched() -> FusedDispatch:
    return dispatch_of()


def test_a_fault_names_rank_layer_and_stage(dispatched):
    """As the device has recorded it: the host has not counted what a graph replays."""
    dispatched._raise_for(seen(0))
    words = r"rank 1 \(block 2\) never sent its assignments in layer 3, says rank 0 .*every rank within 8 s"
    with pytest.raises(MacsError, match=words):
        dispatched._raise_for(seen(fc.FAULTS.index("assignments")))
    with pytest.raises(MacsError, match=r"rank 1 claims more tokens than there may be in layer 0.*within 200 s"):
        dispatched._raise_for(seen(fc.FAULTS.index("bad tokens"), block=-1, layer=0, limit_ms=200_000))


class Event:
    """Of a stream whose work ends when `done` says so."""

    done = 0

    def __init__(self):
        self.number = None

    def record(self):
        Event.recorded = self.number = getattr(Event, "recorded", 0) + 1

    def query(self):
        return self.number <= Event.done

    def synchronize(self):
        Event.done = max(Event.done, self.number)


@pytest.fixture
def events(monkeypatch):
    """Events of one stream, and copies that are there at once."""
    Event.done = Event.recorded = 0
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    return Event


def test_every_pass_is_looked_at_though_the_host_is_ahead(events):
    """With SGLang's overlapped schedule a pass is launched before the one before is done."""
    watch, good, bad = peer_status.Watch(), status(0), status(2, peer=4)
    for said in (good, good, bad):
        assert watch.look(said) is None, "nothing has arrived"
    events.done = 2
    assert watch.arrived() is None
    events.done = 3
    assert watch.arrived().peer == 4 and watch.arrived() is None
    for _ in range(100):
        watch.look(good)
    assert len(watch._on_their_way) == peer_status.MOST_ON_THEIR_WAY, "a device that stands still costs no memory"


def test_tokens_of_a_pass_without_a_rank_do_not_leave(dispatched, events, monkeypatch):
    """SGLang waits for its copies inside process_batch_result, and takes the tokens behind that."""
    transports = transport.Transports(MacsConfig.from_preset(dispatch="fused"))
    monkeypatch.setattr(scheduler.worker, "current", lambda: SimpleNamespace(transports=transports))
    left = []

    def original(self, batch, result):
        result.copy_done.synchronize()
        assert result.copy_done.query()
        left.append(batch)

    def process(batch: str) -> None:
        copied = Event()
        copied.record()
        scheduler._process_batch_result(original, None, batch, SimpleNamespace(copy_done=copied))

    process("before there is a region")
    transports._made = [dispatched]
    dispatched._set_format("bf16")
    transports.check()
    process("a good pass")
    dispatched._status().copy_(status(2))
    transports.check()  # behind the launch of the pass, which is not done
    with pytest.raises(MacsError, match=r"rank 1 .* never sent its assignments in layer 3"):
        process("a pass without rank 1")
    assert left == ["before there is a region", "a good pass"]


def _recover(rank: int, world: int) -> tuple[int, int]:
    """One rank that recovers from a fault: its region's epoch, and what is left of the fault."""
    torch.cuda.synchronize = lambda: None
    carrier = dispatch_of(rank)
    carrier._set_format("fp8")
    carrier._part("epoch", torch.int32, 1).fill_(5 + rank)  # the other rank gave up before it began
    carrier._status().copy_(status(2))
    scales = carrier.memory.own[carrier._layout.row_scales : carrier._layout.scales]
    scales.fill_(7)  # of rows that nobody received
    carrier.recover(torch.distributed.group.WORLD)
    left = int(carrier._status().sum()) + int(scales.sum())
    return carrier.epoch(), left


def test_ranks_that_recover_agree_on_an_epoch_and_forget_the_fault():
    assert run_ranks(2, _recover) == [(7, 0)] * 2
