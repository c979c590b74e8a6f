"""Times of the fused dispatch and combine by CUDA graph replay: beside DeepEP, the composed path and the bytes to move.

A graph holds passes over different inputs, together larger than the L2, so that every pass reads cold inputs; the
regions are the same for all, as they are when serving. Combine alone repeats one set, DeepEP's as ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu.low_latency import make_buffer, most_tokens
from benchmarks.gpu.time_kernels import copy_bandwidth, graph_us
from reference.fused_case import FusedConfig, Group, make_group, masked
from reference.fused_checks import check_no_fault
from reference.kernel_case import Config, Inputs, Run

COLD_BYTES = 200_000_000
SETS = 48  # of inputs, at most
CLIPPED = 0.2
FREE_GAMMA = 100.0  # everything is exchanged and held against the bounds, and nothing is over them
# What is given up last: the presets' gate, for which no token is scored, or what takes its entropies.
GATE, SCORED = "gate", "entropy_gate"


def timed_config(
    ranks: int,
    tokens: int,
    hidden_size: int,
    format: str,
    num_sms: int,
    importance: str = SCORED,
    scales_with_rows: bool = False,
) -> FusedConfig:
    """One layer of 128 experts, top-8; with one rank every expert is bounded, with more every rank."""
    scope = {"scope": "expert"} if ranks == 1 else {}
    plan = Config(T=tokens, H=hidden_size, R=ranks, hot=2.0, visual=0.9, reroute="none", rho=0.0, gamma=FREE_GAMMA)
    config = masked(
        FusedConfig(
            replace(plan, **scope),
            (tokens,) * ranks,
            num_sms // ranks,
            format,
            scales_with_rows,
            names_sources=False,
        )
    )
    return of_importance(config, importance)


def of_importance(config: FusedConfig, importance: str) -> FusedConfig:
    return replace(config, plan=replace(config.plan, importance=importance), needs_entropy=importance != GATE)


def gamma_for(config: FusedConfig, ranks: list[Inputs], share: float) -> float:
    """The gamma at which `share` of the group's assignments is over the bounds."""
    f = config.plan
    rows = np.bincount(np.concatenate([one.ids.ravel() for one in ranks]), minlength=f.E)
    bounded = rows if f.scope == "expert" else rows.reshape(f.R, -1).sum(1)
    low, high = 0.0, float(len(bounded))
    for _ in range(40):
        middle = (low + high) / 2
        clipped = np.maximum(0, bounded - np.floor(middle * rows.sum() / len(bounded))).sum() / rows.sum()
        low, high = (middle, high) if clipped > share else (low, middle)
    return high


