"""The bounded permutation on a GPU: its results, and its times against SGLang's kernels in the same run.

    python3 -m benchmarks.gpu.check_bounded --out FILE [--check-only]

Correct: every case of reference/bounded_case.py, the gather to the CPU's bits; sums equal to SGLang's to the bit;
and DeepGEMM's grouped GEMM over the ends of the experts' rows gives what it gives over each row's expert. Timed: two
ranks, 128 experts, top-8, hidden size 2048, gamma 1.05 and the worst case. Each by replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import result_file
from benchmarks.gpu.time_kernels import graph_us
from reference import bounded_case
from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.bounded import TILE, Received, Sizes, Workspace, room

SIZES = Sizes(num_ranks=2, num_experts=128, top_k=8, hidden_size=2048)
TOKENS = (2048, 4096, 8192, 16384)  # of a rank
INTERMEDIATE = 768
GAMMAS = (1.05, float("inf"))
BUFFERS = 3  # that take turns, so that nothing is in a cache from the pass before


def check() -> None:
    for seed, case in enumerate(bounded_case.CASES):
        for form in ("bf16", "fp8"):
            bounded_case.check_permute(ops.bounded_permute, case, form, seed, "cuda")
        bounded_case.check_gather(ops.bounded_gather, case, seed, "cuda", reference=ops.bounded_gather)
    bounded_case.check_lost(ops.bounded_permute, "cuda")
    print(f"{len(bounded_case.CASES)} cases right", flush=True)


@dataclass
class Dispatch:
    """What a rank gets of uniform routing: `received`, and what SGLang's kernels need beside it."""

    received: Received
    counts: Tensor  # [E_l] i32, filled up to tiles
    rows_needed: int

    @classmethod
    def of(cls, tokens: int, form: str, gamma: float, seed: int) -> Dispatch:
        g = torch.Generator("cuda").manual_seed(seed)
        group = tokens * SIZES.num_ranks
        chosen = torch.rand(group, SIZES.num_experts, generator=g, device="cuda").topk(SIZES.top_k).indices
        ids = torch.where(chosen < SIZES.local, chosen, -1)
        ids = torch.cat([ids[(ids >= 0).any(dim=1)], ids.new_full((int((ids < 0).all(dim=1).sum()), SIZES.top_k), -1)])
        x = torch.randn(group, SIZES.hidden_size, generator=g, device="cuda", dtype=torch.bfloat16)
        scales = torch.rand(group, SIZES.hidden_size // 128, generator=g, device="cuda") if form == "fp8" else None
        weights = torch.rand(ids.shape, generator=g, device="cuda")
        has = room(MacsConfig.from_preset("rank", gamma=gamma), SIZES, group, planned=True)
        x = x.to(torch.float8_e4m3fn) if form == "fp8" else x
        received = Received(x, scales, ids, weights, SIZES.local, has.rows, Workspace(x.device))
        rows = torch.bincount(ids[ids >= 0], minlength=SIZES.local)
        counts = ((rows + TILE - 1) // TILE * TILE).int()
        return cls(received, counts, int(counts.sum()))

    def scatter_by_sglang(self) -> Callable[[], tuple]:
        from sglang.kernels.ops.moe.ep_moe_kernels import ep_scatter, tma_align_input_scale

        r, rows = self.received, self.rows_needed
        out = r.tokens.new_empty(rows, SIZES.hidden_size)
        scales = r.topk_weights.new_empty(rows, SIZES.hidden_size // 128)
        m_indices, index = self.counts.new_empty(rows), torch.empty_like(r.topk_ids)
        start = torch.empty_like(self.counts)

        def scatter() -> tuple:
            counted = (self.counts, self.counts, start)
            ep_scatter(r.tokens, r.scales, r.topk_ids, *counted, out, scales, m_indices, index)
            return out, None if r.scales is None else tma_align_input_scale(scales), m_indices, index

        return scatter


def check_against_sglang(tokens: int) -> None:
    """Sums over the same outputs, told apart by what each row came from: SGLang's rows lie in another order."""
    from sglang.kernels.ops.moe.ep_moe_kernels import ep_gather

    one = Dispatch.of(tokens, "bf16", 1.05, 1)
    r = one.received
    rows, _, index = r.permute()
    theirs, _, _, their_index = one.scatter_by_sglang()()
    ours = r.gather(rows * 0.5, index.place)
    expected = torch.empty_like(ours)
    ep_gather(theirs * 0.5, r.topk_ids, r.topk_weights, their_index, expected)
    came = (r.topk_ids >= 0).any(dim=1)
    assert torch.equal(ours[came], expected[came]), "other bits than SGLang's ep_gather"
    print("the gather gives SGLang's bits", flush=True)


def gemm_operands(form: str, rows: Tensor, scales: Tensor | None) -> tuple:
    """(rows, weights [E_l, N, H], the GEMM)."""
    import deep_gemm

    g = torch.Generator("cuda").manual_seed(5)
    shape = (SIZES.local, 2 * INTERMEDIATE, SIZES.hidden_size)
    weights = torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)
    if form == "bf16":
        return rows, weights, deep_gemm.m_grouped_bf16_gemm_nt_contiguous
    blocks = torch.rand(shape[0], shape[1] // 128, shape[2] // 128, generator=g, device="cuda")
    return (rows, scales), (weights.to(torch.float8_e4m3fn), blocks), deep_gemm.m_grouped_fp8_gemm_nt_contiguous


def grouped_gemms(one: Dispatch, form: str) -> dict[str, Callable[[], Tensor]]:
    """The first GEMM of the experts over our buffer, by ends and by -1, and over SGLang's."""
    rows, scales, index = one.received.permute()
    a, b, gemm = gemm_operands(form, rows, scales)
    marked = torch.full((len(rows),), -1, dtype=torch.int32, device="cuda")  # each row's expert
    marked[: one.rows_needed] = torch.arange(SIZES.local, device="cuda").repeat_interleave(one.counts).int()
    theirs, their_scales, m_indices, _ = one.scatter_by_sglang()()
    their_a = gemm_operands(form, theirs, their_scales)[0]
    width = 2 * INTERMEDIATE
    out, their_out = (x.new_empty(x.shape[0], width, dtype=torch.bfloat16) for x in (rows, theirs))
    return {
        "ends": lambda: gemm(a, b, out, index.expert_end, use_psum_layout=True) or out,
        "minus one": lambda: gemm(a, b, out, marked) or out,
        "sglang": lambda: gemm(their_a, b, their_out, m_indices) or their_out,
    }


def check_gemm(tokens: int) -> None:
    for form in ("bf16", "fp8"):
        one = Dispatch.of(tokens, form, 1.05, 2)
        place = one.received.permute()[2].place
        used = place[place >= 0].long()
        gemms = grouped_gemms(one, form)
        by_end = gemms["ends"]()[used].clone()
        assert torch.equal(by_end, gemms["minus one"]()[used]), f"{form}: ends give other bits"
    print("the grouped GEMM over ends gives the bits of that over each row's expert", flush=True)


def times(of_a_rank: int, form: str, gamma: float) -> list[dict]:
    from sglang.kernels.ops.moe.ep_moe_kernels import ep_gather

    several = [Dispatch.of(of_a_rank, form, gamma, seed) for seed in range(BUFFERS)]
    case = {"T": of_a_rank, "H": SIZES.hidden_size, "E": SIZES.num_experts, "K": SIZES.top_k, "R": SIZES.num_ranks}
    case |= {"dtype": form, "gamma": "inf" if gamma == float("inf") else gamma, "rows": several[0].received.rows}
    scatters = [one.scatter_by_sglang() for one in several]
    moved = sum(int((one.received.topk_ids >= 0).sum()) for one in several) / BUFFERS
    element = several[0].received.tokens.element_size()
    measured = {
        "bounded_permute": ([one.received.permute for one in several], scatters, "SGLang's ep_scatter"),
    }
    gathers, theirs = [], []
    for one, scatter in zip(several, scatters, strict=True):
        rows, _, index = one.received.permute()
        out, _, _, their_index = scatter()
        r, x, their_x = one.received, rows.to(torch.bfloat16), out.to(torch.bfloat16)
        tokens = x.new_empty(r.tokens.shape)
        gathers.append(partial(r.gather, x, index.place))
        theirs.append(partial(ep_gather, their_x, r.topk_ids, r.topk_weights, their_index, tokens))
    measured["bounded_gather"] = (gathers, theirs, "SGLang's ep_gather")
    gemms = [grouped_gemms(one, form) for one in several[:1]]
    measured["grouped_gemm_ends"] = ([x["ends"] for x in gemms], [x["sglang"] for x in gemms], "over SGLang's rows")
    measured["grouped_gemm_minus_one"] = (
        [x["minus one"] for x in gemms],
        [x["sglang"] for x in gemms],
        "over SGLang's rows",
    )
    found = []
    for name, (own, other, against) in measured.items():
        median, p99 = graph_us(own)
        reference, _ = graph_us(other)
        one_row = {"op": name, "case": case, "median_us": round(median, 2), "p99_us": round(p99, 2)}
        one_row |= {"against": against, "against_us": round(reference, 2), "ratio": round(median / reference, 3)}
        found.append(one_row)
        if name == "bounded_permute":
            found[-1]["bytes"] = int((moved + 2 * of_a_rank) * SIZES.hidden_size * element)
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_options(parser, required=False)
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    check()
    check_against_sglang(2048)
    check_gemm(2048)
    if options.check_only:
        return
    if options.out is None:
        parser.error("--out is needed")
    rows = []
    for tokens in TOKENS:
        for form in ("bf16", "fp8"):
            for gamma in GAMMAS if tokens == 8192 else GAMMAS[:1]:
                rows += times(tokens, form, gamma)
                result_file.write(options.out, rows, commit=options.commit)
    print("check_bounded OK")


if __name__ == "__main__":
    main()
