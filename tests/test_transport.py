"""Which transport carries a layer's batches, and which peers it can reach."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_macs import ops
from sglang_macs.comm import peer_memory
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import transport
from sglang_macs.dispatch.fused import FusedDispatch, Sizes
from sglang_macs.errors import MacsNotActive
from tests.support.fused_dispatch import MEDIUM, SIZES


@pytest.fixture
def alone(monkeypatch):
    """A group of this process alone, on a GPU that would do."""
    monkeypatch.setattr(transport, "unfit_device", lambda: "")
    monkeypatch.setattr(transport.peer_memory, "unreachable", lambda group, unfit: unfit)
    monkeypatch.setattr(transport.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(transport, "make", lambda config, sizes, group: SimpleNamespace(
        num_blocks=4, sizes=sizes, region_bytes=FusedDispatch.region_bytes, epoch=lambda: 5
    ))  # fmt: skip


def chosen(dispatch: str, sizes: Sizes = SIZES, mode: str = "low_latency", overlaps: bool = False) -> int:
    transports = transport.Transports(MacsConfig.from_preset(dispatch=dispatch))
    return len(transports.of(sizes, 2, mode, overlaps, group=None))


def test_auto_takes_the_fused_dispatch_and_says_so_once(alone, capsys):
    transports = transport.Transports(MacsConfig.from_preset(dispatch="auto", scope="expert"))
    made = transports.of(SIZES, 2, "low_latency", False, group=None)
    assert len(made) == 2 and transports.of(SIZES, 2, "low_latency", False, group=None) is made
    said = capsys.readouterr().err
    size = 2 * FusedDispatch.region_bytes(SIZES, 4)
    assert said.count("\n") == 1 and "the fused dispatch carries every low-latency batch" in said
    assert f"{size / 1e6:.0f} MB a rank for 64 tokens of every rank" in said
    assert transports.state() == {"bytes": size, "rounds": 10}
    assert transports.of(MEDIUM, 2, "low_latency", False, group=None) == [], "a layer of other sizes"


@pytest.mark.parametrize(
    ("sizes", "mode", "overlaps", "words"),
    [
        (Sizes(**{**vars(MEDIUM), "hidden_size": 2880}), "low_latency", False, "hidden size 2880"),
        (SIZES, "normal", False, "--deepep-mode normal"),
        (SIZES, "auto", True, "--enable-single-batch-overlap"),
        (SIZES, "low_latency", True, "--enable-single-batch-overlap"),
    ],
)
def test_auto_falls_back_and_says_why(alone, capsys, sizes, mode, overlaps, words):
    assert chosen("auto", sizes, mode, overlaps) == chosen("auto_fused", sizes, mode, overlaps) == 0
    said = capsys.readouterr().err
    assert said.startswith("sglang-macs: DeepEP carries every batch") and words in said
    with pytest.raises(MacsNotActive, match=words):
        chosen("fused", sizes, mode, overlaps)


@pytest.mark.parametrize("dispatch", ["deepep", "bounded"])
def test_without_it_nobody_is_asked(dispatch):
    assert chosen(dispatch) == 0
    assert transport.Transports(MacsConfig(dispatch=dispatch)).state() == {"bytes": 0, "rounds": 0}


@pytest.mark.parametrize(
    ("mode", "decode", "plans"),
    [("low_latency", False, True), ("auto", False, False), ("auto", True, True)],
)
def test_planned_batches_are_fused_where_they_are_low_latency(alone, mode, decode, plans):
    """With --deepep-mode auto a prefill is planned in front of DeepEP's normal mode, and has to pay for it."""
    transports = transport.Transports(MacsConfig.from_preset(dispatch="fused", decode=decode))
    assert not transports.plans and transports.of(SIZES, 1, mode, False, group=None)
    assert transports.plans == plans


def test_a_build_without_kernels_does_not_do():
    if ops.cuda_backend() != "cuda":
        assert "no CUDA kernels" in transport.unfit_device()


SEAT = peer_memory._Seat("host", "GPU-0", 1)


@pytest.mark.parametrize(
    ("seat", "words"),
    [
        (SEAT, ""),
        (peer_memory._Seat("host", "GPU-1", 2), ""),
        (peer_memory._Seat("host", "GPU-2", 2), "no peer access between GPU 0 and GPU 2"),
        (peer_memory._Seat("host", "GPU-9", 2), "hidden from its peers"),
        (peer_memory._Seat("other", "GPU-0", 2), "another host"),
    ],
)
def test_peers_have_to_be_reachable(monkeypatch, seat, words):
    monkeypatch.setattr(peer_memory, "_gpu_id", lambda device: f"GPU-{device}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: there == 1)
    found = peer_memory._distance(SEAT, seat, 1)
    assert words in found and bool(found) == bool(words)


def test_handles_stay_on_the_host_while_a_model_is_loaded(monkeypatch):
    """SGLang loads with `torch.device("cuda")`; "meta" shows as well where a tensor is made."""
    opened = []
    monkeypatch.setattr(ops, "allocate_shared", lambda size: (torch.zeros(size, device="cpu"),) * 2)
    monkeypatch.setattr(ops, "open_shared", lambda handle: opened.append(handle.device.type) or 7)
    monkeypatch.setattr(peer_memory, "everyone", lambda value, group: [value] * 3)
    monkeypatch.setattr(peer_memory.dist, "get_rank", lambda group: 1)
    with torch.device("meta"):
        shared = peer_memory.share(8, group=None)
    assert opened == ["cpu", "cpu"] and shared.addresses[0] == shared.addresses[2] == 7
