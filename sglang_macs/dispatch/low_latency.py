"""DeepEP's low-latency interface, as SGLang drives it, over the fused dispatch.

The four steps of SGLang's low-latency implementation are wrapped on the instance, since SGLang checks classes. Every
batch goes through the fused kernels, decode inside captured graphs too: a planned one is planned by them, any other is
carried as it is routed. Which of these it is, all ranks of the group know alike.
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
    """A dispatch under way: what was sent, and the hint of rows that DeepEP would give."""

    topk_ids: Tensor
    topk_weights: Tensor
    expected_rows: int


class FusedLowLatency:
    """One layer's low-latency implementation, `impl`, with the fused dispatch in it.

    Args:
        impl: SGLang's; its dispatch_a, dispatch_b, combine_a and combine_b are replaced.
        transport: of the group, and of this half of a batch.
        planner: of the layer.
        make_output: SGLang's class for what a low-latency dispatch returns.
        note: told the rows of each local expert [E_l] of every dispatch, as SGLang's recorder of loads is.
    """

    def __init__(
        self,
        impl: Any,
        transport: FusedDispatch,
        planner: LayerPlanner,
        make_output: Callable[..., Any],
        note: Callable[[Tensor], object] = lambda received: None,
    ) -> None:
        self.impl, self.transport, self.planner = impl, transport, planner
        self.make_output, self.note = make_output, note
        self.in_halves = False  # the batch: work of its other half stands between two steps
        self._sent: _Sent | None = None
        for name in ("dispatch_a", "dispatch_b", "combine_a", "combine_b"):
            setattr(impl, name, partial(getattr(self, "_" + name), getattr(impl, name)))

    def takes(self) -> bool:
        """Whether the dispatch that comes now goes through the fused kernels: by the model and the flags alone, so that
        all ranks agree.
        """
        format = row_format(self.impl)
        return format is not None and self.transport.fits(format) and self.impl.overlap_args is None

    def plans(self) -> bool:
        """Whether the kernels plan it. Not where rows are left alone: they plan every row that they send; and not what
        only a plan in front can decide: that is carried as planned.
        """
        now = batch.current()
        by_kernels = not self.planner.plan.made_in_front
        return self.takes() and by_kernels and not now.skip and not now.leaves_alone

    def plan(self, tokens: RoutedTokens) -> PlanResult:
        """In place of `Plan.__call__`: the rows are on their way when it returns."""
        result = self.transport.send(
            self.planner.plan, self.planner.layer_id, self._format(), tokens, awaits=not self.in_halves
        )
        self._note(result.topk_ids, result.topk_weights)
        self.planner.counters.fused += 1
        return result

    def _format(self) -> str:
        format = row_format(self.impl)
        assert format is not None, "this dispatch `takes` nothing"
        return format

    def _note(self, topk_ids: Tensor, topk_weights: Tensor) -> None:
        experts, ranks = self.planner.plan.num_physical, self.planner.plan.num_ranks
        self._sent = _Sent(topk_ids, topk_weights, (topk_ids.numel() * ranks + experts) // experts)

    def _dispatch_a(self, original: Callable, hidden_states: Tensor, topk_output: Any) -> tuple:
        if self._sent is None and not self.takes():
            return original(hidden_states=hidden_states, topk_output=topk_output)
        if self._sent is None:
            self.transport.carry(
                self.planner.layer_id, self._format(), hidden_states, topk_output.topk_ids, awaits=not self.in_halves
            )
            self._note(topk_output.topk_ids, topk_output.topk_weights)
        return (self._sent,)

    def _dispatch_b(self, original: Callable, *state: Any) -> Any:
        sent = self._sent
        if sent is None:
            return original(*state)
        rows, scales, received = self.transport.receive()
        self.note(received)
        return self.make_output(rows, scales, sent.topk_ids, sent.topk_weights, received, sent.expected_rows)

    def _combine_a(self, original: Callable, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple:
        if self._sent is None:
            return original(hidden_states=hidden_states, topk_ids=topk_ids, topk_weights=topk_weights)
        if not self.in_halves:
            return (self.transport.combine(topk_ids, topk_weights, hidden_states),)
        self.transport.offer(hidden_states, topk_ids, topk_weights)
        return topk_ids, topk_weights

    def _combine_b(self, original: Callable, *state: Any) -> Tensor:
        if self._sent is None:
            return original(*state)
        self._sent = None
        return self.transport.combine(*state) if self.in_halves else state[0]
