"""A rank a process: regions mapped through CUDA IPC, one GPU each over NVLink or all on one GPU under MPS.

Every rank makes the inputs of all, and knows of the others only what they send over gloo: handles, and what their
kernels decided. So each checks its own part of the group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu import time_decode
from benchmarks.gpu.low_latency import most_tokens
from benchmarks.gpu.mps import shared_gpu
from benchmarks.gpu.time_fused import Layer, Table, has_deepep, time_layer, timed_config
from benchmarks.gpu.time_kernels import graph_us
from benchmarks.gpu.time_phases import time_composed, together_us
from reference import fused_c as fc
from reference.comparison import Mismatch
from reference.fused_case import GUARD, FusedConfig, Group, Regions, make_group, masked
from reference.fused_checks import check_combine, check_dispatch, describe, fresh_outputs, output, routed
from reference.kernel_case import POISON, Config

HANDLE_BYTES = 64


class DeviceMemory:
    """Raw device memory as torch takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def everyone(value: object) -> list:
    """`value` of every rank, by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def at_rest() -> None:
    """All ranks here, nothing running on any device."""
    torch.cuda.synchronize()
    dist.barrier()


class SharedRegions:
    """One guarded region a rank, mapped by all; for layouts up to the size first asked for."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        self.rank = dist.get_rank()
        memory, handle = ctypes.c_void_p(), ctypes.create_string_buffer(HANDLE_BYTES)
        self.size = size + 2 * GUARD
        check(library.macs_allocate_shared(ctypes.c_size_t(self.size), ctypes.byref(memory), handle), "allocate")
        self.bases = []
        for rank, of_rank in enumerate(everyone(handle.raw)):
            mapped = ctypes.c_void_p(memory.value)
            if rank != self.rank:
                check(library.macs_open_shared(of_rank, ctypes.byref(mapped)), f"open the region of rank {rank}")
            self.bases.append(mapped.value)
        self.memory = torch.as_tensor(DeviceMemory(self.bases[self.rank], self.size), device="cuda")

    def group(self, kernels, config: FusedConfig) -> Group:
        """A group over these regions, zeroed; collective."""
        layout = fc.layout_of(kernels.library, config.shape)
        if layout.bytes + 2 * GUARD > self.size:
            raise RuntimeError(f"{layout.bytes} bytes asked for, {self.size} there")
        at_rest()
        self.memory.fill_(POISON)
        own = self.memory[GUARD : GUARD + layout.bytes].zero_()
        group = Group(kernels, config, regions=Regions([base + GUARD for base in self.bases], {self.rank: own}))
        group.arena.guard(f"region {self.rank}", self.memory, GUARD, layout.bytes)
        at_rest()
        return group


def check(error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"{what}: CUDA error {error}")


def in_two_phases(group: Group) -> None:
    group.dispatch(fc.SEND)
    group.dispatch(fc.RECEIVE)


def expect_no_fault(group: Group, times: tuple[float, float, float]) -> None:
    """Raises on every rank where one has a fault on record, with what all of them say.

    times: s of the host's clock, when all were at rest, when the launch had returned, and when it was done.
    """
    status = group.status(group.ranks[0])
    at_rest_since, launched, done = times
    words = f"{describe(status)}, launched {launched - at_rest_since:.3f} s behind the others' meeting"
    said = everyone((status.fault, f"{words}, done {done - launched:.3f} s later"))
    if any(fault for fault, _ in said):
        raise Mismatch("; ".join(f"rank {rank}: {words}" for rank, (_, words) in enumerate(said)) + f"; {group.config}")


def play(group: Group, seed: int, dispatch: Callable[[Group], None]) -> None:
    """One round of all ranks, this one's part checked."""
    ranks, me = make_group(group.config, seed, "cuda"), group.ranks[0]
    group.load(ranks)
    group.poison()
    at_rest()  # else a peer's rows are poisoned
    times = [time.monotonic()]
    dispatch(group)
    times.append(time.monotonic())
    torch.cuda.synchronize()
    expect_no_fault(group, (*times, time.monotonic()))
    weights = None if group.config.carried else everyone(output(group, me, "weight"))
    placement = check_dispatch(group, ranks, weights)
    outputs = fresh_outputs(group, seed)
    group.set_outputs(outputs)
    group.combine()
    torch.cuda.synchronize()
    decided = routed(group, ranks) or everyone((output(group, me, "new_ids"), output(group, me, "new_weights")))
    check_combine(group, placement, outputs, decided)
    at_rest()


