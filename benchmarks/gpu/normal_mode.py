"""DeepEP's normal mode, as SGLang calls it: its buffer, and its dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    import deep_ep


def make_buffer(hidden_size: int, group: dist.ProcessGroup) -> deep_ep.Buffer:
    """Between GPUs of one host, for rows of `hidden_size` in 16 bits. `destroy()` frees it."""
    import deep_ep

    ranks = group.size()
    configs = [kind(ranks) for kind in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)]
    size = max(config.get_nvl_buffer_size_hint(hidden_size * 2, ranks) for config in configs)
    return deep_ep.Buffer(group, num_nvl_bytes=size, explicitly_destroy=True)


def dispatch(
    buffer: deep_ep.Buffer, layout: tuple, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, **more: Any
) -> tuple:
    """layout: of `get_dispatch_layout(ids, ...)`. Returns tokens, ids, gates, rows per expert, handle and event."""
    per_rank, _, per_expert, in_rank, _ = layout
    return buffer.dispatch(
        hidden,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=ids,
        topk_weights=gates,
        **more,
    )
