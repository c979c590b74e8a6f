"""A plan with replicas by the CUDA kernels on the emulated machine."""

from __future__ import annotations

import torch

from reference import cases
from reference import kernels_c as c
from reference.replica_cases import ReplicaGroup
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan, PlanResult
from tests.support.emulated_plan import (
    Buffer,
    Launchers,
    address,
    apply_params,
    assignments,
    score_params,
    threshold_params,
    weight_params,
)
from tests.support.replicas import assert_alike, plans

NAMES = ("scope", "load", "importance", "reroute", "protect_text", "buckets", "reroute_rounds", "gamma", "rho", "alpha",
         "c_min")  # fmt: skip


class ReplicaPlan:
    """One rank's buffers and parameters for the two launchers; as `emulated_plan.RankPlan`."""

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
        before = self.library.launches
        with self.library.together():
            self._launch_before()
            self._launch_behind()
        scored = self.score.hidden_states is not None and self.score.num_tokens > 0
        assert self.library.launches - before == 4 + scored  # to zero and to score, histogram, balance, apply
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


def check_plans(launchers: Launchers, group: ReplicaGroup, config: MacsConfig, seed: int) -> None:
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
