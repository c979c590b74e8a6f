"""Device memory of one rank that all ranks of a group on this host can address, through CUDA IPC."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..errors import MacsNotActive

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class PeerMemory:
    """own [bytes] u8 of this rank, and the addresses of every rank's on this device."""

    rank: int
    own: Tensor
    addresses: list[int]


@dataclass(frozen=True)
class _Seat:
    """Where a rank sits: its host, and its GPU by the identity that every process sees alike."""

    host: str
    gpu: str
    process: int


def everyone(value: object, group: dist.ProcessGroup) -> list:
    """`value` of every rank of the group, by rank. Collective."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def share(size: int, group: dist.ProcessGroup) -> PeerMemory:
    """`size` zero-filled bytes per rank on the current device, mapped by all. Collective; group: on the host (gloo).

    Raises MacsNotActive on every rank where one of them cannot allocate or map.
    """
    rank = dist.get_rank(group)
    own, handle = _on_every_rank(lambda: ops.allocate_shared(size), "allocate shared memory", group)
    handles = everyone(handle.tolist(), group)

    def map_all() -> list[int]:
        # On the host, said aloud: SGLang loads models with the GPU as torch's default device.
        return [
            own.data_ptr() if peer == rank else ops.open_shared(torch.tensor(of_peer, dtype=torch.uint8, device="cpu"))
            for peer, of_peer in enumerate(handles)
        ]

    # Nobody writes before everybody has mapped.
    return PeerMemory(rank, own, _on_every_rank(map_all, "map the memory of its peers", group))


def _on_every_rank(act: Callable[[], Any], what: str, group: dist.ProcessGroup) -> Any:
    """What `act` returns, once it has succeeded on all ranks. A rank that fails alone would leave the others waiting in
    the next collective. Collective.
    """
    result, trouble = None, ""
    try:
        result = act()
    except Exception as error:  # whatever it is, the others have to know
        trouble = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for rank, words in enumerate(everyone(trouble, group)):
        if words:
            raise MacsNotActive(f"rank {rank} cannot {what}: {words}")
    return result


def unreachable(group: dist.ProcessGroup, unfit: str = "") -> str:
    """Which rank's memory the current device cannot address, in words, or "". The same answer on every rank.
    Collective.

    unfit: why this rank's own device is not to be used, or "": another rank may have another one.
    """
    if words := next((words for words in everyone(unfit, group) if words), ""):
        return words
    seats = everyone(_seat(), group)
    mine = seats[dist.get_rank(group)]
    found = next((words for peer, seat in enumerate(seats) if (words := _distance(mine, seat, peer))), "")
    return next((words for words in everyone(found, group) if words), "")


def _seat() -> _Seat:
    host = BOOT_ID.read_text().strip() if BOOT_ID.exists() else os.uname().nodename
    return _Seat(host, _gpu_id(torch.cuda.current_device()), os.getpid())


def _gpu_id(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _distance(mine: _Seat, peer: _Seat, rank: int) -> str:
    if peer.host != mine.host:
        return f"rank {rank} runs on another host"
    visible = {_gpu_id(device): device for device in range(torch.cuda.device_count())}
    if peer.gpu not in visible:
        return f"the GPU of rank {rank} is hidden from its peers (CUDA_VISIBLE_DEVICES)"
    here, there = visible[mine.gpu], visible[peer.gpu]
    reachable = here == there or torch.cuda.can_device_access_peer(here, there)
    return "" if reachable else f"no peer access between GPU {here} and GPU {there}"
