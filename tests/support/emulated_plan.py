"""The plan's CUDA kernels on the emulated machine, called as `sglang_macs.ops` is.

Outputs and scratch are poisoned and lie between red zones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from reference import cases
from reference import kernels_c as c
from reference.peer_reduce_case import ReduceGroup
from sglang_macs import ops
from tests.support import emulated
from tests.support.operator_cases import (
    APPLY,
    HISTOGRAM,
    THRESHOLD,
    pick,
)

POISON, ZONE = 0x7F, 256  # bytes


class Buffer:
    """A tensor of poison between two red zones."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        bytes_ = torch.Size(shape).numel() * dtype.itemsize
        room = (bytes_ + ZONE - 1) // ZONE * ZONE
        self.memory = torch.full((ZONE + room + ZONE + ZONE,), POISON, dtype=torch.uint8)
        first = -self.memory.data_ptr() % ZONE + ZONE  # cudaMalloc's alignment
        self.tensor = self.memory[first : first + bytes_].view(dtype).view(shape)
        self.outside = torch.cat([torch.arange(first), torch.arange(first + bytes_, len(self.memory))])

    def check(self) -> torch.Tensor:
        """The tensor, if nothing was written beside it."""
        assert (self.memory[self.outside] == POISON).all(), "written outside of a buffer"
        return self.tensor


