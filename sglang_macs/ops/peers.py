"""Memory that ranks share, and sums over it in one launch."""

from typing import NamedTuple

from torch import Tensor

from .library import loaded
from .whole_plan import Peers


class PeerReduceLayout(NamedTuple):
    """Byte offsets into a rank's region of `peer_all_reduce` (csrc/include/macs/peer_all_reduce.h)."""

    status: int
    epochs: int
    inbox: int
    bytes: int


def peer_reduce_layout(num_ranks: int, size: int) -> PeerReduceLayout:
    """Where everything lies in the region of one of `num_ranks` that sum `size` numbers."""
    return PeerReduceLayout(*loaded.peer_reduce_layout(num_ranks, size))


def peer_all_reduce(peers: Peers, values: Tensor, hops: int = 0) -> None:
    """Sums [size] i32 values over the ranks in place, in one launch; sums wrap. Collective. On CUDA.

    hops: 1, every value to every peer; 2, over the rank that adds it up, whose bytes do not grow with the ranks; 0, by
    their number. The same on all ranks and in every call over these regions.

    Source: csrc/cuda/peer_all_reduce.cu.
    """
    loaded.peer_all_reduce(peers.region, peers.addresses, peers.rank, values, peers.timeout_ns, hops)


def allocate_shared(size: int) -> tuple[Tensor, Tensor]:
    """[size] u8 of the current device, zero-filled, and the handle [64] u8 with which other processes map it."""
    return loaded.allocate_shared(size)


def open_shared(handle: Tensor) -> int:
    """Address, on the current device, of what another process of this host allocated."""
    return loaded.open_shared(handle)
