"""DeepEP V2 behind the plan between two processes: rows, ids and sums against a reference made of all ranks' tokens.

    python3 -m benchmarks.gpu.check_v2 --mps --direct            [--gamma 1.1 | --no-plan] [--rounds 24] [--out FILE]

A GPU a rank, or all on the first under MPS (deep_ep with ElasticBuffer). Over tools/rma_tcp the environment says so
(docs/design/between_nodes.md). Rows carry their rank and token in their first two features, so that each received row
is compared with its source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.gpu import mps, result_file
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

EXPERTS, TOP_K, HIDDEN, TOKENS = 128, 8, 2048, 128


def batch(rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Unequal numbers of tokens, at least one: a rank without any is another matter (SGLang pads it)."""
    generator = torch.Generator(device="cuda").manual_seed(1000 * seed + rank)
    tokens = [TOKENS, 37, 1, TOKENS - 1][(seed + rank) % 4]
    hidden = torch.randn(tokens, HIDDEN, generator=generator, device="cuda").bfloat16()
    hidden[:, 0], hidden[:, 1] = rank, torch.arange(tokens, device="cuda").bfloat16()  # whole up to 256
    logits = torch.randn(tokens, EXPERTS, generator=generator, device="cuda")
    logits[:, : EXPERTS // 4] += 1.0  # rank 0 has more to do
    gates, ids = logits.softmax(-1).topk(TOP_K)
    segment = torch.where(torch.rand(tokens, generator=generator, device="cuda") < 0.9, 0, -1).int()
    return {"hidden": hidden, "ids": ids.int(), "gates": gates, "logits": logits, "segment": segment}


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Of all ranks; lengths differ."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensor.cpu())
    return [t.cuda() for t in found]


def factor(expert: torch.Tensor) -> torch.Tensor:
    """What expert e does to a row: times (1 + e % 5) / 4, so that a row at a wrong expert shows."""
    return (1 + expert % 5).float() / 4


def loads_of(ids: list[torch.Tensor], ranks: int) -> list[int]:
    """Assignments to each rank's experts, of all ranks' tokens."""
    local = EXPERTS // ranks
    return [sum(int(((i // local == r) & (i >= 0)).sum()) for i in ids) for r in range(ranks)]


def check(buffer, hidden, ids, gates, rank: int, ranks: int, sms: int) -> float:
    """One dispatch and one combine. Returns the largest error of what comes back, relative to the largest value."""
    local = EXPERTS // ranks
    received, got_ids, got_gates, handle, event = buffer.dispatch(
        hidden,
        topk_idx=ids.long(),
        topk_weights=gates.float(),
        num_experts=EXPERTS,
        num_max_tokens_per_rank=TOKENS,
        expert_alignment=1,
        do_cpu_sync=True,
        num_sms=sms,
    )
    if event.event is not None:
        event.current_stream_wait()
    rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    received, got_ids, got_gates = received[:rows], got_ids[:rows], got_gates[:rows]

    all_hidden, all_ids = gather(hidden), gather(ids)
    expected = set()
    for source in range(ranks):
        here = (all_ids[source] // local == rank) & (all_ids[source] >= 0)
        expected |= {(source, token) for token in here.any(1).nonzero().flatten().tolist()}
    seen = set()
    for i, (source, token) in enumerate(received[:, :2].float().int().tolist()):
        assert (source, token) in expected and (source, token) not in seen, f"row {i}: {source, token} is not due here"
        seen.add((source, token))
        assert torch.equal(received[i], all_hidden[source][token]), f"row of {source, token} differs"
        wanted = all_ids[source][token]
        wanted = torch.where((wanted >= 0) & (wanted // local == rank), wanted - rank * local, -1)
        assert torch.equal(got_ids[i].int().sort().values, wanted.sort().values.int()), f"experts of {source, token}"
    assert len(seen) == len(expected), f"{len(expected) - len(seen)} rows did not come"

    weight = torch.where(got_ids >= 0, got_gates * factor(got_ids + rank * local), 0.0).sum(1)
    outputs = (received.float() * weight[:, None]).bfloat16()
    combined, _, event = buffer.combine(outputs, handle=handle)
    if event.event is not None:
        event.current_stream_wait()
    want = hidden.float() * torch.where(ids >= 0, gates.float() * factor(ids), 0.0).sum(1)[:, None]
    error = float((combined.float() - want).abs().max() / want.abs().max().clamp(min=1e-6))
    assert error < 0.02, f"combined differs by {error:.4f} of the largest"
    return error


def make_buffer(rank: int, args):
    """DeepEP's, over all ranks."""
    import deep_ep

    started = time.monotonic()
    buffer = deep_ep.ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=TOKENS,
        hidden=HIDDEN,
        num_topk=TOP_K,
        sl_idx=0,
        allow_hybrid_mode=not args.direct,
        prefer_overlap_with_compute=False,
        num_allocated_qps=args.qps,
        num_gpu_timeout_secs=args.timeout,
        num_cpu_timeout_secs=2 * args.timeout,
        explicitly_destroy=True,
    )
    domains = {"physical": buffer.get_physical_domain_size(), "logical": buffer.get_logical_domain_size()}
    print(f"rank {rank}: buffer after {time.monotonic() - started:.1f} s, {domains}", flush=True)
    return buffer, domains


def one_round(step: int, buffer, plan: Plan | None, rank: int, ranks: int, args) -> dict:
    """What a rank knows of a round that was right."""
    b = batch(rank, step)
    ids, gates = b["ids"], b["gates"]
    before = loads_of(gather(ids), ranks)
    if plan:
        tokens = RoutedTokens(b["hidden"], ids, gates, b["logits"], b["segment"], 1)
        planned = plan(tokens, dist.all_reduce)
        ids, gates = planned.topk_ids, planned.topk_weights
    if step == args.kill_at and rank == 1:
        os._exit(9)  # behind all that the ranks do over gloo: the other one is in V2's dispatch
    error = check(buffer, b["hidden"], ids, gates, rank, ranks, args.sms)
    after = loads_of(gather(ids), ranks)
    bound = args.gamma * sum(before) / ranks
    assert plan is None or max(after) <= bound + 1, f"{after} rows, over the bound of {bound:.0f}"
    return {"round": step, "rows_before": before, "rows_after": after, "error": round(error, 5)}


def run(rank: int, ranks: int, args) -> None:
    os.environ.setdefault("EP_REUSE_NCCL_COMM", "0")
    os.environ.setdefault("NCCL_DEBUG", "WARN")  # a plugin's errors end NCCL's progress thread without another word
    device = rank % torch.cuda.device_count()
    torch.cuda.set_device(device)
    here = {"rank": rank, "world_size": ranks, "device_id": torch.device("cuda", device)}
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=args.store, **here)
    buffer, domains = make_buffer(rank, args)
    plan = None if args.no_plan else Plan(MacsConfig.from_preset("rank", gamma=args.gamma), EXPERTS, ranks)
    case = {"mode": "direct" if args.direct else "hybrid", "gamma": None if args.no_plan else args.gamma, **domains}
    rows = []
    for step in range(args.rounds):
        rows.append({"op": "v2_round", "case": case, **one_round(step, buffer, plan, rank, ranks, args)})
        if rank == 0:
            print({name: value for name, value in rows[-1].items() if name not in ("op", "case")}, flush=True)
    if rank == 0 and args.out:
        faults = os.environ.get("RMA_TCP_FAULT", "")
        plugin = Path(os.environ.get("NCCL_RMA_PLUGIN", "")).stem
        result_file.write(
            args.out, rows, commit=args.commit, gpus=torch.cuda.device_count(), plugin=plugin, faults=faults
        )
    torch.cuda.synchronize()
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()
    print(f"rank {rank}: done", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser, required=False)
    parser.add_argument("--gamma", type=float, default=1.1)
    parser.add_argument("--no-plan", action="store_true")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--qps", type=int, default=9)
    parser.add_argument("--direct", action="store_true", help="allow_hybrid_mode=False: one NVLink domain")
    parser.add_argument("--sms", type=int, default=24, help="of a kernel: fewer than a rank's share of the GPU")
    parser.add_argument("--timeout", type=int, default=60, help="seconds that a kernel waits: others may still compile")
    parser.add_argument("--mps", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--kill-at", type=int, default=-1, help="rank 1 ends before this round")
    args = parser.parse_args()
    args.store = f"file:///tmp/check_v2.{os.getpid()}"
    # Not mp.spawn: it would end the ranks that have yet to notice that another one is gone.
    spawn, ranks = mp.get_context("spawn"), args.ranks
    processes = [spawn.Process(target=run, args=(rank, ranks, args)) for rank in range(ranks)]
    with mps.shared_gpu(ranks) if args.mps else contextlib.nullcontext({}) as client:
        os.environ.update(client)  # the ranks inherit it
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    codes = [process.exitcode for process in processes]
    print("check_v2: all rounds right" if not any(codes) else f"check_v2: exit codes {codes}")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
