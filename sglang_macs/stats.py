"""What one rank counts and proves. A snapshot is plain JSON.

The proof does not trust the plan: rows are counted again from the ids that are really sent, summed over the EP group,
and held against the bound. `checks` says how often a claim was tested, `violations` how often it failed and must
stay 0. Sums stay on the plan's device, so that counting never makes the host wait; only a snapshot reads them.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import MacsConfig
from .ops import NUM_SUMS, WEIGHT_ONE
from .plan import PlanResult

BEFORE, AFTER, KEPT_VISUAL, CLIPPED_TEXT, UNITS = range(5)  # rows of a recount
CLAIMS = ("bound", "text_last")  # what is checked
MODALITIES = ("visual", "text")


def rows_of(ids: Tensor, num_experts: int, weight: Tensor | None = None) -> Tensor:
    """[E] i64: assignments of each expert, or their summed integer `weight` (same shape as ids); -1 counts nowhere."""
    cells = (ids.reshape(-1).long() + 1).clamp(min=0)  # cell 0 takes what counts nowhere
    weight = torch.ones_like(cells) if weight is None else weight.reshape(-1).long()
    return torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, cells, weight)[1:]


def recount(
    config: MacsConfig, num_experts: int, ids: Tensor, sent: Tensor, weight: Tensor | None, segment: Tensor | None
) -> Tensor:
    """This rank's rows, counted from the ids that were routed and those that are sent, both [T, K].

    Returns [2, E] i64, before and after; with `verify` [5, E], what the claims on text and on effective load need, too.
    weight [T] is the plan's, None without a plan; segment [T] is None for a batch whose claims are not tested.
    """
    counts = [rows_of(ids, num_experts), rows_of(sent, num_experts)]
    if config.verify and segment is not None:
        text = (segment < 0).unsqueeze(1)
        weight = torch.ones_like(segment, dtype=torch.float32) if weight is None else weight
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


def imbalance(rows: Tensor) -> Tensor:
    """[] f64: maximum over mean of [R] rows; 1 where there are none."""
    total = rows.sum()
    return torch.where(total > 0, rows.max() * rows.numel() / total.clamp(min=1).double(), 1.0)


@dataclass
class LayerStats:
    """Sums over the dispatches of one MoE layer that MACS planned or, where it is off, would have planned.

    Rows [R] are the EP group's; max_over_mean is summed over dispatches.
    """

    dispatches: int = 0
    cut: Tensor | int = 0
    rows_before: Tensor | int = 0
    rows_after: Tensor | int = 0
    max_over_mean_before: Tensor | float = 0.0
    max_over_mean_after: Tensor | float = 0.0

    def add(self, before: Tensor, after: Tensor, was_cut: Tensor | int) -> None:
        self.dispatches += 1
        self.cut = self.cut + was_cut
        self.rows_before = self.rows_before + before
        self.rows_after = self.rows_after + after
        self.max_over_mean_before = self.max_over_mean_before + imbalance(before)
        self.max_over_mean_after = self.max_over_mean_after + imbalance(after)


@dataclass
class Stats:
    """Everything one process counts. `fate` [3, 2]: this rank's assignments kept, clipped, re-routed, by modality.

    received_rows, remote_rows: of the CPU all-to-all; rows for this rank's experts, and rows sent to other ranks.
    fused: of `planned`, those that the fused dispatch planned and carried.
    expert_rows: [E, 2] by layer, kept at infinite gamma alone, where `sglang-macs calibrate` reads them.
    """

    dispatches: int = 0
    planned: int = 0
    fused: int = 0
    skipped: Counter = field(default_factory=Counter)
    misaligned: int = 0
    received_rows: int = 0
    remote_rows: int = 0
    runner_calls: int = 0
    plan_seconds: float = 0.0
    visual_share_sum: Tensor | float = 0.0
    fate: Tensor | int = 0
    checks: Counter = field(default_factory=Counter)
    violations: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[int, LayerStats] = field(default_factory=dict)
    expert_rows: dict[int, Tensor | int] = field(default_factory=dict)

    def add_expert_rows(self, layer_id: int, result: PlanResult) -> None:
        """This rank's own assignments [E, 2] of one plan, before clipping: what a calibration is made from."""
        self.expert_rows[layer_id] = self.expert_rows.get(layer_id, 0) + result.counts[:2].sum(0, dtype=torch.int64)

    def add_rows(self, layer_id: int, group: Tensor, num_ranks: int, result: PlanResult | None) -> None:
        """One dispatch of a batch that MACS acts on. group: [S, E] recount summed over the EP group."""
        was_cut = 0 if result is None else (result.cut[:, 0] >= 0).any().long()
        layer = self.layers.setdefault(layer_id, LayerStats())
        layer.add(rows_per_bound(group[BEFORE], num_ranks), rows_per_bound(group[AFTER], num_ranks), was_cut)

    def add_plan(self, result: PlanResult) -> None:
        """One plan, by its own account."""
        self.planned += 1
        visual, total = result.group[-NUM_SUMS + 2 :].double()
        self.visual_share_sum = self.visual_share_sum + torch.where(total > 0, visual / total.clamp(min=1), 0.5)
        self.fate = self.fate + result.counts.sum(dim=1, dtype=torch.int64)

    def add_proof(self, config: MacsConfig, result: PlanResult, own: Tensor, group: Tensor) -> None:
        """Holds [S, E] recounts of this rank and of the EP group against the plan's bounds."""
        # With exchange=local a rank promises its own share only.
        per_bound = rows_per_bound(group if config.exchange == "group" else own, result.cut.shape[0])
        bound = result.cut[:, 3]
        if config.load == "rows":
            self._check("bound", (per_bound[AFTER] > bound).any())
        elif config.verify:
            self._check("bound", (per_bound[UNITS] > bound).any())
        if config.verify and config.protect_text:
            self._check("text_last", ((per_bound[CLIPPED_TEXT] > 0) & (per_bound[KEPT_VISUAL] > 0)).any())

    def _check(self, claim: str, violated: Tensor) -> None:
        self.checks[claim] += 1
        self.violations[claim] = self.violations.get(claim, 0) + violated.long()

    def to_host(self) -> "Stats":
        """A copy on the host, made without waiting: on a GPU its figures are there when the current stream is."""
        return Stats(**{name: _to_host(value) for name, value in vars(self).items()})

    def snapshot(self) -> dict[str, object]:
        """Every counter as JSON values; layer ids become strings, `fate` becomes `own`."""
        raw = {name: _plain(value) for name, value in vars(self).items() if name != "fate"}
        raw["own"] = _fates(self.fate)
        raw["layers"] = {str(layer_id): _plain(vars(layer)) for layer_id, layer in self.layers.items()}
        return raw


def _to_host(value: object) -> object:
    if isinstance(value, Tensor):
        return value.to("cpu", non_blocking=True)
    if isinstance(value, LayerStats):
        return LayerStats(**{name: _to_host(item) for name, item in vars(value).items()})
    if isinstance(value, dict):
        return type(value)({key: _to_host(item) for key, item in value.items()})
    return value


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        if value.is_cuda:  # its stream is that of the forward passes, not the reader's
            torch.cuda.synchronize(value.device)
        return value.tolist()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _fates(fate: Tensor | int) -> dict[str, int]:
    """{"clipped_visual": n, ...} from [3, 2] kept, clipped, re-routed by (visual, text)."""
    kept, clipped, rerouted = _plain(fate) or [[0, 0]] * 3
    named = {}
    for i, modality in enumerate(MODALITIES):
        named[f"assignments_{modality}"] = kept[i] + clipped[i]
        named[f"clipped_{modality}"] = clipped[i]
        named[f"rerouted_{modality}"] = rerouted[i]
        named[f"dropped_{modality}"] = clipped[i] - rerouted[i]
    return named