class Layer:
    """Sets of inputs over the same regions."""

    def __init__(self, kernels, config: FusedConfig, regions=None, sets: int = SETS) -> None:
        f = config.plan
        # An even number: DeepEP's two buffers take turns, in the graph as they did while it was captured, so that
        # behind an odd number the next replay begins with the buffer just used. Two ranks stood still with 47.
        count = max(2, min(sets, COLD_BYTES // max(1, sum(config.tokens) * f.H * 2)) // 2 * 2)
        self.kernels, self.config = kernels, config
        self.inputs = [make_group(config, seed, "cuda") for seed in range(count)]
        first = Group(kernels, config, regions=regions)
        self.groups = [first, *(Group(kernels, config, regions=first.regions) for _ in range(count - 1))]
        for group, inputs in zip(self.groups, self.inputs, strict=True):
            group.load(inputs)

    def clip(self, share: float) -> None:
        """From now on `share` of the first set's assignments is clipped; 0: none."""
        for group in self.groups:
            group.config = replace(group.config, plan=replace(group.config.plan, gamma=self.gamma(share)))

    def decide_by(self, importance: str) -> None:
        """From now on."""
        self.config = of_importance(self.config, importance)
        for group in self.groups:
            group.config = of_importance(group.config, importance)

    def gamma(self, share: float) -> float:
        return gamma_for(self.config, self.inputs[0], share) if share else FREE_GAMMA

    @property
    def tokens(self) -> int:
        """Of the ranks played here."""
        return sum(self.config.tokens[rank] for rank in self.groups[0].ranks)

    def kept_rows(self) -> int:
        """That the ranks played here sent of the last set."""
        if self.config.carried:
            return int(sum((self.inputs[-1][rank].ids >= 0).sum() for rank in self.groups[-1].ranks))
        return int(sum((t.outputs["new_ids"] >= 0).sum() for t in self.groups[-1].tensors.values()))

    def dispatch_bytes(self) -> int:
        """Hidden states, ids, gates and segments once; rows with their scales once; ids and gates out."""
        f, format = self.config.plan, self.config.format
        row = f.H * 2 if format == "bfloat16" else f.H + f.H // 128 * (1 if format == "fp8_ue8m0" else 4)
        return self.tokens * (f.H * 2 + f.K * 24 + 8) + self.kept_rows() * row

    def combine_bytes(self, times: int = 1) -> int:
        """Rows read once (and written and read before, where they are copied), and the result."""
        return (self.kept_rows() * times + self.tokens) * self.config.plan.H * 2

    def bytes(self) -> int:
        return self.dispatch_bytes() + self.combine_bytes()

    def dispatch(self) -> list[Callable]:
        return [group.dispatch for group in self.groups]

    def combine(self) -> list[Callable]:
        """Of the last set, again and again: the places of its rows are those in the region."""
        return [self.groups[-1].combine] * len(self.groups)

    def both(self) -> list[Callable]:
        return [lambda group=group: (group.dispatch(), group.combine()) for group in self.groups]


class Table:
    """Rows of docs/results; `bandwidth`: bytes per microsecond of a copy."""

    def __init__(self) -> None:
        self.bandwidth, self.rows = copy_bandwidth(), []

    def add(self, op: str, config: FusedConfig, times: tuple[float, float], size: int, **case: object) -> dict:
        f = config.plan
        sizes = {"T": f.T, "H": f.H, "E": f.E, "K": f.K, "R": f.R, "dtype": config.format, **case}
        if config.scales_with_rows and config.format != "bfloat16" and op.startswith("fused"):
            sizes["scales_with_rows"] = True
        floor = size / self.bandwidth
        row = {
            "op": op, "case": sizes, "median_us": round(times[0], 2), "p99_us": round(times[1], 2), "bytes": size,
            "floor_us": round(floor, 2), "against": "byte floor", "ratio": round(times[0] / floor, 2) if floor else 0.0,
        }  # fmt: skip
        self.rows.append(row)
        return row

    def compare(self, row: dict, other: dict) -> None:
        """`row` is held against another row of the same run."""
        row["against"], row["ratio"] = other["op"], round(row["median_us"] / other["median_us"], 3)

    def show(self) -> None:
        print(f"copy: {self.bandwidth / 1e6:.3f} TB/s")
        for row in self.rows:
            case = row["case"]
            sizes = " ".join(f"{name} {value}" for name, value in case.items() if name not in ("E", "K"))
            print(
                f"{row['op']:24s} {row['median_us']:8.2f} us  p99 {row['p99_us']:8.2f}  floor {row['floor_us']:7.2f}"
                f"  {row['ratio']:6.2f} x {row['against']:22s} {sizes}"
            )


class DeepEP:
    """Its low-latency dispatch and combine over a layer's inputs, alone and behind the plan's kernels."""

    def __init__(self, layer: Layer, buffer=None) -> None:
        """buffer: made for as many tokens and experts; None: one of its own, which the caller destroys."""
        f, self.rank = layer.config.plan, layer.groups[0].ranks[0]
        self.layer, self.plan, self.fp8 = layer, f, layer.config.format != "bfloat16"
        self.buffer = buffer or make_buffer(f.T, f.H, f.E)
        self.sets = [group.tensors[self.rank].inputs for group in layer.groups]
        self.outputs = torch.randn(f.E // f.R, f.R * f.T, f.H, device="cuda").bfloat16()

    def dispatch(self, inputs: dict, ids=None):
        """What combine needs of it."""
        ids = inputs["topk_ids"] if ids is None else ids
        _, _, handle, _, _ = self.buffer.low_latency_dispatch(
            inputs["hidden_states"], ids, self.plan.T, self.plan.E, use_fp8=self.fp8
        )
        return handle

    def combine(self, inputs: dict, handle) -> None:
        self.buffer.low_latency_combine(self.outputs, inputs["topk_ids"], inputs["topk_weights"], handle)

    def passes(self) -> dict[str, list]:
        """By the names of the rows."""
        last, handle = self.sets[-1], self.dispatch(self.sets[-1])
        return {
            "deepep_dispatch": [lambda x=x: self.dispatch(x) for x in self.sets],
            "deepep_combine": [lambda: self.combine(last, handle)] * len(self.sets),
            "deepep_dispatch_combine": [lambda x=x: self.combine(x, self.dispatch(x)) for x in self.sets],
        }

    def planned(self, gamma: float) -> list:
        """The plan's kernels and its all-reduce, then dispatch, over the same sets."""
        config = replace(self.plan, gamma=gamma)
        no_others = np.zeros(config.E * 2 * config.buckets + 4, np.int64) if dist.get_world_size() > 1 else None
        runs = [Run(self.layer.kernels, config, replace(x[self.rank], other=no_others)) for x in self.layer.inputs]

        def one(run: Run, inputs: dict) -> None:
            run.score_histogram()
            if run.group is not None:
                run.group.copy_(run.out["histogram"])
                dist.all_reduce(run.group)
            run.threshold_apply()
            self.dispatch(inputs, run.out["ids"])

        return [lambda run=run, x=x: one(run, x) for run, x in zip(runs, self.sets, strict=True)]


def time_layer(
    table: Table,
    layer: Layer,
    with_deepep: bool,
    at_rest: Callable[[], None] = lambda: None,
    time_us: Callable[[list], tuple[float, float]] = graph_us,
) -> None:
    """All rows of one size. at_rest: before every row, where ranks have to start together; time_us: of one pass."""
    timed: dict[tuple[str, str, float], dict] = {}

    def add(op: str, passes: list, size: Callable[[], int], **case: object) -> dict:
        at_rest()
        times = time_us(passes)
        check_no_fault(layer.groups[0])  # a rank that has given up is fast
        return table.add(op, layer.config, times, size(), **case)

    for importance in (GATE, SCORED):
        layer.decide_by(importance)
        for clipped in (0.0, CLIPPED):
            layer.clip(clipped)
            case = {"clipped": clipped, "importance": importance}
            operations = [("fused_dispatch", layer.dispatch(), layer.dispatch_bytes)]
            if importance == SCORED:
                operations.append(("fused_combine", layer.combine(), layer.combine_bytes))
            operations.append(("fused_dispatch_combine", layer.both(), layer.bytes))
            for op, passes, size in operations:
                timed[op, importance, clipped] = add(op, passes, size, **case)
        whole = [timed["fused_dispatch_combine", importance, clipped] for clipped in (CLIPPED, 0.0)]
        table.compare(*whole)
    if with_deepep:
        deepep = DeepEP(layer)
        for op, passes in deepep.passes().items():
            ours = {key: row for key, row in timed.items() if key[0] == op.replace("deepep", "fused") and not key[2]}
            row = add(op, passes, lambda ours=ours: next(iter(ours.values()))["bytes"], clipped=0.0)
            for mine in ours.values():
                table.compare(mine, row)
        for clipped in (0.0, CLIPPED):
            gamma, ours = layer.gamma(clipped), timed["fused_dispatch", SCORED, clipped]
            case = {"clipped": clipped, "importance": SCORED}
            row = add("plan_deepep_dispatch", deepep.planned(gamma), lambda ours=ours: ours["bytes"], **case)
            row["with_plan"] = round(ours["median_us"] / row["median_us"], 3)  # fused / composed
        deepep.buffer.destroy()


def time_copied(table: Table, layer: Layer) -> None:
    """Combine where the experts' outputs lie outside the region."""
    group = Group(layer.kernels, replace(layer.config, copies_outputs=True), regions=layer.groups[0].regions)
    group.load(layer.inputs[-1])
    layer.clip(0.0)
    layer.groups[-1].dispatch()
    group.dispatch()
    times = graph_us([group.combine] * len(layer.groups))
    table.add("fused_combine_copied", layer.config, times, layer.combine_bytes(3), clipped=0.0)


def has_deepep() -> bool:
    try:
        import deep_ep  # noqa: F401
    except ImportError as error:
        print(f"without DeepEP: {error}", flush=True)
        return False
    return True


def one_gpu(kernels, table: Table, num_sms: int, options) -> None:
    """One rank on the whole GPU, then eight that share it. options: quick, scales_with_rows (check_fused.py)."""
    with_deepep = has_deepep()
    if with_deepep:
        init_alone()

    def config(*sizes) -> FusedConfig:
        return timed_config(*sizes, num_sms, scales_with_rows=options.scales_with_rows)

    sizes = [(128, 2048)] if options.quick else [(t, h) for t in (128, most_tokens(1)) for h in (2048, 7168)]
    for tokens, hidden_size in sizes:
        for format in ("bfloat16", "fp8"):
            layer = Layer(kernels, config(1, tokens, hidden_size, format))
            time_layer(table, layer, with_deepep)
            time_copied(table, layer)
            del layer
            torch.cuda.empty_cache()
    for hidden_size in (2048,) if options.quick else (2048, 7168):
        time_layer(table, Layer(kernels, config(8, 128, hidden_size, "fp8")), False)
        torch.cuda.empty_cache()


def init_alone() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741", "NCCL_NVLS_ENABLE": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1)
