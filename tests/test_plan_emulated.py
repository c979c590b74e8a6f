"""The plan's CUDA kernels on the emulated machine, against the CPU operators: integers to the bit.

`Launchers` takes what `sglang_macs.ops` takes. Outputs and scratch are poisoned and lie between red zones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reference import cases
from reference import kernels_c as c
from reference.peer_reduce_case import ReduceGroup
from sglang_macs import ops
from tests.support import emulated, operators
from tests.test_ops import APPLY, HISTOGRAM, SELECTIONS, THRESHOLD, USUAL, assert_selection, pick, selection_case

pytestmark = pytest.mark.emulated
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


@pytest.fixture(scope="module")
def launchers() -> Launchers:
    return build()


ENTROPY_INPUTS = {  # [T, H] and dtype, an instance of the kernel each
    "warp_per_row": ((5, 512), torch.bfloat16),
    "rows_of_256_vectors": ((3, 2048), torch.bfloat16),
    "block_per_row": ((3, 4096), torch.float16),
    "hidden_7168": ((2, 7168), torch.bfloat16),
    "any_size": ((5, 37), torch.float32),
    "f32": ((5, 64), torch.float32),
}


@pytest.mark.parametrize("name", ENTROPY_INPUTS)
def test_entropy_score(launchers: Launchers, name: str) -> None:
    shape, dtype = ENTROPY_INPUTS[name]
    hidden = (torch.randn(shape, generator=cases.generator(3)) * 3).to(dtype)
    segment = torch.zeros(shape[0], dtype=torch.int32)
    segment[1] = -1
    got = launchers.entropy_score(hidden, segment)
    torch.testing.assert_close(got, ops.entropy_score(hidden, segment), rtol=0, atol=1e-5)
    assert got[1] == 0


def weights_of(b: cases.Batch) -> torch.Tensor:
    return ops.entropy_weight(ops.entropy_score(b.hidden_states, b.segment), b.segment, b.num_segments, 1.0)


@pytest.mark.parametrize("name", cases.NAMED)
def test_entropy_weight(launchers: Launchers, name: str) -> None:
    b = cases.named(name).batches[0]
    inputs = ops.entropy_score(b.hidden_states, b.segment), b.segment, b.num_segments, 1.0
    torch.testing.assert_close(launchers.entropy_weight(*inputs), ops.entropy_weight(*inputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["expert", "rank"])
@pytest.mark.parametrize(("load", "reroute"), [("rows", "global"), ("effective", "local"), ("effective", "none")])
@pytest.mark.parametrize("name", sorted(set(cases.NAMED) - {"prefill"}))
def test_integers_equal_the_cpu_operators(launchers: Launchers, name: str, load: str, reroute: str, scope: str) -> None:
    """Each operator on the CPU's own input; two schedules each."""
    group, options = cases.named(name), USUAL | {"scope": scope, "load": load, "reroute": reroute}
    b = group.batches[0]
    routing = b.topk_ids, b.topk_weights, weights_of(b), b.segment
    counted = pick(options, HISTOGRAM, num_experts=group.num_experts)
    ordered = pick(options, THRESHOLD, num_ranks=group.num_ranks)
    applied = pick(options, APPLY, num_ranks=group.num_ranks, scoring=group.scoring)
    histogram = operators.load_histogram(*routing, **counted)
    shift, cut = operators.clip_threshold(histogram, histogram, group.modality, **ordered)
    inputs = (*routing, b.router_logits, shift, cut, group.selection(b))
    want = [histogram, shift, cut, *operators.clip_apply(*inputs, **applied)]
    for seed in range(2):
        launchers.library.configure(seed)
        got = [
            launchers.load_histogram(*routing, **counted),
            *launchers.clip_threshold(histogram, histogram, group.modality, **ordered),
            *launchers.clip_apply(*inputs, **applied),
        ]
        for mine, expected in zip(got, want, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6 if mine.is_floating_point() else 0, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_score(launchers: Launchers, name: str, dtype: torch.dtype) -> None:
    logits, *routing = selection_case(name)
    logits = logits.to(dtype)
    assert_selection(launchers.selection_score(logits, *routing), ops.selection_score(logits, *routing))


def test_selection_score_of_1024_experts(launchers: Launchers) -> None:
    gen = cases.generator(4)
    logits, bias = torch.randn(5, 1024, generator=gen), torch.randn(1024, generator=gen)
    routing = logits, bias, "sigmoid", 64, 9
    assert_selection(launchers.selection_score(*routing), ops.selection_score(*routing))
    with pytest.raises(emulated.Failure):
        launchers.selection_score(logits.repeat(1, 2), bias.repeat(2), "sigmoid", 1, 1)


@pytest.mark.parametrize("load", ["rows", "effective"])
@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (192, 4), (320, 4), (512, 10), (896, 16)])
def test_a_selection_orders_candidates_whatever_their_logits(
    launchers: Launchers, experts: int, top_k: int, load: str
) -> None:
    """One of each instance of the kernel, in the two fused launchers; the last are Qwen3.5's and Kimi K3's sizes."""
    gen = cases.generator(experts)
    shape = cases.NAMED["imbalanced"] | {"num_tokens": 12, "num_experts": experts, "scoring": "sigmoid", "top_k": top_k}
    routing = cases.routing(gen, experts, "sigmoid", biased=True, groups=(8, 4))
    group = cases.Group([cases.batch(gen, **shape)], experts, 4, torch.zeros(experts, dtype=torch.int8), routing)
    options = USUAL | {"load": load, "num_ranks": 4, "scoring": "sigmoid", "importance": "gate", "buckets": 32}
    got, (b,) = launchers.plan(group, options, scored=False), group.batches
    inputs = b.topk_ids, b.topk_weights, got["weight"], b.segment, b.router_logits, got["shift"], got["cut"]
    applied = pick(options, APPLY, num_ranks=4, scoring="sigmoid")
    ids, weights, counts = operators.clip_apply(*inputs, group.selection(b), **applied)
    assert torch.equal(got["ids"], ids) and torch.equal(got["counts"], counts)
    torch.testing.assert_close(got["weights"], weights, rtol=1e-6, atol=0)
    assert not torch.equal(ids, operators.clip_apply(*inputs, **applied)[0]), "the logits' order would do"


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


