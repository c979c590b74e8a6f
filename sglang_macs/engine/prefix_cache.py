"""`--macs-cache exact`: keys and values of a request that assignments were clipped of stay out of the prefix cache.

Each layer notes on the device whose tokens lost assignments. Behind the pass ranks that share a batch add that up, and
it follows the logits to the host, where it is read with the pass's results: before SGLang inserts what was prefilled.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe.backlog import to_host
from ..plan import clipped
from ..plan.batch import Batch
from . import worker
from .hooks import Hook


@dataclass(frozen=True)
class _Pass:
    """Requests of a pass, the tokens of each, and whose tokens were clipped, [tokens] bool on its way to the host."""

    reqs: list[Any]
    lengths: list[int]
    of_tokens: Tensor
    arrived: torch.cuda.Event | None

    def settle(self) -> None:
        """Keeps requests out of the prefix cache: what follows clipped tokens was computed from them, too."""
        if self.arrived is not None:
            self.arrived.synchronize()
        for req, kept_out in zip(self.reqs, clipped.requests(self.lengths, self.of_tokens), strict=True):
            if kept_out and not req.skip_radix_cache_insert:
                req.skip_radix_cache_insert = True
                worker.current().stats.uncached += 1


def end_pass(acts_on: Batch, forward_batch: Any, output: Any) -> None:
    """Behind a forward pass. Collective among the ranks that share its batch."""
    if acts_on.clipped is None:
        return
    from sglang.srt.runtime_context import get_parallel

    parallel, reqs = get_parallel(), forward_batch.macs_reqs
    attn_tp, tokens = (parallel.attn_tp_rank, parallel.attn_tp_size), sum(forward_batch.macs_lengths)

    def all_reduce(tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=parallel.attn_tp_group.device_group)

    of_tokens = acts_on.clipped.of_tokens(tokens, acts_on.halves, attn_tp, all_reduce)
    if of_tokens is None or not reqs:
        return
    on_host, arrived = to_host(of_tokens), None
    if of_tokens.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    output.logits_output.macs_clipped = _Pass(reqs, forward_batch.macs_lengths, on_host, arrived)


def settle(result: Any) -> None:
    """Before SGLang takes up the results of a pass."""
    found = getattr(getattr(result, "logits_output", None), "macs_clipped", None)
    if found is not None:
        found.settle()


def _stash_chunked_request(original, self, req):
    """AROUND Scheduler.stash_chunked_request: a chunk is not inserted before it is known what was clipped of it, which
    under the overlapped schedule is not yet so here. The last chunk inserts all.
    """
    if worker.current().config.cache != "exact":
        return original(self, req)
    before, req.skip_radix_cache_insert = req.skip_radix_cache_insert, True
    try:
        result = original(self, req)
    finally:
        req.skip_radix_cache_insert = before
    if hasattr(req, "prefix_indices"):  # in 0.5.21 the cache itself notes how far a request has come
        chunk = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.extend_range.end]
        req.prefix_indices = chunk.to(dtype=torch.int64, copy=True)
    return result


HOOKS = (Hook("sglang.srt.managers.scheduler.Scheduler.stash_chunked_request", _stash_chunked_request, "around"),)
