"""DeepEP's low-latency buffer over the default process group, as SGLang makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    import deep_ep


def make_buffer(tokens: int, hidden_size: int, num_experts: int) -> deep_ep.Buffer:
    """For at most `tokens` of `hidden_size` a rank; the caller destroys it. Collective."""
    import deep_ep

    ranks = dist.get_world_size()
    return deep_ep.Buffer(
        dist.group.WORLD,
        num_rdma_bytes=deep_ep.Buffer.get_low_latency_rdma_size_hint(tokens, hidden_size, ranks, num_experts),
        low_latency_mode=True,
        num_qps_per_rank=num_experts // ranks,
        explicitly_destroy=True,
    )


def most_tokens(ranks: int) -> int:
    """The most tokens per rank that DeepEP allows: 511 by its default queue depth, ranks * tokens a multiple of 4."""
    return next(tokens for tokens in range(511, 0, -1) if ranks * tokens % 4 == 0)
