"""What the plan costs in front of DeepEP's dispatch and combine, in one run beside DeepEP alone.

    python3 -m benchmarks.gpu.overhead --out FILE [--ranks N]        (deep_ep and deep_gemm installed; one GPU per rank)

Low latency: each row is a CUDA graph of several rounds: DeepEP's dispatch and combine alone, the same behind the plan,
and the plan alone. With one rank the plan bounds eight (E = 128, top-8), as on a cluster, and there is no exchange;
with more, it bounds those and its all-reduce is part of it: once NCCL's, once the kernel over peers' memory. `10 %
clipped`: gamma where a tenth of the assignments is over a bound, nothing re-routed, so rows get fewer. Normal mode (N >
1): 4096 tokens per rank, with the experts' grouped GEMMs, launched from the host, onto a device that is busy before (as
behind attention) and an idle one. Times are the slowest rank's medians.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import cache

import torch
import torch.distributed as dist

from benchmarks.gpu import low_latency, normal_mode, result_file, routing
from sglang_macs.comm import peer_memory
from sglang_macs.comm.peer_all_reduce import PeerAllReduce
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

EXPERTS, TOP_K, INTERMEDIATE = 128, 8, 768
NORMAL_TOKENS = 4096  # a rank
AHEAD_CYCLES = 4_000_000  # about 2 ms
BUSY = ("idle before", "busy before")
ROUNDS, REPLAYS = 8, 60  # rounds in a graph, over as many batches; replays of each graph, in turn


@cache
def peers(hops: int = 0) -> PeerAllReduce:
    """The sum over peers' memory, in one hop or two, which gives NCCL's bits. Collective at first."""
    size = Plan(MacsConfig(), EXPERTS, dist.get_world_size()).histogram_size
    needed = PeerAllReduce.region_bytes(dist.get_world_size(), size)
    found = PeerAllReduce(peer_memory.share(needed, dist.group.WORLD), size, hops)
    for seed in range(20):
        generator = torch.Generator(device="cuda").manual_seed(1000 * dist.get_rank() + seed)
        own = torch.randint(-(2**31), 2**31 - 1, (size,), generator=generator, device="cuda").int()
        expected = own.clone()
        dist.all_reduce(expected)
        found(own)
        assert torch.equal(own, expected), "the sum over peers is another than NCCL's"
    return found


class Layer:
    """Batches of fresh random tokens, and the plan in front of what carries them."""

    def __init__(self, tokens: int, hidden_size: int, batches: int = ROUNDS) -> None:
        self.tokens, self.hidden_size = tokens, hidden_size
        self.group_size = dist.get_world_size()
        self.bounds = self.group_size if self.group_size > 1 else 8
        bias = routing.fit_bias(routing.skewed(EXPERTS, self.bounds, 1.5), TOP_K)
        self.batches = [self._batch(bias, dist.get_rank() * 1000 + i) for i in range(batches)]

    def _batch(self, bias, seed: int) -> dict:
        ids, gates, logits = routing.route(bias, self.tokens, TOP_K, 500 + seed)
        generator = torch.Generator(device="cuda").manual_seed(seed)
        hidden = torch.randn(self.tokens, self.hidden_size, generator=generator, device="cuda").bfloat16()
        segment = torch.where(torch.rand(self.tokens, generator=generator, device="cuda") < 0.9, 0, -1).int()
        return {"hidden": hidden, "ids": ids, "gates": gates, "logits": logits, "segment": segment}

    def make_plan(self, gamma: float, **options) -> Plan:
        return Plan(MacsConfig.from_preset("rank", gamma=gamma, **options), EXPERTS, self.bounds)

    def plan(self, plan: Plan, batch: dict, by_peers: bool = False):
        """(ids, gates) of the plan; its exchange goes over NCCL, or over peers' memory."""
        exchange = (peers() if by_peers else dist.all_reduce) if self.group_size > 1 else None
        tensors = (batch[name] for name in ("hidden", "ids", "gates", "logits", "segment"))
        result = plan(RoutedTokens(*tensors, 1), exchange)
        return result.topk_ids, result.topk_weights

    def clipped_share(self, gamma: float) -> float:
        """Share of the group's assignments that are clipped if nothing is re-routed."""
        plan = self.make_plan(gamma, reroute="none")
        kept = torch.stack([(self.plan(plan, batch)[0] >= 0).float().mean() for batch in self.batches]).mean()
        if self.group_size > 1:
            dist.all_reduce(kept, op=dist.ReduceOp.AVG)
        return 1 - float(kept)

    def gamma_for(self, share: float) -> float:
        """The gamma at which `share` of the assignments is clipped."""
        low, high = 0.5, 3.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.clipped_share(middle) > share else (low, middle)
        return high


