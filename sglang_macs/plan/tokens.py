"""What a plan is given."""

from typing import NamedTuple

from torch import Tensor


class RoutedTokens(NamedTuple):
    """What one rank brings to one MoE layer: its tokens, and where the router sends them.

    hidden_states: [T, H]. topk_ids: [T, K] i32 or i64, -1 = empty slot. topk_weights: [T, K] f32. router_logits: [T, E]
    or None: nothing is re-routed. segment: [T] i32, -1 = text, otherwise below num_segments.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    router_logits: Tensor | None
    segment: Tensor
    num_segments: int