def cases(ranks: int, blocks: int, largest: int) -> list[FusedConfig]:
    """FP8 rows with their scales, as between devices, and once without.

    largest: hidden size; every rank makes what all ranks' experts put out, and on one GPU that is a square.
    """
    plan = Config(T=128, R=ranks, hot=1.5, visual=0.8)
    ragged = tuple((128, 1, 0, 127)[rank % 4] for rank in range(ranks))
    return [
        FusedConfig(plan, (128,) * ranks, blocks),
        masked(FusedConfig(plan, ragged, blocks, "fp8_ue8m0", True, row_experts=True, copies_outputs=True)),
        FusedConfig(Config(T=511, R=ranks, hot=60.0, H=largest), (511,) * ranks, blocks, "fp8", True),
        masked(FusedConfig(plan, (128,) * ranks, blocks, "fp8", False)),
        masked(FusedConfig(plan, ragged, blocks, carried=True)),
        masked(FusedConfig(plan, (128,) * ranks, blocks, "fp8", True, carried=True, copies_outputs=True)),
    ]


def dead_rank(kernels, regions: SharedRegions, blocks: int, carried: bool) -> None:
    """The last rank does not launch: the others name it in time, and go on with it afterwards."""
    ranks, me = dist.get_world_size(), dist.get_rank()
    config = masked(FusedConfig(Config(T=16, R=ranks, hot=1.5), (16,) * ranks, blocks, carried=carried))
    group = regions.group(kernels, config)
    play(group, 0, Group.dispatch)
    group.config = replace(config, timeout_ns=20_000_000)  # too little for ranks that start apart
    if me != ranks - 1:
        group.dispatch()
    torch.cuda.synchronize()
    group.config = config
    status = group.status(me)
    expected = "counts" if carried else "assignments", ranks - 1
    if me != ranks - 1 and (fc.FAULTS[status.fault], status.peer) != expected:
        raise RuntimeError(f"rank {me} reports {fc.FAULTS[status.fault]} of rank {status.peer}")
    at_rest()
    group.recover(max(everyone(group.epoch(me))) + 1)
    at_rest()
    play(group, 1, Group.dispatch)


def run_rank(kernels, options) -> None:
    """Checks and times of one rank; rank 0 hands over the table."""
    ranks, me = options.processes, options.rank
    torch.cuda.set_device(0 if options.mps else me)
    backend = "gloo" if options.mps else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{options.init}", rank=me, world_size=ranks)
    blocks = min(everyone(num_sms(options)))
    every = cases(ranks, blocks, 2048 if options.mps and ranks > 2 else 7168)
    timed = decode_configs(blocks, options) if options.decode else timed_configs(blocks, options)
    size = max(fc.layout_of(kernels.library, config.shape).bytes for config in (*every, *timed))
    regions = SharedRegions(kernels.library, size)
    if not options.time_only:
        check_all(kernels, regions, every, options, blocks)
    if not options.check_only:
        table = Table()
        (time_decoding if options.decode else time_planning)(kernels, regions, table, timed, options)
        if me == 0:
            table.show()
    at_rest()
    dist.destroy_process_group()


def timed_configs(blocks: int, options) -> list[FusedConfig]:
    ranks = options.processes
    return [
        timed_config(ranks, tokens, hidden_size, format, blocks * ranks, scales_with_rows=not options.mps)
        for tokens in ((128,) if options.mps else (128, most_tokens(ranks)))
        for hidden_size in (2048, 7168)
        for format in ("bfloat16", "fp8")
    ]


def decode_configs(blocks: int, options) -> list[FusedConfig]:
    """Of every region that `time_decoding` needs."""
    sizes = [(hidden_size, format) for hidden_size in time_decode.HIDDEN_SIZES for format in time_decode.FORMATS]
    most = time_decode.MOST_TOKENS
    return [time_decode.decode_config(options.processes, most, *size, blocks, not options.mps) for size in sizes]


