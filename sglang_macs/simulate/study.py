"""The study: EP sizes x presets x gammas, every layer and batch at once."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from ..config import MacsConfig
from ..errors import MacsError
from . import replicas, times
from .cuts import cut
from .loads import Loads, max_over_mean
from .machines import Machine, Model


@dataclass(frozen=True)
class Settings:
    """What is simulated. tokens: prefill tokens per rank and forward pass. context: tokens that attention looks at.

    redundant: copies of experts beside the first ones. They lie as EPLB puts them, from as many other batches. Where a
    plan chooses among replicas, it does; the other cases, and none, split an expert's rows evenly among its copies.
    """

    machine: Machine
    model: Model
    ep: tuple[int, ...] = (8, 16, 32, 64, 128)
    presets: tuple[str, ...] = ("cai", "paper", "rank")
    gammas: tuple[float, ...] = (1.0, 1.05, 1.1, 1.2, 1.5)
    tokens: int = 8192
    batches: int = 100
    context: int = 2048
    fp8: bool = False
    tile_m: int = 128
    low_latency: bool = False
    seed: int = 0
    redundant: int = 0


@dataclass(frozen=True)
class Row:
    """One case. Times of a layer are means over layers and batches, in us; shares are of all assignments.

    stage_us: dispatch, experts, combine, plan and exchange. forward_ms: all layers, mean (and p95) over batches.
    speedup: of the forward pass against `off`. balanced: the same, had every rank the mean load at no cost.
    """

    ep: int
    preset: str
    gamma: float | None
    exchange: str
    max_over_mean_before: float
    max_over_mean_after: float
    clipped: float
    dropped: float
    dispatch_us: float
    expert_us: float
    combine_us: float
    plan_us: float
    exchange_us: float
    stage_us: float
    other_us: float
    forward_ms: float
    forward_p95_ms: float
    speedup: float
    balanced: float


def run(settings: Settings, loads: Loads) -> list[Row]:
    """Every case. Raises MacsError if loads, model and EP sizes do not fit together."""
    model = settings.model
    if (loads.num_experts, loads.top_k) != (model.experts, model.top_k):
        found = f"loads of {loads.num_experts} experts, top-{loads.top_k}"
        raise MacsError(
            "--loads or --from", found, f"{model.experts} experts, top-{model.top_k}", "Choose another --model."
        )
    for ranks in settings.ep:
        per_node = settings.machine.gpus_per_node
        physical = model.experts + settings.redundant
        if ranks < 2 or physical % ranks or (ranks > per_node and ranks % per_node):
            fix = f"More than {per_node} must be a multiple of {per_node}."
            raise MacsError("--ep", ranks, f"2 or more ranks that divide {physical}", fix)
    rows = []
    for ranks in settings.ep:
        rng = np.random.default_rng([settings.seed, ranks])
        sampled = loads.sample(settings.batches, settings.tokens * ranks, rng)
        balanced = sampled
        if settings.redundant:
            others = loads.sample(settings.batches, settings.tokens * ranks, rng).sum((1, 2))
            mapped = [replicas.placement(counts, model.experts + settings.redundant, ranks) for counts in others]
            sampled, balanced = (
                np.stack([replicas.spread(*of, ranks, balance=b) for of in zip(sampled, mapped, strict=True)])
                for b in (False, True)
            )
        rows += _of_size(settings, sampled, balanced, ranks)
    return rows


def _of_size(settings: Settings, sampled: np.ndarray, balanced_rows: np.ndarray, ranks: int) -> Iterator[Row]:
    """All cases of one EP size on the same batches. sampled: [L, B, 2, E], balanced_rows: where replicas are chosen."""
    cluster = times.Cluster(
        settings.machine, settings.model, ranks, settings.tokens, settings.fp8, settings.tile_m, settings.low_latency
    )
    off = _Case(settings, cluster, sampled, MacsConfig.from_preset("off"))
    even = np.broadcast_to(sampled.sum((2, 3), keepdims=True)[:, :, 0] / sampled.shape[3], sampled[:, :, 0].shape)
    balanced = off.forward_us.mean() / _forward_us(settings, cluster, even).mean()
    yield off.row("none", off, balanced)
    for preset in settings.presets:
        for gamma in settings.gammas:
            config = MacsConfig.from_preset(preset, gamma=gamma)
            case = _Case(settings, cluster, sampled if config.no_replicas else balanced_rows, config)
            for exchange in times.EXCHANGES:
                yield case.row(exchange, off, balanced)


def stages_us(rows: np.ndarray, cluster: times.Cluster) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(all three, dispatch, experts, combine) of a layer, each [...]: the whole waits for its slowest rank."""
    dispatch, combine = times.transfer_us(rows, cluster)
    experts = times.expert_us(rows, cluster)
    return (dispatch + experts + combine).max(-1), dispatch.max(-1), experts.max(-1), combine.max(-1)


