"""From how many rows off the most loaded rank on a plan pays, measured at start-up on GPUs.

What a plan costs depends on the model, the group's links and the version of the kernels; what a row costs on the model
and the GPU. Both are timed with the layer's real operators and sizes, and the ranks take the largest of their answers.
A row's way to its rank and back is left out, so a plan is rather left out than made in vain.

On a CPU such a timing tells more of what else the machine does than of the plan: a constant serves there
(`config.ROWS_THAT_PAY_ON_CPU`).
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional

from ..plan.tokens import RoutedTokens
from .planner import LayerPlanner

TOKENS = 4096  # of a rank: a prefill chunk
ROWS = 4096  # of an expert's GEMM
REPEATS = 20
FP8_SPEED = 2  # of the experts' GEMMs in 8 bits, against bf16


class ExpertSizes(NamedTuple):
    """Of a layer's experts, which are gated."""

    hidden_size: int
    intermediate_size: int
    top_k: int = 1
    fp8: bool = False


def rows_that_pay(
    planner: LayerPlanner, sizes: ExpertSizes, device: torch.device, group: dist.ProcessGroup, launched: str = "waiting"
) -> int:
    """The same on all ranks. Collective. group: of the planner's ranks, on the host.

    launched: how plans are, `waiting` for the device behind each, since DeepEP's counts make the host wait in every
    layer; `ahead` of it; or as part of a `graph`.
    """
    plan_seconds, row_seconds = _plan_seconds(planner, sizes, device, launched), _row_seconds(sizes, device)
    rows = torch.tensor(_rounded(plan_seconds / row_seconds))
    dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=group)
    return int(rows)


def _rounded(rows: float) -> int:
    """Up to the next half octave, so that as a rule every start of a server comes to the same number, and answers do
    not change from start to start.
    """
    return math.ceil(2 ** (math.ceil(2 * math.log2(max(rows, 1))) / 2))


def _plan_seconds(planner: LayerPlanner, sizes: ExpertSizes, device: torch.device, launched: str) -> float:
    """Of a plan with its exchange."""
    logits = torch.randn(TOKENS, planner.plan.num_experts, dtype=torch.float32, device=device)
    logits[:, : planner.plan.num_experts // planner.plan.num_ranks] += 1  # over its bound: a plan that cuts is timed
    weights, ids = torch.softmax(logits, -1).topk(sizes.top_k)
    hidden = torch.randn(TOKENS, sizes.hidden_size, dtype=torch.bfloat16, device=device)
    segment = torch.arange(TOKENS, dtype=torch.int32, device=device) % 2 - 1

    tokens = RoutedTokens(hidden, ids, weights, logits, segment, 1)
    call: Callable[[], object] = partial(planner.plan, tokens, planner.exchange)
    if launched == "graph":
        call = _captured(call)
    return _fastest(call, device, in_a_row=1 if launched == "waiting" else 8)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call's launches as one; the call itself where they cannot be. Either meets the other ranks' alike."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
    except RuntimeError:
        return call
    return graph.replay


def _row_seconds(sizes: ExpertSizes, device: torch.device) -> float:
    """Of a row at its rank: copied to its expert, through it, and added up."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    shapes = ((ROWS, hidden), (2 * inner, hidden), (hidden, inner))
    tokens, up, down = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
    order = torch.randperm(ROWS, device=device)
    sums = torch.zeros_like(tokens)

    def experts() -> None:
        gate, value = functional.linear(tokens[order], up).chunk(2, dim=1)
        sums.index_add_(0, order, functional.linear(functional.silu(gate) * value, down))

    return _fastest(experts, device) / ROWS / (FP8_SPEED if sizes.fp8 else 1)


def _fastest(call: Callable[[], object], device: torch.device, in_a_row: int = 1) -> float:
    """Seconds of a call: the fastest of a few, or of a few times so many without a wait between."""
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        _wait(device)
        seconds.append((time.perf_counter() - start) / in_a_row)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
