"""DeepEP's low-latency buffer over the default process group, as SGLang makes it."""

from __future__ import annotations

import deep_ep
import torch.distributed as dist


def make_buffer(tokens: int, hidden_size: int, num_experts: int) -> deep_ep.Buffer:
    """For at most `tokens` of `hidden_size` a rank; the caller destroys it. Collective."""
    ranks = dist.get_world_size()
    return deep_ep.Buffer(
        dist.group.WORLD,
        num_rdma_bytes=deep_ep.Buffer.get_low_latency_rdma_size_hint(tokens, hidden_size, ranks, num_experts),
        low_latency_mode=True,
        num_qps_per_rank=num_experts // ranks,
        explicitly_destroy=True,
    )
