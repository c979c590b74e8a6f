"""Many rounds in a captured CUDA graph, fresh data in each, held against the composed path: the plan's own kernels.

Everything is compared on the device; only the number of differences comes back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reference import fused_reference as reference
from reference.comparison import Mismatch
from reference.fused_case import FusedConfig, Group, make_group
from reference.fused_checks import scales_by_row
from reference.kernel_case import POISON, POISON_WORD, Run

COMPARED = (
    "new_ids",
    "new_weights",
    "weight",
    "counts",
    "cut",
    "positions",
    "received",
    "starts",
    "rows",
    "scales",
    "combined",
)


class Rounds:
    """A group, and the composed plan of each of its ranks (all of `plan.T` tokens) over the same inputs."""

    def __init__(self, kernels, config: FusedConfig, seed: int) -> None:
        self.config, f = config, config.plan
        self.group = Group(kernels, config)
        first = make_group(config, seed, "cuda")
        self.group.load(first)
        no_others = np.zeros(f.E * 2 * f.buckets + 4, np.int64)
        self.runs = [Run(kernels, f, replace(one, modality=first[0].modality, other=no_others)) for one in first]
        self.wrong = torch.zeros(len(COMPARED), dtype=torch.int64, device="cuda")
        self.clipped = torch.zeros(2, dtype=torch.int64, device="cuda")
        shape = (f.R, f.T, f.H)
        self.hidden = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        self.outputs = torch.empty((f.R, config.rows, f.H), dtype=torch.bfloat16, device="cuda")
        bonus = torch.zeros(f.E, device="cuda")
        bonus[: config.local] = f.hot
        self.bonus = bonus

    def refresh(self) -> None:
        """New data for all ranks, the same to both sides."""
        f = self.config.plan
        scale = torch.rand((f.R, f.T, 1), device="cuda") * 2.0 + 0.5
        self.hidden.copy_(torch.randn(self.hidden.shape, device="cuda") * scale)
        logits = torch.randn((f.R, f.T, f.E), device="cuda") * 1.5 + self.bonus
        top, ids = logits.topk(f.K)
        gates = torch.softmax(top, -1)
        segment = torch.where(torch.rand((f.R, f.T), device="cuda") < f.visual, 0, -1).int()
        for rank, run in enumerate(self.runs):
            fresh = (self.hidden[rank], ids[rank], gates[rank], segment[rank], logits[rank])
            ours = self.group.tensors[rank].inputs.values()
            theirs = (run.hidden, run.ids, run.gates, run.segment, run.logits)
            for value, *targets in zip(fresh, ours, theirs, strict=True):
                for target in targets:
                    target.copy_(value)
        self.outputs.normal_()

    def decided(self) -> tuple[Tensor, Tensor]:
        """[R, T, K] ids and weights that all ranks have to dispatch by."""
        carried = self.config.carried
        pairs = [(run.ids, run.gates) if carried else (run.out["ids"], run.out["weights"]) for run in self.runs]
        ids, weights = zip(*pairs, strict=True)
        return torch.stack(ids), torch.stack(weights)

    def composed(self) -> None:
        if self.config.carried:
            return
        for run in self.runs:
            run.score_histogram()
        total = sum(run.out["histogram"] for run in self.runs)
        for run in self.runs:
            run.group.copy_(total)
            run.threshold_apply()

    def one_round(self) -> None:
        self.refresh()
        self.group.poison()
        self.group.dispatch()
        self.composed()
        self.compare_plans()
        placement = self.compare_places()
        self.group.set_outputs(self.outputs)
        self.group.combine()
        self.compare_sums(placement)

    def differ(self, name: str, got: Tensor, want: Tensor) -> None:
        self.wrong[COMPARED.index(name)] += (got != want).sum()

    def compare_plans(self) -> None:
        if self.config.carried:
            return
        names = {"new_ids": "ids", "new_weights": "weights"}
        for rank, run in enumerate(self.runs):
            for name in ("new_ids", "new_weights", "weight", "counts", "cut"):
                got, want = self.group.tensors[rank].outputs[name], run.out[names.get(name, name)]
                self.differ(name, got.view(torch.int32), want.view(torch.int32))  # floats by their bits
            self.clipped += run.out["counts"].sum((1, 2))[1:]

    def compare_places(self) -> reference.Placement:
        config, f, local = self.config, self.config.plan, self.config.local
        placement = reference.place(config, self.decided()[0].long())
        features, scales = reference.cast(self.hidden.view(-1, f.H), config.format)
        for rank in range(f.R):
            mine = slice(rank * local, (rank + 1) * local)
            part = self.group.part
            self.differ("positions", part(rank, "positions", torch.int32, f.T, f.K), placement.positions[rank])
            self.differ("received", part(rank, "received", torch.int32, local), placement.received[mine])
            self.differ("starts", part(rank, "starts", torch.int32, local), placement.starts[mine])
            source = placement.source[rank].unsqueeze(1)
            want = torch.where(source < 0, POISON, features[source[:, 0].clamp(min=0)])
            self.differ("rows", part(rank, "rows", torch.uint8, *want.shape), want)
            if scales is not None:
                got = scales_by_row(self.group, rank, scales.shape[1])
                self.differ("scales", got, torch.where(source < 0, POISON_WORD, scales[source[:, 0].clamp(min=0)]))
        return placement

    def compare_sums(self, placement: reference.Placement) -> None:
        ids, weights = self.decided()
        want, size = reference.combine(self.config, ids, weights, placement.positions, self.outputs)
        got = torch.stack([tensors.outputs["combined"] for tensors in self.group.tensors.values()]).double()
        near = (got - want).abs() <= 2.0**-8 * want.abs() + 1e-6 * size
        self.wrong[COMPARED.index("combined")] += (~near).sum()


def check(kernels, config: FusedConfig, rounds: int, seed: int) -> str:
    """Raises Mismatch if any of `rounds` rounds differs in anything; a line about what was compared."""
    torch.manual_seed(seed)
    torch.cuda.manual_seed(seed)
    case = Rounds(kernels, config, seed)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.one_round()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        case.one_round()
    for _ in range(rounds):
        graph.replay()
    torch.cuda.synchronize()
    wrong = {name: int(n) for name, n in zip(COMPARED, case.wrong.tolist(), strict=True) if n}
    last = case.group.epoch(0)
    clipped, rerouted = case.clipped.tolist()
    if wrong or last != rounds + 1 or damaged(case.group):
        raise Mismatch(f"{rounds} rounds: {wrong} differ, round {last}, damaged {damaged(case.group)}; {config}")
    return f"{rounds} rounds in a graph, {clipped} assignments clipped, {rerouted} of them re-routed: nothing differs"


def damaged(group: Group) -> list[str]:
    return group.arena.damaged()