class Launchers:
    """The operators by their CUDA launchers."""

    def __init__(self, library: emulated.Library) -> None:
        self.library = library
        library.cdll.macs_plan_workspace_bytes.restype = library.cdll.macs_entropy_weight_workspace_bytes.restype = (
            c.ctypes.c_size_t
        )

    def entropy_score(self, hidden: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        entropy = Buffer(segment.shape, torch.float32)
        self.library("macs_entropy_score", score_params(hidden, segment, entropy.tensor))
        return entropy.check()

    def entropy_weight(self, entropy: torch.Tensor, segment: torch.Tensor, segments: int, delta: float) -> torch.Tensor:
        weight = Buffer(segment.shape, torch.float32)
        params = weight_params(entropy, segment, weight.tensor, segments, delta)
        scratch = Buffer((self.library.cdll.macs_entropy_weight_workspace_bytes(c.ctypes.byref(params)),), torch.uint8)
        self.library("macs_entropy_weight", params, scratch.tensor)
        scratch.check()
        return weight.check()

    def load_histogram(self, *routing: torch.Tensor, num_experts: int, **options: Any) -> torch.Tensor:
        out = Buffer((num_experts * 2 * options["buckets"] + 4,), torch.int32)
        in_ = assignments(*routing, num_experts, options)
        self.library("macs_load_histogram", c.LoadHistogramParams(in_, out.tensor.data_ptr()))
        return out.check()

    def clip_threshold(
        self, own: torch.Tensor, group: torch.Tensor, modality: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        experts, ranks = len(modality), options["num_ranks"]
        shift = Buffer((experts,), torch.int32)
        cut = Buffer((experts if options["scope"] == "expert" else ranks, 4), torch.int32)
        self.library("macs_clip_threshold", threshold_params(own, group, modality, shift.tensor, cut.tensor, options))
        return shift.check(), cut.check()

    def clip_apply(self, *inputs: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        ids, experts = inputs[0], len(inputs[5])
        outputs = [Buffer(ids.shape, ids.dtype), Buffer(ids.shape, torch.float32), Buffer((3, experts, 2), torch.int32)]
        params = apply_params(inputs, [o.tensor for o in outputs], options)
        scratch = Buffer((self.plan_bytes(weight_params(*[None] * 3, 0, 1.0), params),), torch.uint8)
        self.library("macs_clip_apply", params, scratch.tensor)
        scratch.check()
        return tuple(o.check() for o in outputs)

    def selection_score(
        self, logits: torch.Tensor, bias: torch.Tensor | None, scoring: str, groups: int, taken: int
    ) -> torch.Tensor:
        out = Buffer(logits.shape, torch.float32)
        sizes = *logits.shape, groups, taken, c.SCORINGS.index(scoring), dtype_index(logits)
        self.library(
            "macs_selection_score", c.SelectionScoreParams(address(logits), address(bias), address(out.tensor), *sizes)
        )
        return out.check()

    def plan(
        self, group: cases.Group, options: dict[str, Any], scored: bool = True, then_gamma: float | None = None
    ) -> dict[str, torch.Tensor]:
        """All of it by the two fused launchers, without an exchange; not `scored`: as where entropies do not matter.
        then_gamma: the second launcher once more, with that gamma, on the same workspace.
        """
        run = RankPlan(self, group, 0, options, scored)
        with self.library.together():
            run.before()
            run.behind()
        if then_gamma is not None:
            for name in ("shift", "cut", "counts", "weights", "ids"):
                run.out[name].view(torch.uint8).fill_(POISON)
            run.threshold.policy.gamma = then_gamma
            run.behind()
        return run.check()

    def plans(self, group: cases.Group, options: dict[str, Any], scored: bool) -> list[dict[str, torch.Tensor]]:
        """Of all ranks at once, a stream each, with the exchange over peers' memory between the two launchers."""
        runs = [RankPlan(self, group, rank, options, scored, exchanged=True) for rank in range(group.num_ranks)]
        reduce = ReduceGroup(emulated.Kernels(self.library), group.num_ranks, runs[0].out["group"].numel(), "cpu")
        with self.library.together():
            for rank, run in enumerate(runs):
                params = reduce.params(rank)
                params.values, params.sum = address(run.out["histogram"]), address(run.out["group"])
                run.before(rank + 1)
                self.library("macs_peer_all_reduce", params, stream=rank + 1)
                run.behind(rank + 1)
        assert not reduce.unguarded() and all(reduce.status(rank).fault == 0 for rank in range(group.num_ranks))
        return [run.check() for run in runs]

    def plan_bytes(self, weight: Any, apply: Any) -> int:
        return self.library.cdll.macs_plan_workspace_bytes(c.ctypes.byref(weight), c.ctypes.byref(apply))


class RankPlan:
    """A rank's buffers and parameters for the fused launchers. exchanged: `group` has a buffer of its own."""

    def __init__(
        self,
        launchers: Launchers,
        group: cases.Group,
        rank: int,
        options: dict[str, Any],
        scored: bool,
        exchanged: bool = False,
    ) -> None:
        self.library, b, experts = launchers.library, group.batches[rank], group.num_experts
        tokens, bounds = len(b.segment), experts if options["scope"] == "expert" else group.num_ranks
        cells = experts * 2 * options["buckets"] + 4
        shapes = {"entropy": (tokens,), "weight": (tokens,), "histogram": (cells,), "weights": b.topk_ids.shape}
        shapes |= {"shift": (experts,), "cut": (bounds, 4), "counts": (3, experts, 2)}
        shapes |= {"group": (cells,)} if exchanged else {}
        floats = ("entropy", "weight", "weights")
        self.buffers = {n: Buffer(shape, torch.float32 if n in floats else torch.int32) for n, shape in shapes.items()}
        self.buffers["ids"] = Buffer(b.topk_ids.shape, b.topk_ids.dtype)
        self.out = out = {name: buffer.tensor for name, buffer in self.buffers.items()}
        self.score = score_params(b.hidden_states, b.segment, out["entropy"])
        if not scored:
            self.score.hidden_states = self.score.entropy = None
        self.weight = weight_params(out["entropy"], b.segment, out["weight"], b.num_segments, 1.0)
        routing = b.topk_ids, b.topk_weights, out["weight"], b.segment
        self.histogram = c.LoadHistogramParams(assignments(*routing, experts, options), address(out["histogram"]))
        histograms = out["histogram"], out["group" if exchanged else "histogram"]
        self.modality = group.modality  # read when the launches run
        self.threshold = threshold_params(*histograms, self.modality, out["shift"], out["cut"], options)
        self.logits = b.router_logits
        self.selection = group.selection(b)
        inputs = (*routing, self.logits, out["shift"], out["cut"], self.selection)
        self.apply = apply_params(inputs, [out[n] for n in ("ids", "weights", "counts")], options)
        self.scratch = Buffer((launchers.plan_bytes(self.weight, self.apply),), torch.uint8)

    def before(self, stream: int = 0) -> None:
        params = self.score, self.weight, self.histogram, self.scratch.tensor
        self.library("macs_score_histogram", *params, stream=stream)

    def behind(self, stream: int = 0) -> None:
        self.library("macs_threshold_apply", self.threshold, self.apply, self.scratch.tensor, stream=stream)

    def check(self) -> dict[str, torch.Tensor]:
        self.scratch.check()
        return {name: buffer.check() for name, buffer in self.buffers.items()}


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def dtype_index(tensor: torch.Tensor) -> int:
    return c.DTYPES.index(str(tensor.dtype).removeprefix("torch."))


def score_params(hidden: torch.Tensor, segment: torch.Tensor, entropy: torch.Tensor) -> Any:
    tensors = address(hidden), address(segment), address(entropy)
    return c.EntropyScoreParams(*tensors, *hidden.shape, dtype_index(hidden))


def weight_params(entropy: Any, segment: Any, weight: Any, segments: int, delta: float) -> Any:
    tokens = 0 if segment is None else len(segment)
    return c.EntropyWeightParams(address(entropy), address(segment), address(weight), tokens, segments, delta)


def policy(options: dict, experts: int) -> c.Policy:
    own = {name: value for name, value in options.items() if name != "buckets"}
    return c.policy(**own | {"num_experts": experts, "bucket_bits": options["buckets"].bit_length() - 5})


def assignments(ids: torch.Tensor, gates: Any, weight: Any, segment: Any, experts: int, options: dict) -> Any:
    tensors = map(address, (ids, gates, weight, segment))
    return c.Assignments(*tensors, *ids.shape, ids.dtype == torch.int64, policy(options, experts))


def threshold_params(own: Any, group: Any, modality: torch.Tensor, shift: Any, cut: Any, options: dict) -> Any:
    return c.ClipThresholdParams(*map(address, (own, group, modality, shift, cut)), policy(options, len(modality)))


def apply_params(inputs: tuple[Any, ...], outputs: list[torch.Tensor], options: dict) -> Any:
    *routing, logits, shift, cut = inputs[:7]
    selection = inputs[7] if len(inputs) > 7 else None
    tensors, in_ = map(address, (logits, shift, cut, *outputs)), assignments(*routing, len(shift), options)
    return c.ClipApplyParams(in_, *tensors, dtype_index(logits), address(selection))


def build(**device: int) -> Launchers:
    return Launchers(emulated.build("plan", *sorted(emulated.CUDA.glob("*.cu")), defines=["MACS_C_API"], **device))


def weights_of(b: cases.Batch) -> torch.Tensor:
    return ops.entropy_weight(ops.entropy_score(b.hidden_states, b.segment), b.segment, b.num_segments, 1.0)


def one_by_one(launchers: Launchers, group: cases.Group, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `Launchers.plan` returns, by the five operators' own launchers."""
    b = group.batches[0]
    entropy = launchers.entropy_score(b.hidden_states, b.segment)
    weight = launchers.entropy_weight(entropy, b.segment, b.num_segments, 1.0)
    routing = b.topk_ids, b.topk_weights, weight, b.segment
    own = launchers.load_histogram(*routing, **pick(options, HISTOGRAM, num_experts=group.num_experts))
    shift, cut = launchers.clip_threshold(
        own, own, group.modality, **pick(options, THRESHOLD, num_ranks=group.num_ranks)
    )
    applied = pick(options, APPLY, num_ranks=group.num_ranks, scoring=group.scoring)
    ids, weights, counts = launchers.clip_apply(*routing, b.router_logits, shift, cut, group.selection(b), **applied)
    names = ("entropy", "weight", "histogram", "shift", "cut", "counts", "weights", "ids")
    return dict(zip(names, (entropy, weight, own, shift, cut, counts, weights, ids), strict=True))


def small_group(seed: int = 5, tokens: int = 24, **changes: Any) -> cases.Group:
    """One rank's batch in bfloat16, with something to move."""
    shape = cases.NAMED["imbalanced"] | {"hidden_size": 2048, "num_tokens": tokens} | changes
    b = cases.batch(cases.generator(seed), **shape)
    b = replace(b, hidden_states=b.hidden_states.bfloat16())
    return cases.Group([b], 16, 4, torch.arange(16).remainder(3).sub(1).to(torch.int8))


def first_tokens(group: cases.Group, tokens: int) -> cases.Group:
    (b,) = group.batches
    parts = {name: value[:tokens] for name, value in vars(b).items() if isinstance(value, torch.Tensor)}
    return replace(group, batches=[replace(b, **parts)])


def assert_same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, tensor in got.items():
        assert torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)), name


FUSED_CASES = {
    "rank": {"scope": "rank", "load": "rows", "reroute": "global"},
    "expert": {"scope": "expert", "load": "effective", "reroute": "local"},
}


def peer_group(logits: torch.dtype) -> cases.Group:
    """Two ranks' batches, one of them hot."""
    shape = cases.NAMED["imbalanced"] | {"num_tokens": 24, "num_ranks": 2}
    batches = [cases.batch(cases.generator(seed), **shape | {"imbalance": 1.8 - seed / 2}) for seed in range(2)]
    batches = [replace(b, router_logits=b.router_logits.to(logits)) for b in batches]
    return cases.Group(batches, 16, 2, torch.arange(16).remainder(3).sub(1).to(torch.int8))
