"""A plan with replicas by the CUDA kernels on the emulated machine, against the CPU's: integers to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import cases, replica_cases
from reference import kernels_c as c
from reference.replica_cases import ReplicaGroup
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan, PlanResult
from tests.test_plan_emulated import (
    Buffer,
    Launchers,
    address,
    apply_params,
    assignments,
    build,
    score_params,
    threshold_params,
    weight_params,
)
from tests.test_replicas import plans

NAMES = ("scope", "load", "importance", "reroute", "protect_text", "buckets", "reroute_rounds", "gamma", "rho", "alpha",
         "c_min")  # fmt: skip


@pytest.fixture(scope="module")
def launchers() -> Launchers:
    return build()


class ReplicaPlan:
    """One rank's buffers and parameters for the two launchers; as `test_plan_emulated.RankPlan`."""

    def __init__(self, launchers: Launchers, plan: Plan, b: cases.Batch) -> None:
        self.library, self.plan, places = launchers.library, plan, plan.places
        experts, ranks, tokens = plan.num_experts, plan.num_ranks, len(b.segment)
        options = {name: getattr(plan.config, name) for name in NAMES}
        options |= {"num_ranks": ranks, "scoring": plan.routing.scoring}
        size = plan.histogram_size
        shapes = {"entropy": (tokens,), "weight": (tokens,), "own": (size,), "group": (size,), "shift": (experts,)}
        shapes |= {"cut": (ranks, 4), "counts": (4, experts, 2), "weights": b.topk_ids.shape, "rank_rows": (2, ranks)}
        floats = ("entropy", "weight", "weights")
        self.buffers = {n: Buffer(shape, torch.float32 if n in floats else torch.int32) for n, shape in shapes.items()}
        self.buffers["ids"] = Buffer(b.topk_ids.shape, b.topk_ids.dtype)
        self.out = out = {name: buffer.tensor for name, buffer in self.buffers.items()}
        self.table = places.table(torch.device("cpu"))
        self.places = c.Places(address(self.table), places.num_experts, places.num_physical, places.num_ranks)
        self.score = score_params(b.hidden_states, b.segment, out["entropy"])
        if not plan._needs_entropy:
            self.score.hidden_states = self.score.entropy = None
        delta = plan.config.delta
        self.weight = weight_params(out["entropy"], b.segment, out["weight"], b.num_segments, delta)
        routing = b.topk_ids, b.topk_weights, out["weight"], b.segment
        self.histogram = c.LoadHistogramParams(assignments(*routing, experts, options), address(out["own"]))
        self.given, self.modality, self.options = (routing, b), plan.modality, options
        self.scratch: Buffer | None = None
        self._set("group")

    def _set(self, group: str) -> None:
        (routing, b), out = self.given, self.out
        self.threshold = threshold_params(out["own"], out[group], self.modality, out["shift"], out["cut"], self.options)
        self.selection = self.plan._selection(b.router_logits)
        inputs = (*routing, b.router_logits, out["shift"], out["cut"], self.selection)
        self.apply = apply_params(inputs, [out[n] for n in ("ids", "weights", "counts")], self.options)

    def before(self) -> torch.Tensor:
        self._launch_before()
        return self.buffers["own"].check()

    def _launch_before(self) -> None:
        by_reference = map(c.ctypes.byref, (self.weight, self.apply, self.places))
        size = self.library.cdll.macs_replica_workspace_bytes
        size.restype = c.ctypes.c_size_t
        self.scratch = Buffer((size(*by_reference),), torch.uint8)
        given = self.score, self.weight, self.histogram, self.scratch.tensor, self.places
        self.library("macs_replica_histogram", *given)

    def behind(self, total: torch.Tensor) -> PlanResult:
        """total: what the group exchanged."""
        self.out["group"].copy_(total)
        self._launch_behind()
        return self._result()

    def alone(self) -> PlanResult:
        """Both launchers at once, without an exchange: the kernels overlap as far as they may."""
        self._set("own")
        with self.library.together():
            self._launch_before()
            self._launch_behind()
        self.out["group"].copy_(self.out["own"])
        return self._result()

    def _launch_behind(self) -> None:
        given = self.threshold, self.apply, self.scratch.tensor, self.places, self.out["rank_rows"]
        self.library("macs_replica_apply", *given)

    def _result(self) -> PlanResult:
        self.scratch.check()
        got = {name: buffer.check() for name, buffer in self.buffers.items()}
        names = ("ids", "weights", "weight", "own", "group", "cut", "counts", "rank_rows")
        return self.plan._result(*(got[name] for name in names))


