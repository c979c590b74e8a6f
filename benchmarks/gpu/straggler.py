"""How much sooner the slowest rank's expert stage ends: eight expert-parallel ranks on one GPU, a process each.

    python3 -m benchmarks.gpu.straggler --out FILE        (CUDA MPS; sglang, deep_ep and deep_gemm installed)

Every rank holds its share of the SMs and of the experts of one Qwen3-VL-30B-A3B layer (128 experts, top-8, hidden 2048,
intermediate 768, bf16). A batch is planned as a whole (histograms added over gloo) and travels in parts, since DeepEP's
low-latency queues take fewer than 512 tokens: dispatch (send, host barrier, receive), and for the first part combine,
whose result is checked. Its rows gathered, the expert stage runs DeepGEMM's masked grouped GEMMs around SiLU. That
stage alone is timed, `together` with all ranks at once, and `alone` one rank after the other, as on GPUs of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu import mps, result_file

RANKS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 128, 8, 2048, 768
LOCAL = EXPERTS // RANKS
TOKENS = 480  # of a part and rank
PARTS = (1, 8)  # of a batch: 480 tokens per rank, 3840 tokens per rank
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
        self.empty = partial(torch.empty, dtype=torch.bfloat16, device="cuda")

    def stage(self, rows, counts, parts: int):
        """(run, out): the stage over `rows` [E_l, M, H], of which counts [E_l] i32 are filled."""
        most = rows.shape[1]
        expected = parts * TOKENS * RANKS * TOP_K // EXPERTS
        gate_up, act = self.empty(LOCAL, most, 2 * INTERMEDIATE), self.empty(LOCAL, most, INTERMEDIATE)
        out = self.empty(LOCAL, most, HIDDEN)

        def run():
            self.gemm(rows, self.w13, gate_up, counts, expected)
            self.activate(gate_up, act, counts)
            self.gemm(act, self.w2, out, counts, expected)

        return run, out


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
        import torch
        import torch.distributed as dist

        from benchmarks.gpu import low_latency

        self.rank, self.torch, self.dist = rank, torch, dist
        self.buffer = low_latency.make_buffer(TOKENS, HIDDEN, EXPERTS)
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

    def stage_us(self, run) -> float:
        """Median microseconds of one expert stage."""
        samples = []
        for _ in range(REPEATS):
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(INNER):
                run()
            end.record()
            self.torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / INNER)
        return sorted(samples)[REPEATS // 2]

    def gather(self, value) -> list:
        everyone = [None] * RANKS
        self.dist.all_gather_object(everyone, value)
        return everyone

    def gather_rows(self, hidden, ids):
        """All parts through DeepEP. Returns rows [E_l, M, H], counts [E_l] i32."""
        torch, arrived = self.torch, []
        for start in range(0, len(ids), TOKENS):
            received, counts, _ = self.dispatch(hidden[start : start + TOKENS], ids[start : start + TOKENS])
            arrived.append([received[e, :count].clone() for e, count in enumerate(counts.tolist())])
            self.barrier()
        joined = [torch.cat(of_expert) for of_expert in zip(*arrived, strict=True)]
        counts = torch.tensor([len(rows) for rows in joined], dtype=torch.int32, device="cuda")
        rows = self.experts.empty(LOCAL, -(-int(counts.max()) // 128) * 128, HIDDEN)
        for e, of_expert in enumerate(joined):
            rows[e, : len(of_expert)] = of_expert
        return rows, counts

    def check(self, hidden, ids, gates) -> float:
        """Relative error of dispatch, experts and combine on a few tokens of the first part."""
        received, counts, handle = self.dispatch(hidden[:TOKENS], ids[:TOKENS])
        run, out = self.experts.stage(received, counts, 1)
        run()
        combined = self.combine(out, ids[:TOKENS], gates[:TOKENS], handle)[:8].float()
        expected = reference(hidden[:8], ids[:8], gates[:8])
        return float((combined - expected).norm() / expected.norm())

    def round(self, hidden, ids, gates) -> dict:
        """The expert stage of one batch: rows and times of every rank."""
        ids = ids.long()
        error = self.check(hidden, ids, gates)
        rows, counts = self.gather_rows(hidden, ids)
        run, _ = self.experts.stage(rows, counts, len(ids) // TOKENS)
        run()
        self.barrier()
        together, alone = self.stage_us(run), 0.0
        self.barrier()
        for turn in range(RANKS):
            if turn == self.rank:
                alone = self.stage_us(run)
            self.barrier()
        state = self.gather((counts.tolist(), together, alone, error))
        expert_rows, together, alone, error = (list(column) for column in zip(*state, strict=True))
        assert max(error) < 0.02, f"combined output differs from the reference: {error}"
        found = {"rows": [sum(rows) for rows in expert_rows], "expert_rows": expert_rows}
        return {**found, "together_us": together, "alone_us": alone, "worst_error": max(error)}


def planned(rank: Rank, method: str, gamma: float, batch: dict):
    """(ids, gates, {"clipped", "rerouted", "dropped"} over the group) of one method at one bound."""
    from sglang_macs.config import MacsConfig
    from sglang_macs.plan.plan import Plan
    from sglang_macs.plan.tokens import RoutedTokens

    plan = Plan(MacsConfig.from_preset(method, gamma=gamma), EXPERTS, RANKS)
    tensors = (batch[name] for name in ("hidden", "ids", "gates", "logits", "segment"))
    result = plan(RoutedTokens(*tensors, 1), rank.all_reduce)
    _, clipped, rerouted = result.counts.sum(dim=(1, 2)).tolist()
    total = [sum(column) for column in zip(*rank.gather((clipped, rerouted)), strict=True)]
    return (
        result.topk_ids,
        result.topk_weights,
        {"clipped": total[0], "rerouted": total[1], "dropped": total[0] - total[1]},
    )


def make_batch(rank: Rank, name: str, parts: int) -> dict:
    """This rank's tokens: routing as the case has it, hidden states of differing spread, nine in ten visual."""
    import torch

    from benchmarks.gpu import routing

    shares = routing.published(3) if CASES[name] is None else routing.skewed(EXPERTS, RANKS, CASES[name])
    tokens = parts * TOKENS
    routed = routing.route(routing.fit_bias(shares, TOP_K), tokens, TOP_K, 77 + rank.rank)
    batch = dict(zip(("ids", "gates", "logits"), routed, strict=True))
    generator = torch.Generator(device="cuda").manual_seed(rank.rank)
    scale = torch.rand(tokens, 1, generator=generator, device="cuda") + 0.5
    batch["hidden"] = (torch.randn(tokens, HIDDEN, generator=generator, device="cuda") * scale).bfloat16()
    batch["segment"] = torch.where(torch.rand(tokens, generator=generator, device="cuda") < VISUAL, 0, -1).int()
    return batch


