"""What one rank counts and proves. A snapshot is plain JSON.

The proof does not trust the plan: rows are counted again from the ids that are really sent, summed over the EP group,
and held against the bound. `checks` says how often a claim was tested, `violations` how often it failed and must
stay 0. Sums stay on the plan's device, so that counting never makes the host wait; only a snapshot reads them.
Dispatches are counted many at a time (`Backlog`): what is left is counted before anything is read.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choices import GAMMAS, MODALITIES, NUM_SUMS, WEIGHT_ONE
from ..config import MacsConfig
from ..plan.plan import PlanResult
from .backlog import Backlog, SumsByLayer, to_host

BEFORE, AFTER, KEPT_VISUAL, CLIPPED_TEXT, UNITS = range(5)  # rows of a recount


def rows_of(ids: Tensor, num_experts: int, weight: Tensor | None = None) -> Tensor:
    """[..., E] i64: assignments of each expert in ids [..., T, K], or their summed integer `weight` (same shape); -1
    counts nowhere.
    """
    cells = (ids.flatten(-2).long() + 1).clamp_(min=0)  # cell 0 takes what counts nowhere
    weight = torch.ones_like(cells) if weight is None else weight.flatten(-2).long()
    return cells.new_zeros(*cells.shape[:-1], num_experts + 1).scatter_add_(-1, cells, weight)[..., 1:].contiguous()


def recount(
    num_experts: int,
    ids: Tensor,
    sent: Tensor,
    weight: Tensor | None,
    segment: Tensor | None,
    left_alone: Tensor | None = None,
    logical: Tensor | None = None,
) -> Tensor:
    """This rank's rows, counted from the ids that were routed and those that are sent, both [T, K].

    Returns [2, E] i64, before and after; with a segment [T] [5, E], what the claims on text and on effective load need,
    too. weight [T] is the plan's, None without a plan. left_alone [T] bool, rows that no bound speaks of: their counts
    are one row more, the last.
    logical [P + 1], with replicas: of each physical expert, and of -1. Rows are then [P], but clipped text is by
    logical expert: where it would have gone, nobody can tell from what is sent.
    """
    planned = sent if left_alone is None else sent.masked_fill(left_alone.unsqueeze(1), -1)
    counted = [ids, sent]
    if segment is not None:
        of_ids, of_sent = (ids, sent) if logical is None else (logical[ids.long()], logical[sent.long()])
        clipped, text = of_sent != of_ids, (segment < 0).unsqueeze(1)
        kept_visual, clipped_text = sent.masked_fill(clipped | text, -1), of_ids.masked_fill(~(clipped & text), -1)
        counted += [kept_visual, clipped_text.to(ids.dtype), planned]
    if left_alone is not None:
        counted.append(sent.masked_fill(~left_alone.unsqueeze(1), -1))
    each = None
    if segment is not None:
        each = torch.ones((len(counted), *ids.shape), dtype=torch.int64, device=ids.device)
        each[UNITS] = WEIGHT_ONE if weight is None else (weight * WEIGHT_ONE).round_().clamp_(min=1).unsqueeze(1)
    return rows_of(torch.stack(counted), num_experts, each)


def rows_per_bound(rows: Tensor, num_bounds: int) -> Tensor:
    """[..., E] -> [..., num_bounds], experts placed linearly."""
    return rows.unflatten(-1, (num_bounds, -1)).sum(dim=-1)


def imbalance(rows: Tensor) -> Tensor:
    """[...] f64: maximum over mean of [..., R] rows; 1 where there are none."""
    total = rows.sum(dim=-1)
    return torch.where(total > 0, rows.amax(dim=-1) * rows.shape[-1] / total.clamp(min=1).double(), 1.0)


def excess(rows: Tensor) -> Tensor:
    """[N, G] f64: of [N, R] rows, how many the most loaded rank has above gamma times the mean, for each of GAMMAS."""
    most, mean = rows.amax(dim=1), rows.double().mean(dim=1)
    return torch.stack([(most - gamma * mean).clamp(min=0) for gamma in GAMMAS], dim=1)


class _Plan(NamedTuple):
    """What is counted of a plan by its own account: counts [3, E, 2] i32, and of `group` [...] i32 the last NUM_SUMS,
    the group's sums, before which its whole histogram may lie. by_expert: also for a calibration.
    """

    layer_id: int
    by_expert: bool
    counts: Tensor
    group: Tensor


class Recount(NamedTuple):
    """What is counted of a dispatch's rows: [S, E] recounts of this rank and of the group; cut [NB, 4] of the plan,
    None without one; left_alone: whether the last row of a recount is of rows that no bound speaks of; on_ranks [E, R]
    bool, with replicas: which ranks have an expert. makes_room: whether bounds are of all rows, those left alone first.
    """

    config: MacsConfig
    layer_id: int
    num_ranks: int
    own: Tensor
    group: Tensor
    cut: Tensor | None
    left_alone: bool = False
    on_ranks: Tensor | None = None
    makes_room: bool = False


@dataclass
class Stats:
    """Everything one process counts. `outcome` [3, 2]: this rank's assignments kept, clipped, re-routed, by modality;
    with replicas [4, 2], those that stayed at another replica, too.

    received_rows, remote_rows: of the CPU all-to-all; rows for this rank's experts, and rows sent to other ranks.
    fused: of `planned`, those that the fused dispatch planned and carried.
    changes: of options, at run time.
    observed_passes, observed_seconds, observed_share: of --macs-preset observe; measured passes, their time, and R_v at
    the visual tokens' average weight, summed.
    bounded: of `dispatches`, those whose received rows were never counted on the host.
    graphs: of `bounded`, those whose layer was one launch, a CUDA graph.
    expected_gain: rows that plans were expected to take off the most loaded rank, summed over dispatches: of those
    "planned", and of those left alone for "no_gain".
    exempt_tokens: of exempt requests, in planned passes.
    uncached: requests kept out of the prefix cache, with --macs-cache exact.
    measured: dispatches by layer that MACS planned or, where it is off, would have planned; of these, by layer, cut
    [], the group's rows [2, R] and max_over_mean [2] summed over dispatches, each before and after; excess [G], see
    `excess`; exceeded [], in which rows of exempt requests (and decoded ones beside them) alone were over a
    bound; demand [E], the group's rows by expert as they were routed, with
    --macs-preset observe alone, where `sglang-macs simulate` reads them.
    expert_rows: [E, 2] by layer, for every E; kept at infinite gamma alone, where `sglang-macs calibrate` reads them.

    What the backlogs hold is not in it: read it by `to_host` or `snapshot`.
    """

    dispatches: int = 0
    planned: int = 0
    fused: int = 0
    bounded: int = 0
    graphs: int = 0
    skipped: Counter = field(default_factory=Counter)
    expected_gain: Counter = field(default_factory=Counter)
    misaligned: int = 0
    received_rows: int = 0
    remote_rows: int = 0
    runner_calls: int = 0
    changes: int = 0
    exempt_tokens: int = 0
    uncached: int = 0
    observed_passes: int = 0
    observed_seconds: float = 0.0
    observed_share: Tensor | float = 0.0
    plan_seconds: float = 0.0
    visual_share_sum: Tensor | float = 0.0
    outcome: Tensor | int = 0
    checks: Counter = field(default_factory=Counter)
    violations: Counter = field(default_factory=Counter)  # of tensors
    measured: Counter = field(default_factory=Counter)
    cut: SumsByLayer = field(default_factory=SumsByLayer)
    rows: SumsByLayer = field(default_factory=SumsByLayer)
    max_over_mean: SumsByLayer = field(default_factory=SumsByLayer)
    excess: SumsByLayer = field(default_factory=SumsByLayer)
    exceeded: SumsByLayer = field(default_factory=SumsByLayer)
    demand: SumsByLayer = field(default_factory=SumsByLayer)
    expert_rows: dict[int, SumsByLayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans = Backlog(self._count_plans)
        self._recounts = Backlog(self._count_recounts)

    def add_plan(self, layer_id: int, result: PlanResult, *, by_expert: bool) -> None:
        """One plan, by its own account. by_expert: also what a calibration is made from."""
        self.planned += 1
        group = result.group
        if not group.is_cuda:  # to keep the whole histogram costs a CPU more, in caches, than a copy of its end
            group = group[-NUM_SUMS:].clone()
        plan = _Plan(layer_id, by_expert, result.counts, group)
        self._plans.add(plan, group.device, (by_expert, plan.counts.shape, group.shape))

    def _count_plans(self, plans: Sequence[_Plan]) -> None:
        counts = torch.stack([plan.counts for plan in plans])
        sums = torch.stack([plan.group for plan in plans])[:, -NUM_SUMS:]
        visual, total = sums[:, 2:].double().unbind(dim=1)
        self.visual_share_sum += torch.where(total > 0, visual / total.clamp(min=1), 0.5).sum()
        self.outcome += counts.sum(dim=(0, 2), dtype=torch.int64)
        if plans[0].by_expert:  # this rank's own assignments, before clipping
            rows = self.expert_rows.setdefault(counts.shape[2], SumsByLayer())
            rows.add([plan.layer_id for plan in plans], counts[:, :2].sum(dim=1, dtype=torch.int64))

    def add_recount(self, counted: Recount) -> None:
        """The rows of one dispatch of a batch that MACS acts on. They are held against the bounds of the plan's cut."""
        self.measured[counted.layer_id] += 1
        cut, group = counted.cut, counted.group
        shapes = [None if part is None else part.shape for part in (cut, counted.on_ranks)]
        alike = (counted.config, counted.num_ranks, group.shape, counted.left_alone, counted.makes_room, *shapes)
        self._recounts.add(counted, group.device, alike)

    def _count_recounts(self, recounts: Sequence[Recount]) -> None:
        first, layer_ids = recounts[0], [one.layer_id for one in recounts]
        group = torch.stack([one.group for one in recounts])
        rows = rows_per_bound(group[:, : AFTER + 1], first.num_ranks)
        self.rows.add(layer_ids, rows)
        self.max_over_mean.add(layer_ids, imbalance(rows))
        self.excess.add(layer_ids, excess(rows[:, BEFORE]))
        if first.config.observes:
            self.demand.add(layer_ids, group[:, BEFORE])
        if first.cut is None:
            self.cut.add(layer_ids, rows.new_zeros(len(recounts)))
            return
        cut = torch.stack([one.cut for one in recounts])
        self.cut.add(layer_ids, (cut[:, :, 0] >= 0).any(dim=1).long())
        # With exchange=local a rank promises its own share only.
        promised = group if first.config.exchange == "group" else torch.stack([one.own for one in recounts])
        bound = cut[:, :, 3]
        if first.left_alone:
            alone = promised[:, -1]
            planned = promised[:, AFTER] - alone
            promised = torch.cat([promised[:, :AFTER], planned.unsqueeze(1), promised[:, AFTER + 1 : -1]], dim=1)
            if first.makes_room:
                units = rows_per_bound(alone, cut.shape[1]) * (1 if first.config.load == "rows" else WEIGHT_ONE)
                self.exceeded.add(layer_ids, (units > bound).any(dim=1).long())
                bound = (bound - units).clamp(min=0)
        per_bound = rows_per_bound(promised, cut.shape[1])
        self._prove_bounds(first.config, per_bound, bound)
        if per_bound.shape[1] <= UNITS or not first.config.protect_text:
            return
        clipped_text, no_visual = per_bound[:, CLIPPED_TEXT] > 0, per_bound[:, KEPT_VISUAL] == 0
        if first.on_ranks is not None:  # an expert gives up text only where one of its ranks keeps no visual row
            on_ranks = torch.stack([one.on_ranks for one in recounts]).to(group.device)
            clipped_text = promised[:, CLIPPED_TEXT, : on_ranks.shape[1]] > 0
            no_visual = (on_ranks & no_visual.unsqueeze(1)).any(dim=2)
        self._check("text_last", clipped_text & ~no_visual)

    def _prove_bounds(self, config: MacsConfig, per_bound: Tensor, bound: Tensor) -> None:
        """Holds N recounts [N, S, NB] of planned rows against their bounds [N, NB]."""
        in_full = per_bound.shape[1] > UNITS
        if config.load == "rows":
            self._check("bound", per_bound[:, AFTER] > bound)
        elif in_full:
            self._check("bound", per_bound[:, UNITS] > bound)

    def _check(self, claim: str, violated: Tensor) -> None:
        self.checks[claim] += violated.shape[0]
        self.violations[claim] += violated.any(dim=1).sum()

    def to_host(self) -> "Stats":
        """A copy on the host, made without waiting: on a GPU its figures are there when the current stream is."""
        with self._settled():
            return Stats(**{name: _to_host(value) for name, value in self._values().items()})

    def snapshot(self) -> dict[str, object]:
        """Every counter as JSON values; `outcome` becomes `own`; what is by layer, `layers`, whose ids are strings."""
        by_layer = ("measured", "cut", "rows", "max_over_mean", "excess")
        with self._settled():
            raw = {name: _plain(value) for name, value in self._values().items()}
        raw["own"] = _outcomes(raw.pop("outcome"))
        measured, *sums = (raw.pop(name) for name in by_layer)
        exceeded = raw.pop("exceeded")
        raw["layers"] = {
            str(i): _layer(measured[i], exceeded.get(i, 0), *(of_layer[i] for of_layer in sums)) for i in measured
        }
        raw["expert_rows"] = {i: rows for of_size in raw["expert_rows"].values() for i, rows in of_size.items()}
        return raw

    def _values(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def _settled(self) -> ExitStack:
        both = ExitStack()
        both.enter_context(self._plans.settled())
        both.enter_context(self._recounts.settled())
        return both


def _to_host(value: object) -> object:
    if isinstance(value, Tensor):
        return to_host(value)
    if isinstance(value, SumsByLayer):
        return value.to_host()
    if isinstance(value, dict):
        return type(value)({key: _to_host(item) for key, item in value.items()})
    return value


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, SumsByLayer):
        return value.by_layer()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _layer(
    dispatches: int, exceeded: int, cut: int, rows: list[list[int]], max_over_mean: list[float], above: list[float]
) -> dict[str, object]:
    """Of one layer, as it is shown."""
    return {
        "dispatches": dispatches,
        "cut": cut,
        "exceeded": exceeded,
        "rows_before": rows[0],
        "rows_after": rows[1],
        "max_over_mean_before": max_over_mean[0],
        "max_over_mean_after": max_over_mean[1],
        "excess": above,
    }


def _outcomes(outcome: list[list[int]] | int) -> dict[str, int]:
    """{"clipped_visual": n, ...} from [3, 2] or, with replicas, [4, 2] kept, clipped, re-routed, moved by (visual,
    text).
    """
    kept, clipped, rerouted, moved = [*(outcome or []), *[[0, 0]] * (4 - len(outcome or []))]
    named = {}
    for i, modality in enumerate(MODALITIES):
        named[f"assignments_{modality}"] = kept[i] + clipped[i]
        named[f"moved_{modality}"] = moved[i]
        named[f"clipped_{modality}"] = clipped[i]
        named[f"rerouted_{modality}"] = rerouted[i]
        named[f"dropped_{modality}"] = clipped[i] - rerouted[i]
    return named
