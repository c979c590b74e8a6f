"""DeepEP V2 without a count on the host: its expanded layout, cut to the rows that the plan's bound leaves.

An `ElasticBuffer` that is not asked for a count makes room for the worst case that its capacity allows. Rows lie by
expert, each expert's from a multiple of 128 on, and the ends of the experts' rows are on the device: DeepGEMM reads
them there. So all that has to be known on the host is how many rows the experts' buffers need, which the bound says
(docs/design/between_nodes.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from . import bounded
from .bounded import TILE, BoundedDispatch, Room, Sizes
from .planner import LayerPlanner


def capacity(sizes: Sizes, tokens_per_rank: int) -> int:
    """Rows of an uncounted dispatch's buffer: every rank's tokens to as many of this rank's experts as they can."""
    worst = sizes.num_ranks * tokens_per_rank * min(sizes.top_k, sizes.local)
    return worst + sizes.local * (TILE - 1)


class BoundedV2:
    """One layer's V2 implementation, `impl`, whose prefills are dispatched without a count.

    Args:
        impl: SGLang's; its dispatch and _get_buffer are replaced.
        shared: of the process: bounds of batches, and what is said in the log.
        planner: of the layer.
        sizes: of the layer.
        prefills: whether any rank of the group prefills in this pass: the same on all ranks. Decode counts nothing.
        make_output: (SGLang's output) -> what the runner gets.
    """

    def __init__(
        self,
        impl: Any,
        shared: BoundedDispatch,
        planner: LayerPlanner,
        sizes: Sizes,
        prefills: Callable[[], bool],
        make_output: Callable[[Any], Any],
    ) -> None:
        self.impl, self.shared, self.planner, self.sizes = impl, shared, planner, sizes
        self.prefills, self.make_output = prefills, make_output
        shared.join(sizes, planner.attn_tp[1])
        self._room: Room | None = None  # of the dispatch that is being made
        self._own_buffer = impl._get_buffer
        impl._get_buffer = self._get_buffer
        impl.dispatch = partial(self._dispatch, impl.dispatch)

    def room(self) -> Room | None:
        """For the batch that is running, or None: DeepEP counts. The same on all ranks."""
        attn_tp_size = self.planner.attn_tp[1]
        found = self.shared.room(self.sizes, attn_tp_size, self._format(), 1, self.planner.plans())
        return None if found is None or self._is_too_large() else found

    def _format(self) -> str | None:
        """Of the rows; None: one that is left to SGLang."""
        impl = self.impl
        if not impl._prefill_expand_enabled or impl.activation_scale_block_size != TILE:
            return None
        return "fp8" if impl.use_fp8_dispatch else "bf16"

    def _is_too_large(self) -> bool:
        """Whether the worst case would take more memory than any buffer may have beyond the mean load."""
        tokens = self.impl.num_max_dispatch_tokens_per_rank
        rows = capacity(self.sizes, tokens)
        return bounded.spare_bytes(self.sizes, self.sizes.num_ranks * tokens, rows) > bounded.SPARE_BYTES

    def _get_buffer(self) -> Any:
        buffer = self._own_buffer()
        if self._room is None:
            return buffer
        return SimpleNamespace(dispatch=partial(self._uncounted, buffer.dispatch))

    def _dispatch(self, original: Callable, hidden_states: Tensor, topk_output: Any) -> Any:
        """AROUND dispatch of SGLang's implementation."""
        found = self.room() if self.prefills() else None
        if found is None:
            return original(hidden_states, topk_output)
        self._room = found
        try:
            output = original(hidden_states, topk_output)
        finally:
            self._room = None
        self.planner.count_bounded()
        return self.make_output(output)

    def _uncounted(self, dispatch: Callable, x: Any, **given: Any) -> tuple:
        """`ElasticBuffer.dispatch` with no count, its rows cut to the bound."""
        if self.impl._pad_empty_combine:
            # For a count, SGLang gives an idle rank a row of zeros, behind the plan: rows that no bound speaks of.
            x = tuple(part[:0] for part in x) if isinstance(x, tuple) else x[:0]
            given |= {name: given[name][:0] for name in ("topk_idx", "topk_weights")}
        received, ids, weights, handle, event = dispatch(x, **{**given, "do_cpu_sync": False})
        assert self._room is not None
        rows = self._room.rows
        cut = tuple(part[:rows] for part in received) if isinstance(received, tuple) else received[:rows]
        return cut, ids, weights[:rows], handle, event