def run_case(rank: Rank, name: str, parts: int) -> list[dict]:
    """Rows of one routing: unclipped, then every method at every bound."""
    batch = make_batch(rank, name, parts)
    case = {"routing": name, "tokens_per_rank": parts * TOKENS}
    free = {"clipped": 0, "rerouted": 0, "dropped": 0}
    before = rank.round(batch["hidden"], batch["ids"], batch["gates"])
    rows = [{"case": {**case, "method": "unclipped"}, **before, "assignments": free}]
    for method in METHODS:
        for bound in BOUNDS:
            ids, gates, outcome = planned(rank, method, bound, batch)
            after = rank.round(batch["hidden"], ids, gates)
            row = {"case": {**case, "method": method, "gamma": bound}, **after, "assignments": outcome}
            rows.append(row | judge(before, after, bound if method == "rank" else None))
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
    for parts in PARTS:
        for name in CASES:
            rows += run_case(one, name, parts)
            if rank == 0:
                Path(out).write_text(json.dumps(rows))
                print(f"{parts * TOKENS} tokens, {name}: done", flush=True)
    one.buffer.destroy()
    dist.destroy_process_group()


# ---- The launcher --------------------------------------------------------------------------------------------------


def run_group(out: str, seconds: float) -> int:
    """Runs all ranks; 0 if every one ended well in time."""
    with tempfile.TemporaryDirectory() as folder, mps.shared_gpu(RANKS) as client:
        command = [sys.executable, "-m", "benchmarks.gpu.straggler", "--out", out, "--init", f"{folder}/init"]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env={**os.environ, **client}) for rank in range(RANKS)
        ]
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        for rank in ranks:
            rank.kill()
        return max(abs(rank.wait()) for rank in ranks)


def report(rows: list[dict]) -> None:
    print("tokens routing  method     gamma max rows drop %  together         alone")
    for row in rows:
        case, parts = row["case"], []
        for when in ("together", "alone"):
            share = f"{row[when]['share_of_ideal']:5.0%}" if when in row else "     "
            parts.append(f"{max(row[when + '_us']):6.0f} us {share}")
        dropped = 100 * row["assignments"]["dropped"] / (case["tokens_per_rank"] * TOP_K * RANKS)
        name = f"{case['tokens_per_rank']:6d} {case['routing']:8s} {case['method']:10s} {case.get('gamma', ''):>5}"
        print(f"{name} {max(row['rows']):8d} {dropped:6.1f} {'  '.join(parts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--init")
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.init, options.out)
        return 0
    failed = run_group(options.out, options.seconds)
    rows = json.loads(Path(options.out).read_text()) if Path(options.out).exists() else []
    sizes = {"ranks": RANKS, "experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN}
    result_file.write(options.out, rows, commit=options.commit, **sizes, intermediate_size=INTERMEDIATE)
    report(rows)
    print("straggler: " + ("FAILED, status " + str(failed) if failed else "OK"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