class LowLatency(Layer):
    """DeepEP's low-latency buffer; the experts' output is made beforehand."""

    def __init__(self, tokens: int, hidden_size: int, fp8: bool) -> None:
        super().__init__(tokens, hidden_size)
        self.fp8 = fp8
        self.buffer = low_latency.make_buffer(tokens, hidden_size, EXPERTS)
        rows = self.group_size * tokens
        self.output = torch.randn(EXPERTS // self.group_size, rows, hidden_size, device="cuda").bfloat16()

    def round_trip(self, hidden, ids, gates):
        """Dispatch and combine; the experts' output is made beforehand."""
        received, counts, handle, _, _ = self.buffer.low_latency_dispatch(
            hidden, ids, self.tokens, EXPERTS, use_fp8=self.fp8
        )
        combined, _, _ = self.buffer.low_latency_combine(self.output, ids, gates, handle)
        return received, counts, combined


def capture(one_round, batches: list[dict]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for batch in batches[:2]:
            one_round(batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [one_round(batch) for batch in batches]
    graph.kept = kept  # outputs live as long as the graph
    return graph


def medians_us(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median microseconds of one round of each graph; the graphs take turns, so that drift falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(REPLAYS + 5):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 5:
                times[name].append(start.elapsed_time(end) * 1e3 / ROUNDS)
    return slowest({name: sorted(samples)[len(samples) // 2] for name, samples in times.items()})


def slowest(times: dict[str, float]) -> dict[str, float]:
    """The greatest of all ranks, by name."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    return {name: max(one[name] for one in everyone) for name in times}


def compare(times: dict[str, float]) -> dict:
    """Times in us, and what `planned` has over `deepep`."""
    result = {f"{name}_us": value for name, value in times.items()}
    result["overhead_us"] = times["planned"] - times["deepep"]
    if "planned_by_peers" in times:
        result["overhead_by_peers_us"] = times["planned_by_peers"] - times["deepep"]
    return result | {"overhead_percent": 100 * result["overhead_us"] / times["deepep"]}


def check_received(layer: LowLatency, plan: Plan) -> None:
    """What a graph sent is what the plan decided: rows over the group, and finite sums."""
    for batch in layer.batches:
        ids, gates = layer.plan(plan, batch)
        _, counts, combined = layer.round_trip(batch["hidden"], ids, gates)
        rows = torch.stack([counts.sum(), (ids >= 0).sum()])
        if layer.group_size > 1:
            dist.all_reduce(rows)
        assert int(rows[0]) == int(rows[1]), "DeepEP received other rows than the plan kept"
        assert torch.isfinite(combined.float()).all()


def measure_low_latency(tokens: int, hidden_size: int, fp8: bool, clipped: float) -> dict:
    """One row: DeepEP alone, behind the plan, and the plan alone."""
    layer = LowLatency(tokens, hidden_size, fp8)
    gamma = layer.gamma_for(clipped) if clipped else 3.0
    plan = layer.make_plan(gamma, **({"reroute": "none"} if clipped else {}))
    graphs = {
        "deepep": capture(lambda b: layer.round_trip(b["hidden"], b["ids"], b["gates"]), layer.batches),
        "planned": capture(lambda b: layer.round_trip(b["hidden"], *layer.plan(plan, b)), layer.batches),
        "plan": capture(lambda b: layer.plan(plan, b), layer.batches),
    }
    if layer.group_size > 1:
        own = torch.zeros(plan.histogram_size, dtype=torch.int32, device="cuda")
        graphs["exchange"] = capture(lambda b: dist.all_reduce(own), layer.batches)
        graphs["exchange_by_peers"] = capture(lambda b: peers(1)(own), layer.batches)
        graphs["exchange_over_owners"] = capture(lambda b: peers(2)(own), layer.batches)
        graphs["plan_by_peers"] = capture(lambda b: layer.plan(plan, b, True), layer.batches)
        graphs["planned_by_peers"] = capture(
            lambda b: layer.round_trip(b["hidden"], *layer.plan(plan, b, True)), layer.batches
        )
    check_received(layer, plan)
    row = {
        "case": {"mode": "low latency", "T": tokens, "H": hidden_size, "dtype": "fp8" if fp8 else "bf16"},
        "gamma": gamma,
        "clipped_share": layer.clipped_share(gamma) if clipped else 0.0,
        **compare(medians_us(graphs)),
    }
    del graphs
    layer.buffer.destroy()
    return row


class Normal(Layer):
    """DeepEP's normal mode and the experts' grouped GEMMs (without the permutation in between)."""

    def __init__(self, hidden_size: int) -> None:
        import deep_gemm

        super().__init__(NORMAL_TOKENS, hidden_size, batches=4)
        self.buffer = normal_mode.make_buffer(hidden_size, dist.group.WORLD)
        self.gemm, local = deep_gemm.m_grouped_bf16_gemm_nt_contiguous, EXPERTS // self.group_size
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        self.w13 = torch.randn(local, 2 * INTERMEDIATE, hidden_size, **kind)
        self.w2 = torch.randn(local, hidden_size, INTERMEDIATE, **kind)

    def experts(self, counts: list[int]):
        """A function that runs both GEMMs and SiLU over as many rows as arrived, padded to 128 an expert."""
        padded = [-(-count // 128) * 128 for count in counts]
        rows = torch.randn(sum(padded), self.hidden_size, device="cuda").bfloat16()
        groups = torch.arange(len(padded), device="cuda", dtype=torch.int32)
        groups = groups.repeat_interleave(torch.tensor(padded, device="cuda"))
        gate_up = torch.empty(len(rows), 2 * INTERMEDIATE, device="cuda", dtype=torch.bfloat16)

        def run():
            self.gemm(rows, self.w13, gate_up, groups)
            gate, up = gate_up.chunk(2, -1)
            self.gemm(torch.nn.functional.silu(gate) * up, self.w2, rows, groups)

        return run

    def round_trip(self, hidden, ids, gates):
        layout = self.buffer.get_dispatch_layout(ids, EXPERTS)
        received, _, _, counts, handle, _ = normal_mode.dispatch(self.buffer, layout, hidden, ids, gates)
        self.buffer.combine(received, handle)
        return counts


def host_us(one_round, batches: list[dict], busy: bool, repeats: int = 15) -> float:
    """Median microseconds of rounds launched from the host, all ranks together.

    busy: the device has work before the round, as a server's has (attention), and the host launches ahead of it; else
    every launch is waited for.
    """
    samples = []
    for turn in range(repeats + 3):
        for batch in batches:
            torch.cuda.synchronize()
            dist.barrier()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if busy:
                torch.cuda._sleep(AHEAD_CYCLES)
            start.record()
            one_round(batch)
            end.record()
            end.synchronize()
            if turn >= 3:
                samples.append(start.elapsed_time(end) * 1e3)
    return sorted(samples)[len(samples) // 2]


def measure_normal(hidden_size: int, clipped: float, busy: bool) -> dict:
    """One row at 4096 tokens per rank: DeepEP alone and behind the plan, and the plan's share of the MoE layer."""
    layer = Normal(hidden_size)
    gamma = layer.gamma_for(clipped) if clipped else 3.0
    plan = layer.make_plan(gamma, **({"reroute": "none"} if clipped else {}))
    run_experts = layer.experts(layer.round_trip(*(layer.batches[0][name] for name in ("hidden", "ids", "gates"))))
    rounds = {
        "deepep": lambda b: layer.round_trip(b["hidden"], b["ids"], b["gates"]),
        "planned": lambda b: layer.round_trip(b["hidden"], *layer.plan(plan, b)),
        "plan": lambda b: layer.plan(plan, b),
        "planned_by_peers": lambda b: layer.round_trip(b["hidden"], *layer.plan(plan, b, True)),
        "plan_by_peers": lambda b: layer.plan(plan, b, True),
        "experts": lambda b: run_experts(),
    }
    times = slowest({name: host_us(one_round, layer.batches, busy) for name, one_round in rounds.items()})
    row = {
        "case": {"mode": "normal", "T": NORMAL_TOKENS, "H": hidden_size, "dtype": "bf16", "device": BUSY[busy]},
        "gamma": gamma,
        "clipped_share": layer.clipped_share(gamma) if clipped else 0.0,
        **compare(times),
    }
    whole = times["deepep"] + times["experts"]
    row["overhead_percent_of_layer"] = 100 * row["overhead_us"] / whole
    row["overhead_by_peers_percent_of_layer"] = 100 * row["overhead_by_peers_us"] / whole
    layer.buffer.destroy()
    return row


def run_rank(rank: int, ranks: int, out: str, commit: str, normal_only: bool) -> None:
    """All rows of one rank; rank 0 prints and writes them."""
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if ranks > 1 else "gloo", rank=rank, world_size=ranks)
    sizes = [
        (tokens, hidden)
        for tokens in ((128, low_latency.most_tokens(ranks)) if ranks > 1 else (128,))
        for hidden in (2048, 7168)
    ]
    jobs = [
        (measure_low_latency, (*size, fp8, share)) for size in sizes for fp8 in (False, True) for share in (0.0, 0.1)
    ]
    if normal_only:
        jobs = []
    if ranks > 1:
        every = [(hidden, share, busy) for hidden in (2048, 7168) for share in (0.0, 0.1) for busy in (True, False)]
        jobs += [(measure_normal, arguments) for arguments in every]
    rows = []
    for measure, arguments in jobs:
        rows.append(measure(*arguments))
        if rank == 0:
            show(rows[-1])
            result_file.write(out, rows, commit=commit, gpus=ranks)
    dist.destroy_process_group()


# What `show` adds where a row has it.
MORE = {
    "exchange_us": "exchange {:5.1f}",
    "overhead_percent_of_layer": "{:.1f} % of the layer",
    "plan_by_peers_us": "by peers: plan {:6.1f}",
    "overhead_by_peers_us": "over {:6.1f} us",
    "exchange_by_peers_us": "exchange {:5.1f}",
    "exchange_over_owners_us": "over owners {:5.1f}",
}


def show(row: dict) -> None:
    case = row["case"]
    line = (
        f"{case.get('device', case['mode']):11s} T {case['T']:4d} H {case['H']:4d} {case['dtype']:4s} "
        f"clipped {row['clipped_share']:5.1%}  "
        f"DeepEP {row['deepep_us']:7.1f}  planned {row['planned_us']:7.1f}  plan {row['plan_us']:6.1f}  "
        f"over {row['overhead_us']:6.1f} us {row['overhead_percent']:5.1f} %"
    )
    print("  ".join([line, *(words.format(row[key]) for key, words in MORE.items() if key in row)]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--normal-only", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29671 + options.ranks), "NCCL_NVLS_ENABLE": "0"}
    if options.rank is not None:
        run_rank(options.rank, options.ranks, options.out, options.commit, options.normal_only)
        return 0
    command = [sys.executable, *sys.orig_argv[1:]]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(options.ranks)]
    try:
        failed = max(abs(rank.wait(timeout=300)) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    print("overhead: " + ("FAILED" if failed else "OK"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
