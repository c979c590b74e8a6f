"""A group of ranks whose arrays peer_all_reduce sums, each launched by itself: guarded arrays and regions."""

from __future__ import annotations

import ctypes

import torch

from . import fused_c as fc
from .kernel_case import POISON
from .policy_c import strict

GUARD = 64  # bytes of poison on either side


@strict
class PeerReduceLayout(ctypes.Structure):
    """csrc/include/macs/peer_all_reduce.h, field by field; so are the parameters."""

    _fields_ = [(name, ctypes.c_int64) for name in ("status", "epochs", "inbox", "bytes")]


@strict
class PeerReduceParams(ctypes.Structure):
    _fields_ = [
        ("region", ctypes.c_void_p * fc.MAX_PEERS),
        ("layout", PeerReduceLayout),
        ("values", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("num_ranks", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("hops", ctypes.c_int32),
        ("timeout_ns", ctypes.c_uint64),
    ]


class ReduceGroup:
    """kernels: launchers (`kernels("peer_all_reduce", params)`) with a `library`; on one device or the emulated one."""

    def __init__(self, kernels, num_ranks: int, size: int, device: str, timeout_ns: int = 10**9, hops: int = 0) -> None:
        self.kernels, self.num_ranks, self.size, self.timeout_ns = kernels, num_ranks, size, timeout_ns
        self.hops = hops
        if kernels.library.macs_peer_reduce_sizeof() != ctypes.sizeof(PeerReduceParams):
            raise RuntimeError("PeerReduceParams: another size in C than here")
        self.layout = PeerReduceLayout()
        kernels.library.macs_peer_reduce_layout(
            ctypes.c_int64(num_ranks), ctypes.c_int64(size), ctypes.byref(self.layout)
        )
        kind = {"dtype": torch.uint8, "device": device}
        self._regions = [torch.full((self.layout.bytes + 2 * GUARD,), POISON, **kind) for _ in range(num_ranks)]
        self._values = [torch.full((4 * size + 2 * GUARD,), POISON, **kind) for _ in range(num_ranks)]
        for region in self._regions:
            region[GUARD:-GUARD].zero_()
        self.own = [torch.zeros(size, dtype=torch.int32, device=device) for _ in range(num_ranks)]

    def load(self, seed: int) -> None:
        """Fresh values, some of them negative, and some sums beyond 32 bits: they wrap."""
        generator = torch.Generator().manual_seed(seed)
        for own in self.own:
            own.copy_(torch.randint(-(2**31), 2**31, (self.size,), generator=generator).int())
        self.reload()

    def reload(self) -> None:
        """The same values once more."""
        for rank, own in enumerate(self.own):
            self.values(rank).copy_(own)

    def params(self, rank: int) -> PeerReduceParams:
        regions = [region.data_ptr() + GUARD for region in self._regions]
        return PeerReduceParams(
            region=(ctypes.c_void_p * fc.MAX_PEERS)(*regions),
            layout=self.layout,
            values=self._values[rank].data_ptr() + GUARD,
            sum=self._values[rank].data_ptr() + GUARD,
            size=self.size,
            num_ranks=self.num_ranks,
            rank=rank,
            hops=self.hops,
            timeout_ns=self.timeout_ns,
        )

    def launch(self, rank: int) -> None:
        self.kernels("peer_all_reduce", self.params(rank))

    def values(self, rank: int) -> torch.Tensor:
        """[size] i32 of the rank: its own, then the sum."""
        return self._values[rank][GUARD:-GUARD].view(torch.int32)

    def inbox(self, rank: int) -> torch.Tensor:
        """[2, R, size] i64: LL words, by the epoch's last bit and the source."""
        words = self._regions[rank][GUARD + self.layout.inbox : -GUARD].view(torch.int64)
        return words.view(2, self.num_ranks, self.size)

    def expected(self) -> torch.Tensor:
        return torch.stack(self.own).sum(dim=0, dtype=torch.int32)

    def status(self, rank: int) -> fc.FusedStatus:
        at = GUARD + self.layout.status
        raw = self._regions[rank][at : at + ctypes.sizeof(fc.FusedStatus)].cpu().numpy().tobytes()
        return fc.FusedStatus.from_buffer_copy(raw)

    def unguarded(self) -> list[str]:
        """Which guards were written to."""
        buffers = {"region": self._regions, "values": self._values}
        return [
            f"{name} of rank {rank}"
            for name, of_ranks in buffers.items()
            for rank, buffer in enumerate(of_ranks)
            if (buffer[:GUARD] != POISON).any() or (buffer[-GUARD:] != POISON).any()
        ]