def assert_alike(got: PlanResult, want: PlanResult) -> None:
    """Integers to the bit; weights that were re-routed by another exponential."""
    for name, mine, theirs in zip(got._fields, got, want, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(mine, theirs), name


def check(launchers: Launchers, group: ReplicaGroup, config: MacsConfig, seed: int) -> None:
    launchers.library.configure(seed)
    of_rank = plans(group, config)
    runs = [ReplicaPlan(launchers, plan, b) for plan, b in zip(of_rank, group.group.batches, strict=True)]
    own = [run.before() for run in runs]
    for plan, b, mine in zip(of_rank, group.group.batches, own, strict=True):
        weight = plan.weight(b.hidden_states, b.segment, b.num_segments)
        assert torch.equal(mine, plan.histogram(b.topk_ids, b.topk_weights, weight, b.segment))
    total = torch.stack(own).sum(0, dtype=torch.int32)
    for plan, b, run in zip(of_rank, group.group.batches, runs, strict=True):
        assert_alike(run.behind(total), plan(b.routed, lambda tensor: tensor.copy_(total)))
    for plan, b in zip(of_rank[:1], group.group.batches, strict=False):
        assert_alike(ReplicaPlan(launchers, plan, b).alone(), plan(b.routed))


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs(importance="gate", rho=0.0), st.integers(0, 3))
def test_kernels_plan_as_the_cpu_does(launchers: Launchers, group: ReplicaGroup, config: MacsConfig, seed: int) -> None:
    """Ranks of unequal, also no, tokens; entropies matter to nothing, so that weights are the same bits."""
    check(launchers, group, config, seed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("protect_text", [True, False])
def test_a_batch_of_many_blocks(launchers: Launchers, dtype: torch.dtype, protect_text: bool) -> None:
    """Two copies of an expert on a rank, an expert on all ranks, and more experts than a warp has lanes."""
    gen = cases.generator(5)
    shape = {"num_tokens": 150, "num_experts": 36, "top_k": 4, "num_ranks": 2, "imbalance": 1.7}
    mapped = [*range(36), *[0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]]
    mapped = [mapped[i] for i in torch.randperm(48, generator=gen).tolist()]
    batches = [
        replica_cases.with_copies(cases.batch(gen, **shape | {"num_tokens": n}), mapped, gen) for n in (150, 0, 70, 33)
    ]
    batches = [replace(b, topk_ids=b.topk_ids.to(dtype)) for b in batches]
    group = ReplicaGroup(cases.Group(batches, 36, 4, torch.zeros(36, dtype=torch.int8)), mapped)
    for gamma in (1.0, 0.6):
        config = MacsConfig.from_preset("rank", gamma=gamma, protect_text=protect_text, reroute_rounds=2)
        check(launchers, group, config, seed=1)


def test_all_rows_of_one_source_all_gates_equal(launchers: Launchers) -> None:
    gen = cases.generator(6)
    shape = {"num_experts": 6, "top_k": 2, "num_ranks": 2, "imbalance": 1.8, "ties": True}
    mapped = [0, 1, 2, 3, 4, 5, 0, 1]
    batches = [replica_cases.with_copies(cases.batch(gen, num_tokens=n, **shape), mapped, gen) for n in (0, 60, 0, 0)]
    group = ReplicaGroup(cases.Group(batches, 6, 4, torch.zeros(6, dtype=torch.int8)), mapped)
    check(launchers, group, MacsConfig.from_preset("rank", gamma=0.9), seed=2)
