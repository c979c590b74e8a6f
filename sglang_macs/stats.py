"""What one rank counts and proves. A snapshot is plain JSON.

The proof does not trust the plan: rows are counted again from the ids that are really sent, summed over the EP
group, and held against the bound. `checks` says how often a claim was tested, `violations` how often it failed and
must stay 0.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from .config import MacsConfig
from .ops import NUM_SUMS, WEIGHT_ONE
from .plan import PlanResult

BEFORE, AFTER, KEPT_VISUAL, CLIPPED_TEXT, UNITS = range(5)  # rows of a recount


def rows_of(ids: Tensor, num_experts: int, weight: Tensor | None = None) -> Tensor:
    """[E] i64: assignments of each expert, or their summed integer `weight` (same shape as ids); -1 counts nowhere."""
    valid = ids >= 0
    weight = None if weight is None else weight[valid].double()
    return torch.bincount(ids[valid].long(), weight, minlength=num_experts).long()


def recount(config: MacsConfig, num_experts: int, ids: Tensor, result: PlanResult | None, segment: Tensor) -> Tensor:
    """This rank's rows, counted from the ids alone: [2, E] i64 before and after; with `verify` also the rows that the
    claims on text and on effective load need, [5, E]."""
    sent = ids if result is None else result.topk_ids
    counts = [rows_of(ids, num_experts), rows_of(sent, num_experts)]
    if config.verify:
        text = (segment < 0).unsqueeze(1)
        weight = torch.ones_like(segment, dtype=torch.float32) if result is None else result.weight
        units = (weight * WEIGHT_ONE).round().clamp(min=1).long().unsqueeze(1).expand_as(ids)
        counts += [
            rows_of(ids.masked_fill(text | (sent != ids), -1), num_experts),
            rows_of(ids.masked_fill(~text | (sent == ids), -1), num_experts),
            rows_of(sent, num_experts, units),
        ]
    return torch.stack(counts)


def rows_per_bound(rows: Tensor, num_bounds: int) -> Tensor:
    """[..., E] -> [..., num_bounds], experts placed linearly."""
    return rows.unflatten(-1, (num_bounds, -1)).sum(dim=-1)


def imbalance(rows: Tensor) -> float:
    """Maximum over mean of [R] rows; 1.0 where there are none."""
    total = int(rows.sum())
    return int(rows.max()) * rows.numel() / total if total else 1.0


@dataclass
class LayerStats:
    """Sums over the dispatches of one MoE layer that MACS planned or, where it is off, would have planned. Rows are
    the group's.
    """

    dispatches: int = 0
    cut: int = 0
    rows_before: list[int] = field(default_factory=list)
    rows_after: list[int] = field(default_factory=list)
    max_over_mean_before: float = 0.0
    max_over_mean_after: float = 0.0

    def add(self, before: Tensor, after: Tensor, was_cut: bool) -> None:
        self.dispatches += 1
        self.cut += was_cut
        self.rows_before = _plus(self.rows_before, before)
        self.rows_after = _plus(self.rows_after, after)
        self.max_over_mean_before += imbalance(before)
        self.max_over_mean_after += imbalance(after)


def _plus(total: list[int], rows: Tensor) -> list[int]:
    return [a + b for a, b in zip(total or [0] * rows.numel(), rows.tolist(), strict=True)]


@dataclass
class Stats:
    """Everything one process counts. `own` counts this rank's assignments, by what became of them and by modality."""

    dispatches: int = 0
    planned: int = 0
    skipped: Counter = field(default_factory=Counter)
    misaligned: int = 0
    received_rows: int = 0
    plan_seconds: float = 0.0
    runner_calls: int = 0
    visual_share_sum: float = 0.0
    own: Counter = field(default_factory=Counter)
    checks: Counter = field(default_factory=Counter)
    violations: Counter = field(default_factory=Counter)
    layers: dict[int, LayerStats] = field(default_factory=dict)

    def add_rows(self, layer_id: int, group: Tensor, num_ranks: int, result: PlanResult | None) -> None:
        """One dispatch of a batch that MACS acts on. group: [S, E] recount summed over the EP group."""
        was_cut = result is not None and bool((result.cut[:, 0] >= 0).any())
        layer = self.layers.setdefault(layer_id, LayerStats())
        layer.add(rows_per_bound(group[BEFORE], num_ranks), rows_per_bound(group[AFTER], num_ranks), was_cut)

    def add_plan(self, config: MacsConfig, result: PlanResult, own: Tensor, group: Tensor) -> None:
        """One plan and its proof. own, group: [S, E] recounts of this rank and of the EP group."""
        self.planned += 1
        visual, total = result.group[-NUM_SUMS:].tolist()[2:]
        self.visual_share_sum += visual / total if total else 0.5
        kept, clipped, rerouted = result.counts.sum(dim=1).tolist()
        for i, modality in enumerate(("visual", "text")):
            self.own[f"assignments_{modality}"] += kept[i] + clipped[i]
            self.own[f"clipped_{modality}"] += clipped[i]
            self.own[f"rerouted_{modality}"] += rerouted[i]
            self.own[f"dropped_{modality}"] += clipped[i] - rerouted[i]
        # With exchange=local a rank promises its own share only.
        self._prove(config, result.cut, group if config.exchange == "group" else own)

    def _prove(self, config: MacsConfig, cut: Tensor, counted: Tensor) -> None:
        per_bound = rows_per_bound(counted, cut.shape[0])
        bound = cut[:, 3]
        if config.load == "rows":
            self._check("bound", bool((per_bound[AFTER] > bound).any()))
        elif config.verify:
            self._check("bound", bool((per_bound[UNITS] > bound).any()))
        if config.verify and config.protect_text:
            self._check("text_last", bool(((per_bound[CLIPPED_TEXT] > 0) & (per_bound[KEPT_VISUAL] > 0)).any()))

    def _check(self, claim: str, violated: bool) -> None:
        self.checks[claim] += 1
        self.violations[claim] += violated

    def snapshot(self) -> dict[str, object]:
        """Every counter as JSON values; layer ids become strings."""
        raw = {f.name: getattr(self, f.name) for f in fields(self)}  # asdict would take a Counter apart
        raw["layers"] = {str(layer_id): asdict(layer) for layer_id, layer in self.layers.items()}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in raw.items()}
