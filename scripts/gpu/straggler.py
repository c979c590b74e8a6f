"""How much sooner the slowest rank's expert stage ends: eight expert-parallel ranks on one GPU, a process each.

    python3 scripts/gpu/straggler.py --out FILE        (CUDA MPS; sglang, deep_ep and deep_gemm installed)

Every rank holds its share of the SMs and of the experts of one Qwen3-VL-30B-A3B layer (128 experts, top-8, hidden 2048,
intermediate 768, bf16). A round: plan (histograms added over gloo), DeepEP's low-latency dispatch (send, host
barrier, receive), DeepGEMM's masked grouped GEMMs around SiLU, combine. The expert stage alone is timed, repeated
within one pair of events: `together` with all ranks at once, `alone` one rank after the other, as on GPUs of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

RANKS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 128, 8, 2048, 768
LOCAL = EXPERTS // RANKS
TOKENS = 480  # a rank; DeepEP's queues take fewer than 512
CASES = {"1.27": 1.27, "1.5": 1.5, "1.95": 1.95, "layer 3": None}
BOUNDS = (1.05, 1.2)
METHODS = ("cai", "paper", "rank")
VISUAL = 0.9
REPEATS, INNER = 9, 4  # samples, and stages within one sample


# ---- One rank ------------------------------------------------------------------------------------------------------


class Experts:
    """This rank's experts; weights are made from the expert's number, so that any rank can make any expert's."""

    def __init__(self, rank: int) -> None:
        import deep_gemm
        import torch
        from sglang.kernels.ops.moe.ep_moe_kernels import silu_and_mul_masked_fwd

        self.gemm, self.activate = deep_gemm.m_grouped_bf16_gemm_nt_masked, silu_and_mul_masked_fwd
        deep_gemm.set_num_sms(torch.cuda.get_device_properties(0).multi_processor_count // 2 * 2)
        pairs = [weights_of(rank * LOCAL + i) for i in range(LOCAL)]
        self.w13, self.w2 = (torch.stack(ws) for ws in zip(*pairs, strict=True))
        rows = RANKS * TOKENS
        self.gate_up = torch.empty(LOCAL, rows, 2 * INTERMEDIATE, dtype=torch.bfloat16, device="cuda")
        self.act = torch.empty(LOCAL, rows, INTERMEDIATE, dtype=torch.bfloat16, device="cuda")
        self.out = torch.empty(LOCAL, rows, HIDDEN, dtype=torch.bfloat16, device="cuda")

    def __call__(self, received, counts):
        expected = TOKENS * RANKS * TOP_K // EXPERTS
        self.gemm(received, self.w13, self.gate_up, counts, expected)
        self.activate(self.gate_up, self.act, counts)
        self.gemm(self.act, self.w2, self.out, counts, expected)
        return self.out


def weights_of(expert: int):
    """(w13 [2I, H], w2 [H, I]) bf16 of one expert."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(1000 + expert)
    shapes = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    return tuple((torch.randn(s, generator=generator, device="cuda") * s[1] ** -0.5).bfloat16() for s in shapes)


def reference(hidden, ids, gates):
    """[T, H] f32: the MoE layer of a few tokens, expert by expert."""
    import torch

    out = torch.zeros(hidden.shape, device="cuda")
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        w13, w2 = weights_of(expert)
        gate, up = (hidden @ w13.T).float().chunk(2, -1)
        result = ((torch.nn.functional.silu(gate) * up).bfloat16() @ w2.T).float()
        out += result * (gates * (ids == expert)).sum(1, keepdim=True)
    return out


class Rank:
    """One expert-parallel rank: DeepEP's buffer, its experts, and the group."""

    def __init__(self, rank: int) -> None:
        import deep_ep
        import torch
        import torch.distributed as dist

        self.rank, self.torch, self.dist = rank, torch, dist
        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, RANKS, EXPERTS)
        self.buffer = deep_ep.Buffer(
            dist.group.WORLD,
            num_rdma_bytes=size,
            low_latency_mode=True,
            num_qps_per_rank=LOCAL,
            explicitly_destroy=True,
        )
        self.experts = Experts(rank)

    def barrier(self) -> None:
        self.torch.cuda.synchronize()
        self.dist.barrier()

    def all_reduce(self, histogram) -> None:
        """Over gloo: NCCL between ranks of one GPU is not what is measured here."""
        on_host = histogram.cpu()
        self.dist.all_reduce(on_host)
        histogram.copy_(on_host)

    def dispatch(self, hidden, ids):
        received, counts, handle, _, hook = self.buffer.low_latency_dispatch(
            hidden, ids, TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        self.barrier()
        hook()
        self.barrier()
        return received, counts, handle

    def combine(self, output, ids, gates, handle):
        combined, _, hook = self.buffer.low_latency_combine(output, ids, gates, handle, return_recv_hook=True)
        self.barrier()
        hook()
        self.barrier()
        return combined

    def stage_us(self, received, counts) -> float:
        """Median microseconds of one expert stage."""
        samples = []
        for _ in range(REPEATS):
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(INNER):
                self.experts(received, counts)
            end.record()
            self.torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / INNER)
        return sorted(samples)[REPEATS // 2]

    def gather(self, value) -> list:
        everyone = [None] * RANKS
        self.dist.all_gather_object(everyone, value)
        return everyone

    def round(self, hidden, ids, gates, check: bool) -> dict:
        """Dispatch, timed experts, combine; the output of a few tokens is checked."""
        ids = ids.long()
        received, counts, handle = self.dispatch(hidden, ids)
        together = self.stage_us(received, counts)
        self.barrier()
        alone = 0.0
        for turn in range(RANKS):
            if turn == self.rank:
                alone = self.stage_us(received, counts)
            self.barrier()
        combined = self.combine(self.experts(received, counts), ids, gates, handle)
        worst = 0.0
        if check:
            expected = reference(hidden[:8], ids[:8], gates[:8])
            worst = float((combined[:8].float() - expected).norm() / expected.norm())
        state = self.gather((int(counts.sum()), together, alone, worst))
        rows, together, alone, worst = (list(column) for column in zip(*state, strict=True))
        assert max(worst) < 0.02, f"combined output differs from the reference: {worst}"
        return {"rows": rows, "together_us": together, "alone_us": alone, "worst_error": max(worst)}


def planned(rank: Rank, method: str, gamma: float, batch: dict):
    """(ids, gates, {"clipped", "rerouted", "dropped"} over the group) of one method at one bound."""
    from sglang_macs.config import MacsConfig
    from sglang_macs.plan import Plan

    plan = Plan(MacsConfig.from_preset(method, gamma=gamma), EXPERTS, RANKS)
    result = plan(batch["hidden"], batch["ids"], batch["gates"], batch["logits"], batch["segment"], 1, rank.all_reduce)
    _, clipped, rerouted = result.counts.sum(dim=(1, 2)).tolist()
    total = [sum(column) for column in zip(*rank.gather((clipped, rerouted)), strict=True)]
    return (
        result.topk_ids,
        result.topk_weights,
        {"clipped": total[0], "rerouted": total[1], "dropped": total[0] - total[1]},
    )


def run_case(rank: Rank, name: str) -> list[dict]:
    """Rows of one routing: unclipped, then every method at every bound."""
    import routing
    import torch

    shares = routing.published(3) if CASES[name] is None else routing.skewed(EXPERTS, RANKS, CASES[name])
    bias = routing.fit_bias(shares, TOP_K)
    generator = torch.Generator(device="cuda").manual_seed(rank.rank)
    batch = dict(zip(("ids", "gates", "logits"), routing.route(bias, TOKENS, TOP_K, 77 + rank.rank), strict=True))
    scale = torch.rand(TOKENS, 1, generator=generator, device="cuda") + 0.5
    batch["hidden"] = (torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda") * scale).bfloat16()
    batch["segment"] = torch.where(torch.rand(TOKENS, generator=generator, device="cuda") < VISUAL, 0, -1).int()
    free = {"clipped": 0, "rerouted": 0, "dropped": 0}
    before = rank.round(batch["hidden"], batch["ids"], batch["gates"], check=True)
    rows = [{"case": {"routing": name, "method": "unclipped"}, **before, "assignments": free}]
    for method in METHODS:
        for bound in BOUNDS:
            ids, gates, fate = planned(rank, method, bound, batch)
            after = rank.round(batch["hidden"], ids, gates, check=bound == BOUNDS[0])
            rows.append({"case": {"routing": name, "method": method, "gamma": bound}, **after, "assignments": fate})
            rows[-1] |= judge(before, after, bound if method == "rank" else None)
    return rows


def judge(before: dict, after: dict, bound: float | None) -> dict:
    """Speed-up of the slowest rank beside the ideal: as many times faster as its rows are fewer."""
    mean = sum(before["rows"]) / RANKS
    most = bound * mean if bound else max(after["rows"])
    ideal = max(1.0, max(before["rows"]) / most)
    result = {"ideal": ideal}
    for when in ("together_us", "alone_us"):
        speedup = max(before[when]) / max(after[when])
        result[when.replace("_us", "")] = {"speedup": speedup, "share_of_ideal": speedup / ideal}
    return result


def run_rank(rank: int, init: str, out: str) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=RANKS)
    one = Rank(rank)
    rows = []
    for name in CASES:
        rows += run_case(one, name)
        if rank == 0:
            Path(out).write_text(json.dumps(rows))
            print(f"{name}: done", flush=True)
    one.buffer.destroy()
    dist.destroy_process_group()


# ---- The launcher --------------------------------------------------------------------------------------------------


def share_the_gpu(folder: str) -> dict[str, str]:
    """Starts MPS in `folder`; the environment of its clients."""
    mps = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **mps}, check=True)
    return mps | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // RANKS)}