def _forward_us(settings: Settings, cluster: times.Cluster, rows: np.ndarray) -> np.ndarray:
    """[B]: a forward pass over all layers of the model, those of the loads standing for them."""
    stage = stages_us(rows, cluster)[0] + times.other_us(cluster, settings.context)
    return stage.mean(0) * settings.model.layers


class _Case:
    """One preset and gamma on the sampled batches."""

    def __init__(self, settings: Settings, cluster: times.Cluster, sampled: np.ndarray, config: MacsConfig) -> None:
        self.config, self.cluster, self.layers = config, cluster, settings.model.layers
        self.rows = sampled.sum(2)  # [L, B, E]
        self.cut = cut(sampled, config, cluster.num_ranks)
        self.stages = stages_us(self.cut.after, cluster)
        self.plan_us = 0.0 if config.is_off else times.plan_us(cluster)
        self.other_us = times.other_us(cluster, settings.context)

    @property
    def forward_us(self) -> np.ndarray:
        """[B], without the exchange."""
        return (self.stages[0] + self.plan_us + self.other_us).mean(0) * self.layers

    def row(self, exchange: str, off: "_Case", balanced: float) -> Row:
        total, ranks = self.rows.sum(-1), self.cluster.num_ranks
        after = self.cut.after.reshape(*total.shape, ranks, -1).sum(-1)
        exchange_us = 0.0 if self is off else times.exchange_us(self.cluster, self.config.buckets, exchange)
        forward_us = self.forward_us + exchange_us * self.layers
        return Row(
            ep=ranks,
            preset=self.config.preset,
            gamma=None if self is off else self.config.gamma,
            exchange=exchange,
            max_over_mean_before=float(max_over_mean(off.rows, ranks).mean()),
            # Over the mean before: what is dropped must not make the bound look loose.
            max_over_mean_after=float((after.max(-1) * ranks / total).mean()),
            clipped=float((self.cut.clipped / total).mean()),
            dropped=float((self.cut.dropped / total).mean()),
            dispatch_us=float(self.stages[1].mean()),
            expert_us=float(self.stages[2].mean()),
            combine_us=float(self.stages[3].mean()),
            plan_us=self.plan_us,
            exchange_us=exchange_us,
            stage_us=float(self.stages[0].mean()) + self.plan_us + exchange_us,
            other_us=self.other_us,
            forward_ms=float(forward_us.mean()) / 1e3,
            forward_p95_ms=float(np.quantile(forward_us, 0.95)) / 1e3,
            speedup=float(off.forward_us.mean() / forward_us.mean()),
            balanced=float(balanced),
        )


def table(rows: list[Row]) -> str:
    """For the terminal: one line for each EP size, preset and gamma; us; `/` = flat / hierarchical exchange."""
    head = ("EP", "preset", "gamma", "max/mean", "clipped", "dropped", "dispatch", "experts", "combine", "plan")
    lines = [(*head, "exchange", "other", "forward ms", "speed-up", "balanced")]
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault((row.ep, row.preset, row.gamma), []).append(row)
    for (ep, preset, gamma), both in cases.items():
        r = both[0]
        load = f"{r.max_over_mean_before:.2f} > {r.max_over_mean_after:.2f}"
        us = [f"{x:.0f}" for x in (r.dispatch_us, r.expert_us, r.combine_us, r.plan_us)]
        exchange = "/".join(f"{x.exchange_us:.0f}" for x in both)
        forward, speedup = (
            "/".join(f"{getattr(x, name):.{digits}f}" for x in both)
            for name, digits in (("forward_ms", 1), ("speedup", 3))
        )
        shares = (f"{r.clipped:.1%}", f"{r.dropped:.1%}")
        end = (exchange, f"{r.other_us:.0f}", forward, speedup, f"{r.balanced:.3f}")
        lines.append((str(ep), preset, "" if gamma is None else f"{gamma:g}", load, *shares, *us, *end))
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Cells in columns, for the terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in lines)


def to_json(settings: Settings, loads: Loads, rows: list[Row]) -> dict[str, object]:
    """Plain values: the settings with the machine's figures, the loads' source, and every row."""
    return {"settings": asdict(settings), "loads": loads.source, "rows": [asdict(row) for row in rows]}