def time_planning(kernels, regions: SharedRegions, table: Table, configs: list[FusedConfig], options) -> None:
    for config in configs:
        started = time.monotonic()
        time_config(kernels, regions, table, config, options)
        if dist.get_rank() == 0:
            options.keep(table)  # a run that is cut off has shown something
            size = f"T {config.plan.T} H {config.plan.H} {config.format}"
            print(f"timed {size} in {time.monotonic() - started:.0f} s", flush=True)


def time_decoding(kernels, regions: SharedRegions, table: Table, configs: list[FusedConfig], options) -> None:
    """Rows of time_decode.py. configs: as of `decode_configs`."""
    blocks = configs[0].blocks
    if dist.get_rank() != 0:
        options.keep = lambda table: None

    def layer_of(*sizes) -> Layer:
        config = time_decode.decode_config(options.processes, *sizes, blocks, not options.mps)
        return Layer(kernels, config, regions.group(kernels, config).regions, time_decode.INPUTS)

    if options.mps:
        time_us = partial(together_us, meet=at_rest)
        time_one = partial(time_decode.time_shared, at_rest=at_rest, time_us=time_us)
    else:
        time_one = partial(time_decode.time_layer, at_rest=at_rest)
    time_decode.time_all(Slowest(table), layer_of, has_deepep(), options, time_one)


def check_all(kernels, regions: SharedRegions, every: list[FusedConfig], options, blocks: int) -> None:
    checked = 0
    for config in every:
        group = regions.group(kernels, config)
        for seed in range(options.rounds):
            play(group, options.seed + seed, in_two_phases if seed % 2 else Group.dispatch)
            checked += 1
    for carried in (False, True):
        dead_rank(kernels, regions, blocks, carried)
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"{ranks} processes: {checked} rounds agree, a dead rank is named; {blocks} blocks per rank", flush=True)


def time_config(kernels, regions: SharedRegions, table: Table, config: FusedConfig, options) -> None:
    """Rows of one size; on a shared GPU beside DeepEP in phases."""
    layer = Layer(kernels, config, regions=regions.group(kernels, config).regions)
    slowest = Slowest(table)
    if not options.mps:
        time_layer(slowest, layer, has_deepep(), at_rest, graph_us)
    else:
        if has_deepep():
            time_composed(slowest, layer, at_rest)
        if not options.composed_only:
            time_layer(slowest, layer, False, at_rest, partial(together_us, meet=at_rest))
    torch.cuda.empty_cache()


def num_sms(options) -> int:
    """That a rank's blocks may fill: under MPS its share of the device, less a tenth.

    All blocks of all ranks have to run at once. Shares that add up to the whole device need not lie side by side: on an
    H100 two ranks of 66 blocks each waited for one another's last blocks, which never started; eight of 16 did not.
    """
    count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    share = 132 // options.processes
    usable = min(count, share - share // 10) if options.mps else count
    print(f"rank {options.rank}: {count} SMs reported", flush=True)
    return options.blocks or usable


class Slowest(Table):
    """A table of which every figure is the slowest rank's."""

    def __init__(self, table: Table) -> None:
        self.bandwidth, self.rows = table.bandwidth, table.rows

    def add(self, op, config, times, size, **case):
        slowest = tuple(max(column) for column in zip(*everyone(times), strict=True))
        return super().add(op, config, slowest, size, **case)


def start(options, seconds: float) -> int:
    """Starts all ranks and waits for them; 0 if every one ended well in time."""
    extra = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29743", "NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.mps:
            extra |= stack.enter_context(shared_gpu(options.processes))
        command = [sys.executable, *sys.orig_argv[1:]]
        command += ["--init", str(Path(folder) / "init"), "--seed", str(options.seed)]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env={**os.environ, **extra})
            for rank in range(options.processes)
        ]
        try:
            deadline = time.monotonic() + seconds
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            codes = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return 0 if all(code == 0 for code in codes) else 1