def quit_mps(mps: dict[str, str]) -> None:
    subprocess.run(
        ["nvidia-cuda-mps-control"], input="quit -t 1\n", text=True, env={**os.environ, **mps}, check=False, timeout=30
    )


def run_group(out: str, seconds: float) -> int:
    """Runs all ranks; 0 if every one ended well in time."""
    with tempfile.TemporaryDirectory() as folder:
        mps = share_the_gpu(folder)
        try:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--out", out, "--rank", str(rank), "--init", f"{folder}/init"],
                    env={**os.environ, **mps},
                )
                for rank in range(RANKS)
            ]
            deadline = time.monotonic() + seconds
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.2)
            for rank in ranks:
                rank.kill()
            return max(abs(rank.wait()) for rank in ranks)
        finally:
            quit_mps(mps)


def report(rows: list[dict]) -> None:
    print(f"{'routing':8s} {'method':10s} {'gamma':>5s} {'max rows':>8s} {'drop %':>6s} {'together':>9s} {'alone':>9s}")
    total = TOKENS * TOP_K * RANKS
    for row in rows:
        case, parts = row["case"], []
        for when in ("together", "alone"):
            share = f"{row[when]['share_of_ideal']:5.0%}" if when in row else "     "
            parts.append(f"{max(row[when + '_us']):6.0f} us {share}")
        dropped = 100 * row["assignments"]["dropped"] / total
        name = f"{case['routing']:8s} {case['method']:10s} {case.get('gamma', ''):>5}"
        print(f"{name} {max(row['rows']):8d} {dropped:6.1f} {'  '.join(parts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--init")
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.init, options.out)
        return 0
    failed = run_group(options.out, options.seconds)
    rows = json.loads(Path(options.out).read_text()) if Path(options.out).exists() else []
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    result = {
        "gpu": gpu.stdout.strip().splitlines()[0],
        "commit": options.commit,
        "command": "python3 scripts/gpu/straggler.py",
        "date": datetime.now(UTC).date().isoformat(),
        "ranks": RANKS,
        "tokens_per_rank": TOKENS,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=1))
    report(rows)
    print("straggler: " + ("FAILED, status " + str(failed) if failed else "OK"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
