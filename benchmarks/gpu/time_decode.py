"""Times of decode by CUDA graph replay: rows carried as they are routed, and combined, beside DeepEP in the same run.

    python3 -m benchmarks.gpu.check_fused --decode --out FILE                        one rank on one GPU
    python3 -m benchmarks.gpu.check_fused --decode --out FILE --processes 2          a GPU each
    python3 -m benchmarks.gpu.check_fused --decode --out FILE --processes 2 --mps    two ranks on one GPU

Regions and DeepEP's buffers have room for 128 tokens a rank, as a server's have. 128 experts, top-8, routed at random.
On a shared GPU DeepEP runs in phases, since its kernels may wait there for SMs (time_phases.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.low_latency import make_buffer
from benchmarks.gpu.time_fused import DeepEP, Layer, Table, has_deepep, init_alone
from benchmarks.gpu.time_kernels import graph_us
from benchmarks.gpu.time_phases import SETS, Phases, measure
from reference.fused_case import FusedConfig, masked
from reference.fused_checks import check_no_fault
from reference.kernel_case import Config

TOKENS = (1, 8, 32, 64, 128)
HIDDEN_SIZES = (2048, 4096, 7168)
FORMATS = ("bfloat16", "fp8")
MOST_TOKENS, EXPERTS = 128, 128  # tokens of a rank
INPUTS = 16  # sets of a layer
TimeUs = Callable[[list], tuple[float, float]]


def decode_config(ranks: int, tokens: int, hidden_size: int, format: str, blocks: int, apart: bool) -> FusedConfig:
    """`tokens` of each rank, in a region for MOST_TOKENS. apart: ranks on devices of their own."""
    scope = {"scope": "expert"} if ranks == 1 else {}
    free = {"gamma": float("inf"), "importance": "gate", "reroute": "none", "rho": 0.0, "hot": 0.0}
    plan = Config(T=MOST_TOKENS, H=hidden_size, E=EXPERTS, R=ranks, **free, **scope)
    return masked(
        FusedConfig(
            plan,
            (tokens,) * ranks,
            blocks,
            format,
            scales_with_rows=apart,
            names_sources=False,
            needs_entropy=False,
            carried=True,
        )
    )


class DecodeDeepEP(DeepEP):
    """DeepEP over a layer's tokens; its buffer is shared by all layers of a hidden size."""

    def __init__(self, layer: Layer, buffer) -> None:
        super().__init__(layer, buffer)
        tokens = layer.config.tokens[self.rank]
        self.sets = [{name: tensor[:tokens] for name, tensor in one.items()} for one in self.sets]


def rows_of(layer: Layer) -> dict[str, tuple[list, Callable[[], int]]]:
    """(passes, bytes) of every operation of ours; `fused_dispatch` is the kernel that plans, at infinite gamma."""
    planning = Layer(layer.kernels, replace(layer.config, carried=False), layer.groups[0].regions, INPUTS)
    return {
        "fused_carry": (layer.dispatch(), layer.dispatch_bytes),
        "fused_dispatch": (planning.dispatch(), layer.dispatch_bytes),
        "fused_combine": (layer.combine(), layer.combine_bytes),
        "fused_carry_combine": (layer.both(), layer.bytes),
    }


def time_layer(
    table: Table, layer: Layer, buffer, at_rest: Callable[[], None] = lambda: None, time_us: TimeUs = graph_us
) -> None:
    """Rows of one size, each against DeepEP's. buffer: DeepEP's, None: without."""
    tokens = layer.config.tokens[0]
    timed = {}
    for op, (passes, size) in rows_of(layer).items():
        at_rest()
        times = time_us(passes)
        check_no_fault(layer.groups[0])  # a rank that has given up is fast
        timed[op] = table.add(op, layer.config, times, size(), T=tokens)
    if buffer is None:
        return
    deepep = DecodeDeepEP(layer, buffer)
    for op, passes in deepep.passes().items():
        at_rest()
        compare(table, timed, table.add(op, layer.config, time_us(passes), layer.bytes(), T=tokens))


def compare(table: Table, timed: dict[str, dict], theirs: dict) -> None:
    """Rows of ours that do what one of DeepEP's does are held against it."""
    of_theirs = {
        "deepep_dispatch": ("fused_carry", "fused_dispatch"),
        "deepep_combine": ("fused_combine",),
        "deepep_dispatch_combine": ("fused_carry_combine",),
    }
    for op in of_theirs[theirs["op"].removeprefix("phased_")]:
        table.compare(timed[op], theirs)


def time_shared(table: Table, layer: Layer, buffer, at_rest: Callable[[], None], time_us: TimeUs) -> None:
    """Of ranks that share a GPU: ours in short graphs, DeepEP in phases."""
    tokens = layer.config.tokens[0]
    time_layer(table, layer, None, at_rest, time_us)
    if buffer is None:
        return
    ours = {row["op"]: row for row in table.rows[-len(rows_of(layer)) :]}
    deepep = DecodeDeepEP(layer, buffer)
    phased = [Phases(deepep, inputs, None, at_rest) for inputs in deepep.sets[:SETS]]
    alone = measure(phased, at_rest)
    alone["dispatch_combine"] = tuple(map(sum, zip(*alone.values(), strict=True)))
    for name, times in alone.items():
        theirs = table.add(f"phased_deepep_{name}", layer.config, times, layer.bytes(), T=tokens)
        compare(table, ours, theirs)


def time_all(
    table: Table,
    layer_of: Callable[[int, int, str], Layer],
    with_deepep: bool,
    options,
    time_one: Callable[[Table, Layer, object], None] = time_layer,
) -> None:
    """All sizes. layer_of(tokens, hidden size, format); options: quick, and keep(table), called as rows come."""
    for hidden_size in HIDDEN_SIZES[:1] if options.quick else HIDDEN_SIZES:
        buffer = make_buffer(MOST_TOKENS, hidden_size, EXPERTS) if with_deepep else None
        for format in FORMATS:
            started = time.monotonic()
            for tokens in TOKENS:
                time_one(table, layer_of(tokens, hidden_size, format), buffer)
            torch.cuda.empty_cache()
            options.keep(table)
            print(f"timed H {hidden_size} {format} in {time.monotonic() - started:.0f} s", flush=True)
        if buffer is not None:
            buffer.destroy()


def one_gpu(kernels, table: Table, num_sms: int, options) -> None:
    """One rank on the whole GPU."""
    with_deepep = has_deepep()
    if with_deepep:
        init_alone()

    def layer_of(*sizes) -> Layer:
        return Layer(kernels, decode_config(1, *sizes, num_sms, apart=False), sets=INPUTS)

    time_all(table, layer_of, with_deepep, options)
