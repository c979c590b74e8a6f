"""MoE layers under the bounded dispatch, queued far ahead of the GPUs, on two ranks: does any stage not end?

    python3 -m benchmarks.gpu.soak_bounded [--gamma 1.05] [--seconds 20] [--share-gpu]    (deep_ep, deep_gemm installed)

A layer is what a prefill queues between two attentions: plan, dispatch, rows by expert, both GEMMs, gather, combine.
Nothing waits for the GPU but the loop itself, which stays --ahead layers in front of it. Where a layer does not end
within --timeout seconds, every rank says which of its stages have ended, and the run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import deque

import deep_gemm
import torch
import torch.distributed as dist

from benchmarks.gpu import mps, normal_mode, result_file, routing
from sglang_macs.comm import peer_memory
from sglang_macs.comm.peer_all_reduce import PeerAllReduce
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import bounded
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

RANKS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 128, 8, 2048, 768  # a layer of Qwen3-VL-30B-A3B
BATCHES = 8  # with routings of their own
FEW = 4  # tokens of a dispatch that counts, as in decode
TOGETHER = 100  # layers after which rank 0 says whether to go on
STAGES = ("attention", "plan", "layout", "dispatch", "permute", "gate_up", "silu", "down", "gather", "combine")


class Layer:
    """One MoE layer of a rank, and batches to run it on."""

    def __init__(self, options: argparse.Namespace, group: dist.ProcessGroup, all_reduce) -> None:
        config = MacsConfig.from_preset("rank", gamma=options.gamma)
        self.plan, self.all_reduce, self.attention = Plan(config, EXPERTS, RANKS), all_reduce, options.attention
        sizes = bounded.Sizes(RANKS, EXPERTS, TOP_K, HIDDEN)
        self.room = bounded.room(config, sizes, RANKS * options.tokens, planned=True)
        self.workspace = bounded.Workspace(torch.device("cuda"))
        self.buffer = normal_mode.make_buffer(HIDDEN, group)
        self.bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        self.w13 = torch.randn(sizes.local, 2 * INTERMEDIATE, HIDDEN, **self.bf16) * 0.02
        self.w2 = torch.randn(sizes.local, HIDDEN, INTERMEDIATE, **self.bf16) * 0.02
        self.square = torch.randn(HIDDEN, HIDDEN, **self.bf16) * 0.02
        self.segment = torch.full((options.tokens,), -1, dtype=torch.int32, device="cuda")
        self.batches = [self._batch(seed, options.tokens) for seed in range(BATCHES)]
        self.graph: torch.cuda.CUDAGraph | None = None

    def _batch(self, seed: int, tokens: int) -> tuple[torch.Tensor, ...]:
        shares = routing.skewed(EXPERTS, RANKS, (1.1, 1.27)[seed % 2], seed)
        bias = routing.fit_bias(shares if seed % 3 else shares.flip(0), TOP_K)  # hot ranks alternate
        ids, gates, logits = routing.route(bias, tokens, TOP_K, seed * RANKS + dist.get_rank())
        return torch.randn(tokens, HIDDEN, **self.bf16), ids, gates.contiguous(), logits

    def queue(self, n: int) -> list[torch.cuda.Event]:
        """Launches it on batch `n`; an event behind every stage, or behind all of them where they are a graph."""
        batch = self.batches[n % BATCHES]
        if self.graph is None:
            return [self._event() for _ in self._stages(*batch)]
        for static, x in zip(self.inputs, batch, strict=True):
            static.copy_(x)
        self.graph.replay()
        return [self._event()]

    def capture(self) -> None:
        """From here on a layer is one launch, behind copies of its inputs."""
        self.inputs, graph = [x.clone() for x in self.batches[0]], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            deque(self._stages(*self.inputs), maxlen=0)
        self.graph = graph

    def count(self, n: int, wait: bool) -> tuple[int, int]:
        """Of a dispatch that counts, behind what is queued: tokens that came, by DeepEP's count and by the routing."""
        if wait:
            torch.cuda.current_stream().synchronize()
        hidden, ids, gates, _ = (x[: FEW + n % 3] for x in self.batches[n % BATCHES])
        layout = self.buffer.get_dispatch_layout(ids, EXPERTS)
        tokens, *_ = normal_mode.dispatch(self.buffer, layout, hidden, ids, gates)
        came = layout[0].cpu().to(torch.int64)  # tokens per rank
        dist.all_reduce(came)
        return len(tokens), int(came[dist.get_rank()])

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def _stages(self, hidden, ids, gates, logits):
        """Yields behind each of STAGES."""
        x = hidden
        for _ in range(self.attention):
            x = x @ self.square
        yield
        planned = self.plan(RoutedTokens(hidden, ids, gates, logits, self.segment, 0), self.all_reduce)
        yield
        layout = self.buffer.get_dispatch_layout(planned.topk_ids, EXPERTS)
        yield
        given = hidden, planned.topk_ids, planned.topk_weights
        tokens, ids, gates, _, handle, _ = normal_mode.dispatch(
            self.buffer, layout, *given, num_worst_tokens=self.room.tokens
        )
        yield
        received = bounded.Received(tokens, None, ids, gates, EXPERTS // RANKS, self.room.rows, self.workspace)
        rows, _, index = received.permute()
        yield
        gate_up = torch.empty(len(rows), 2 * INTERMEDIATE, **self.bf16)
        gemm = deep_gemm.m_grouped_bf16_gemm_nt_contiguous
        gemm(rows, self.w13, gate_up, index.expert_end, use_psum_layout=True)
        yield
        gate, up = gate_up.chunk(2, -1)
        activated = torch.nn.functional.silu(gate) * up
        yield
        gemm(activated, self.w2, rows, index.expert_end, use_psum_layout=True)
        yield
        outputs = received.gather(rows, index.place)
        yield
        self.buffer.combine(outputs, handle)
        yield


def say(layer: int, events: list[torch.cuda.Event]) -> None:
    ended = [name for name, event in zip(STAGES, events, strict=False) if event.query()]  # a graph has one event
    print(f"rank {dist.get_rank()}: layer {layer} stands still; ended: {', '.join(ended) or 'none'}", flush=True)


def wait(queued: deque, timeout_s: float) -> None:
    """For the oldest layer. Ends the process, in time for the other rank to say so, too, where it does not end."""
    layer, events = queued[0]
    until = time.monotonic() + timeout_s
    while not events[-1].query():
        time.sleep(0.0002)
        if time.monotonic() > until:
            say(layer, events)
            time.sleep(2 * timeout_s)
            say(layer, events)
            os._exit(1)
    queued.popleft()


def soak(layer: Layer, options: argparse.Namespace, group: dist.ProcessGroup) -> dict:
    """Returns this rank's row of the result."""
    queued, began, host, n = deque(), time.monotonic(), 0.0, 0
    going_on = torch.ones(1, dtype=torch.int32)
    while going_on.item():
        for _ in range(TOGETHER):
            if len(queued) == options.ahead:
                wait(queued, options.timeout)
            launching = time.monotonic()
            queued.append((n, layer.queue(n)))
            host += time.monotonic() - launching
            n += 1
        if options.count:
            counted, came = layer.count(n, wait=options.count == "behind")
            if counted != came:
                print(
                    f"rank {dist.get_rank()}: behind layer {n} DeepEP counts {counted} tokens, {came} came", flush=True
                )
                os._exit(1)
        going_on[0] = time.monotonic() - began < options.seconds
        dist.broadcast(going_on, 0, group=group)
    torch.cuda.synchronize()
    each, of_host, lost = 1e6 * (time.monotonic() - began) / n, 1e6 * host / n, int(layer.workspace.lost)
    words = f"{n} layers, {each:.0f} us each, {of_host:.0f} us of the host, {lost} rows lost"
    print(f"rank {dist.get_rank()}: {words}", flush=True)
    if lost:
        os._exit(1)
    case = {name: getattr(options, name) for name in ("tokens", "gamma", "all_reduce", "graph", "share_gpu")}
    return {"op": "soak_bounded", "case": case, "layers": n, "layer_us": each, "host_us": of_host}


def run(rank: int, options: argparse.Namespace) -> None:
    torch.cuda.set_device(0 if options.share_gpu else rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=RANKS)
    group, all_reduce = dist.group.WORLD, dist.all_reduce
    if options.all_reduce == "peer":
        size = Plan(MacsConfig(), EXPERTS, RANKS).histogram_size
        all_reduce = PeerAllReduce(peer_memory.share(PeerAllReduce.region_bytes(RANKS, size), group), size)
    layer = Layer(options, group, all_reduce)
    layer.queue(0)  # compiles
    torch.cuda.synchronize()
    dist.barrier()
    if options.graph:
        layer.capture()
        dist.barrier()
    row = soak(layer, options, group)
    if options.out and rank == 0:
        gpus = 1 if options.share_gpu else RANKS
        result_file.write(options.out, [row], commit=options.commit, gpus=gpus)
    layer.buffer.destroy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser, required=False)
    parser.add_argument("--gamma", type=float, default=1.05)
    parser.add_argument("--tokens", type=int, default=8192, help="per rank")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--ahead", type=int, default=14, help="layers in front of the GPU")
    parser.add_argument("--attention", type=int, default=8, help="square matrix products in its place")
    parser.add_argument("--all-reduce", choices=("group", "peer"), default="group", help="of the plan")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for a layer")
    count = "every 100 layers a dispatch that counts: at once (its count is an earlier one's), or behind them"
    parser.add_argument("--count", choices=("at-once", "behind"), help=count)
    parser.add_argument("--graph", action="store_true", help="a layer is one CUDA graph")
    parser.add_argument("--share-gpu", action="store_true", help="both ranks on the first GPU, by CUDA MPS")
    parser.add_argument("--port", type=int, default=29555, help="of the rendezvous")
    options = parser.parse_args()
    with mps.shared_gpu(RANKS) if options.share_gpu else contextlib.nullcontext({}) as client:
        os.environ.update(client)
        torch.multiprocessing.spawn(run, (options,), nprocs=RANKS)
    print("soak: no layer stood still")
    return 0


if __name__ == "__main__":
    sys.exit(main())
