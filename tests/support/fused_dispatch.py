"""For tests of the fused dispatch on a CPU: sizes of a group, and a dispatch with memory of its own."""

import torch

from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.fused import FusedDispatch, Sizes

SIZES = Sizes(num_ranks=2, num_experts=8, top_k=2, max_tokens=64, hidden_size=2048)
MEDIUM = Sizes(num_ranks=8, num_experts=128, top_k=8, max_tokens=128, hidden_size=2048)


def dispatch_of(rank: int = 0) -> FusedDispatch:
    """Before its first dispatch; no other rank can be reached."""
    memory = torch.zeros(FusedDispatch.region_bytes(SIZES, 4), dtype=torch.uint8)
    return FusedDispatch(MacsConfig(), SIZES, PeerMemory(rank, memory, [0, 0]), 4)
