"""DeepEP's low-latency interface, as SGLang drives it, over the fused dispatch.

The four steps of SGLang's low-latency implementation are wrapped on the instance, since SGLang checks classes. A batch
that MACS plans goes through the fused kernels, any other through DeepEP as before: decode graphs stay as they were
captured, and the region need hold no more than the bound lets through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..plan import batch
from ..plan.plan import PlanResult
from ..plan.tokens import RoutedTokens
from .fused import FusedDispatch
from .planner import LayerPlanner
from .transport import row_format


@dataclass(frozen=True)
class _Sent:
    """A dispatch under way: what was planned, and the hint of rows that DeepEP would give."""

    result: PlanResult
    expected_rows: int


class FusedLowLatency:
    """One layer's low-latency implementation, `impl`, with the fused dispatch in it.

    Args:
        impl: SGLang's; its dispatch_a, dispatch_b, combine_a and combine_b are replaced.
        transport: of the group, and of this half of a batch.
        planner: of the layer.
        make_output: SGLang's class for what a low-latency dispatch returns.
    """

    def __init__(
        self, impl: Any, transport: FusedDispatch, planner: LayerPlanner, make_output: Callable[..., Any]
    ) -> None:
        self.impl, self.transport, self.planner, self.make_output = impl, transport, planner, make_output
        self._sent: _Sent | None = None
        for name in ("dispatch_a", "dispatch_b", "combine_a", "combine_b"):
            setattr(impl, name, partial(getattr(self, "_" + name), getattr(impl, name)))

    def takes(self) -> bool:
        """Whether the dispatch that comes now goes through the fused kernels: agreed on by all ranks of the group.

        Not where rows are left alone: the kernel plans every row that it sends.
        """
        now = batch.current()
        planned = not now.skip and not now.leaves_alone
        return planned and row_format(self.impl) is not None and self.impl.overlap_args is None

    def plan(self, tokens: RoutedTokens) -> PlanResult:
        """In place of `Plan.__call__`: the rows are on their way when it returns."""
        format = row_format(self.impl)
        assert format is not None, "this dispatch `takes` nothing"
        result = self.transport.send(self.planner.plan, self.planner.layer_id, format, tokens)
        experts = self.planner.plan.num_experts
        assignments = tokens.topk_ids.numel() * self.planner.plan.num_ranks
        self._sent = _Sent(result, (assignments + experts) // experts)
        self.planner.counters.fused += 1
        return result

    def _dispatch_a(self, original: Callable, hidden_states: Tensor, topk_output: Any) -> tuple:
        if self._sent is None:
            return original(hidden_states=hidden_states, topk_output=topk_output)
        return (self._sent,)

    def _dispatch_b(self, original: Callable, *state: Any) -> Any:
        if self._sent is None:
            return original(*state)
        rows, scales, received = self.transport.receive()
        result = self._sent.result
        return self.make_output(rows, scales, result.topk_ids, result.topk_weights, received, self._sent.expected_rows)

    def _combine_a(self, original: Callable, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple:
        if self._sent is None:
            return original(hidden_states=hidden_states, topk_ids=topk_ids, topk_weights=topk_weights)
        self.transport.offer(hidden_states, topk_ids, topk_weights)
        return topk_ids, topk_weights

    def _combine_b(self, original: Callable, *state: Any) -> Tensor:
        if self._sent is None:
            return original(*state)
        self._sent = None
        return self.transport.combine(*state)