@pytest.mark.parametrize("options", FUSED_CASES.values(), ids=FUSED_CASES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 24])
def test_fused_launchers_give_the_operators_bits(tokens: int, options: dict[str, Any], launchers: Launchers) -> None:
    """A grid has a warp a token, and no fewer blocks than ranks: most of them have nothing to do here."""
    group, options = first_tokens(small_group(), tokens), USUAL | options
    want = one_by_one(launchers, group, options)
    for seed in range(2):
        launchers.library.configure(seed)
        before = launchers.library.launches
        got = launchers.plan(group, options | {"num_ranks": group.num_ranks, "scoring": group.scoring})
        assert launchers.library.launches - before == (4 if tokens > 0 else 2)  # nothing to score or to count
        assert_same_bits(got, want)
    assert want["counts"][:2].sum() == group.batches[0].topk_ids.ge(0).sum()
    assert want["counts"][1].sum() > 0 or tokens < 17, "something has to move"


def test_a_device_without_clusters_gives_the_same_bits(launchers: Launchers) -> None:
    got = one_by_one(build(max_cluster=1), small_group(), USUAL)
    assert_same_bits(got, one_by_one(launchers, small_group(), USUAL))


@pytest.mark.parametrize("options", FUSED_CASES.values(), ids=FUSED_CASES)
def test_the_second_launcher_leaves_the_workspace_prepared(options: dict, launchers: Launchers) -> None:
    """Nothing that it says the first time passes for what it says the second."""
    group = small_group(seed=7, tokens=40)
    options = USUAL | options | {"num_ranks": group.num_ranks, "scoring": group.scoring}
    once, want = (one_by_one(launchers, group, options | {"gamma": gamma}) for gamma in (1.3, 0.8))
    assert not torch.equal(once["cut"], want["cut"])
    for seed in range(4):
        launchers.library.configure(seed)
        assert_same_bits(launchers.plan(group, options | {"gamma": 1.3}, then_gamma=0.8), want)


@pytest.mark.parametrize("top_k", [3, 4], ids=["slots_in_turn", "halves"])
def test_of_equal_gates_the_first_is_referred_to(launchers: Launchers, top_k: int) -> None:
    """A token's gates are equal, its logits are not: what a re-routed expert weighs says whose logit was taken."""
    group = small_group(seed=9, top_k=top_k)
    b = replace(group.batches[0], topk_weights=torch.full_like(group.batches[0].topk_weights, 0.25))
    group = replace(group, batches=[b])
    got = one_by_one(launchers, group, USUAL)
    routing = b.topk_ids, b.topk_weights, got["weight"], b.segment, b.router_logits, got["shift"], got["cut"]
    ids, weights, counts = operators.clip_apply(*routing, **pick(USUAL, APPLY, num_ranks=4, scoring=group.scoring))
    assert counts[2].sum() > 3 and torch.equal(got["ids"], ids)
    torch.testing.assert_close(got["weights"], weights, rtol=1e-6, atol=0)
    assert_same_bits(launchers.plan(group, USUAL | {"num_ranks": 4, "scoring": group.scoring}), got)


@pytest.mark.parametrize("scope", FUSED_CASES)
def test_fused_launchers_without_scores(launchers: Launchers, scope: str) -> None:
    """Where only gates matter no hidden vector is read: visual tokens weigh 0.5, else the bits are the operators'."""
    b = cases.batch(cases.generator(6), **(cases.NAMED["imbalanced"] | {"num_tokens": 24}))
    group = cases.Group([b], 16, 4, torch.arange(16).remainder(3).sub(1).to(torch.int8))
    options = USUAL | FUSED_CASES[scope] | {"importance": "gate"}
    weight = torch.where(b.segment < 0, 1.0, 0.5)
    routing = b.topk_ids, b.topk_weights, weight, b.segment
    own = operators.load_histogram(*routing, **pick(options, HISTOGRAM, num_experts=16))
    shift, cut = operators.clip_threshold(own, own, group.modality, **pick(options, THRESHOLD, num_ranks=4))
    applied = pick(options, APPLY, num_ranks=4, scoring=group.scoring)
    ids, weights, counts = operators.clip_apply(*routing, b.router_logits, shift, cut, **applied)
    want = {"weight": weight, "histogram": own, "shift": shift, "cut": cut, "counts": counts, "ids": ids}
    for seed in range(2):
        launchers.library.configure(seed)
        before = launchers.library.launches
        got = launchers.plan(group, options | {"num_ranks": 4, "scoring": group.scoring}, scored=False)
        assert launchers.library.launches - before == 3
        torch.testing.assert_close(got["weights"], weights, rtol=1e-6, atol=0)
        for name, expected in want.items():
            assert torch.equal(got[name], expected), name
        assert (got["entropy"].view(torch.uint8) == POISON).all()
    assert counts[1].sum() > 0 and (b.segment < 0).any() and (b.segment >= 0).any()


def peer_group(logits: torch.dtype) -> cases.Group:
    """Two ranks' batches, one of them hot."""
    shape = cases.NAMED["imbalanced"] | {"num_tokens": 24, "num_ranks": 2}
    batches = [cases.batch(cases.generator(seed), **shape | {"imbalance": 1.8 - seed / 2}) for seed in range(2)]
    batches = [replace(b, router_logits=b.router_logits.to(logits)) for b in batches]
    return cases.Group(batches, 16, 2, torch.arange(16).remainder(3).sub(1).to(torch.int8))


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", FUSED_CASES)
def test_a_plan_with_its_exchange_over_peers(launchers: Launchers, scope: str, logits: torch.dtype) -> None:
    """Every rank's chain of launches on a stream of its own; logits as the router has them."""
    group = peer_group(logits)
    options = USUAL | FUSED_CASES[scope] | {"importance": "gate", "buckets": 32, "gamma": 1.05}
    options |= {"num_ranks": 2, "scoring": group.scoring}
    weights = [torch.where(b.segment < 0, 1.0, 0.5) for b in group.batches]
    routings = [(b.topk_ids, b.topk_weights, w, b.segment) for b, w in zip(group.batches, weights, strict=True)]
    own = [operators.load_histogram(*r, **pick(options, HISTOGRAM, num_experts=16)) for r in routings]
    total = torch.stack(own).sum(0, dtype=torch.int32)
    moved = 0
    for seed in range(2):
        launchers.library.configure(seed)
        before = launchers.library.launches
        results = launchers.plans(group, options, scored=False)
        assert launchers.library.launches - before == 2 * 4
        for b, routing, histogram, got in zip(group.batches, routings, own, results, strict=True):
            shift, cut = operators.clip_threshold(
                histogram, total, group.modality, **pick(options, THRESHOLD, num_ranks=2)
            )
            applied = pick(options, APPLY, num_ranks=2, scoring=group.scoring)
            ids, gates, counts = operators.clip_apply(*routing, b.router_logits.float(), shift, cut, **applied)
            want = {"histogram": histogram, "group": total, "shift": shift, "cut": cut, "ids": ids, "counts": counts}
            for name, expected in want.items():
                assert torch.equal(got[name], expected), name
            torch.testing.assert_close(got["weights"], gates, rtol=1e-6, atol=0)
            moved += counts[2].sum()
    assert moved > 0, "something has to find another expert"
