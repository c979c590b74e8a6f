"""What a round of the fused dispatch and combine left behind, against fused_reference. The first difference raises."""

from __future__ import annotations

import fused_c as fc
import fused_reference as reference
import numpy as np
import torch
from check_kernels import ENTROPY_ATOL, WEIGHT_RTOL, Mismatch, entropy_f64, expect, weight_f64
from fused_case import Group, Inputs
from kernel_case import POISON
from torch import Tensor


def expect_same(name: str, group: Group, got: Tensor, want: Tensor) -> None:
    """Tensors equal to the bit."""
    expect(name, group.config, got.cpu().numpy(), want.cpu().numpy())


def check_dispatch(group: Group, ranks: list[Inputs]) -> reference.Placement:
    """Weights close; decisions, places, rows and scales to the bit; nothing written beside them."""
    check_no_fault(group)
    weights = [check_weight(group, rank, inputs) for rank, inputs in enumerate(ranks)]
    plans = reference.plan_group(group.config, ranks, weights)
    for rank, (plan, inputs) in enumerate(zip(plans, ranks, strict=True)):
        check_plan(group, rank, plan, inputs)
    placement = reference.place(group.config, kept_ids(group, [plan.ids for plan in plans]))
    check_places(group, placement)
    check_rows(group, ranks, placement)
    check_guards(group)
    return placement


def check_no_fault(group: Group) -> None:
    for rank in range(len(group.ranks)):
        status = group.status(rank)
        if status.fault:
            raise Mismatch(f"rank {rank}: {describe(status)}; {group.config}")


def describe(status: fc.FusedStatus) -> str:
    """A recorded fault in words."""
    name = fc.FAULTS[status.fault] if 0 <= status.fault < len(fc.FAULTS) else status.fault
    of = f"rank {status.peer}, block {status.block}, round {status.round}"
    return f"{name}: {of}, seen {status.seen}, expected {status.expected}"


def check_guards(group: Group) -> None:
    if damaged := group.arena.damaged():
        raise Mismatch(f"written outside of {', '.join(damaged)}; {group.config}")


def output(group: Group, rank: int, name: str) -> np.ndarray:
    """An output of a rank; those that have a row for each token, cut to its tokens."""
    tensor = group.ranks[rank].outputs[name]
    cut = name in ("new_ids", "new_weights", "weight", "combined")
    return (tensor[: group.structs[rank].num_tokens] if cut else tensor).cpu().numpy()


def check_weight(group: Group, rank: int, inputs: Inputs) -> np.ndarray:
    """[T] as the kernel has it: what everything else is decided by."""
    config, tokens = group.config, len(inputs.ids)
    weight = output(group, rank, "weight")
    if not config.needs_entropy:
        expect("weight without entropies", config, weight, np.where(inputs.segment >= 0, 0.5, 1.0).astype(np.float32))
        return weight
    entropy = group.part(rank, "entropy", torch.float32, config.plan.T)[:tokens].cpu().numpy()
    expect("entropy", config, entropy, entropy_f64(inputs.hidden, inputs.segment), 2e-6, ENTROPY_ATOL)
    want = weight_f64(entropy, inputs.segment, config.plan.num_segments, config.plan.delta)
    expect("weight", config, weight, want, WEIGHT_RTOL, 1e-7)
    return weight


def check_plan(group: Group, rank: int, plan: reference.RankPlan, inputs: Inputs) -> None:
    config = group.config
    ids, weights = output(group, rank, "new_ids"), output(group, rank, "new_weights")
    expect(f"rank {rank} sums", config, output(group, rank, "sums"), plan.sums)
    expect(f"rank {rank} cut", config, output(group, rank, "cut"), plan.cut)
    expect(f"rank {rank} new_ids", config, ids, plan.ids)
    expect(f"rank {rank} counts", config, output(group, rank, "counts"), plan.counts)
    kept = plan.ids == inputs.ids
    expect(f"rank {rank} kept weights", config, weights[kept], inputs.gates[kept])
    expect(f"rank {rank} new_weights", config, weights, plan.weights, WEIGHT_RTOL)


def kept_ids(group: Group, ids_of_rank: list[np.ndarray]) -> Tensor:
    """[R, T, K] i64 on the group's device, -1 behind a rank's tokens."""
    f = group.config.plan
    ids = torch.full((f.R, f.T, f.K), -1)
    for rank, one in enumerate(ids_of_rank):
        ids[rank, : len(one)] = torch.from_numpy(one)
    return ids.to(group.arena.device)


def check_places(group: Group, placement: reference.Placement) -> None:
    config, f, local = group.config, group.config.plan, group.config.local
    for rank in range(f.R):
        tokens, mine = group.structs[rank].num_tokens, slice(rank * local, (rank + 1) * local)
        for name in ("received", "starts"):
            got = group.part(rank, name, torch.int32, local)
            expect_same(f"rank {rank} {name}", group, got, getattr(placement, name)[mine])
        got = group.part(rank, "positions", torch.int32, f.T, f.K)[:tokens]
        expect_same(f"rank {rank} positions", group, got, placement.positions[rank, :tokens])
        source = placement.source[rank]
        got = group.part(rank, "sources", torch.int32, config.rows)
        want = (source // max(f.T, 1) << 16) | source % max(f.T, 1)
        expect_same(f"rank {rank} sources", group, got[source >= 0], want[source >= 0])
        if config.row_experts:
            row = torch.arange(config.rows, device=source.device)
            owner = torch.searchsorted(placement.starts[mine].contiguous(), row, right=True) - 1
            got = group.ranks[rank].outputs["row_experts"]
            expect_same(f"rank {rank} row_experts", group, got, torch.where(source < 0, -1, owner))


def check_rows(group: Group, ranks: list[Inputs], placement: reference.Placement) -> None:
    """Every byte of the buffers of rows and scales: what was sent, or the poison."""
    config, f = group.config, group.config.plan
    hidden = torch.zeros((f.R, f.T, f.H), dtype=torch.bfloat16)
    for rank, inputs in enumerate(ranks):
        hidden[rank, : len(inputs.ids)] = inputs.hidden.cpu()
    features, scales = reference.cast(hidden.view(-1, f.H).to(group.arena.device), config.format)
    poison = int.from_bytes(bytes([POISON]) * 4, "little")
    for rank, source in enumerate(placement.source):
        empty = (source < 0).unsqueeze(1)
        got = group.part(rank, "rows", torch.uint8, config.rows, features.shape[1])
        wrong = got != torch.where(empty, POISON, features[source.clamp(min=0)])
        if wrong.any():
            row = int(wrong.any(1).nonzero()[0])
            whose = int(source[row])
            raise Mismatch(
                f"rank {rank} row {row} of source {whose // f.T if whose >= 0 else None} token {whose % f.T}: "
                f"{int(wrong[row].sum())} bytes wrong, {int(wrong.any(1).sum())} rows wrong; {config}"
            )
        if scales is not None:
            got = scales_by_row(group, rank, scales.shape[1])
            expect_same(f"rank {rank} scales", group, got, torch.where(empty, poison, scales[source.clamp(min=0)]))


def scales_by_row(group: Group, rank: int, words: int) -> Tensor:
    """[rows, words] i32 out of the column-major buffer."""
    config = group.config
    if not config.expert_rows:
        return group.part(rank, "scales", torch.int32, words, config.rows).T
    by_expert = group.part(rank, "scales", torch.int32, config.local, words, config.expert_rows)
    return by_expert.transpose(1, 2).reshape(config.rows, words)


def fresh_outputs(group: Group, seed: int) -> Tensor:
    """[R, rows, H] bf16: what the experts might have made of the rows."""
    generator = torch.Generator(group.arena.device).manual_seed(seed)
    shape = (group.config.plan.R, group.config.rows, group.config.plan.H)
    return torch.randn(shape, generator=generator, device=group.arena.device).bfloat16()


def check_combine(group: Group, placement: reference.Placement, outputs: Tensor) -> None:
    """Sums in f32 and one rounding to bf16; zeros for a token without a row."""
    check_no_fault(group)
    tokens = [rank.num_tokens for rank in group.structs]
    ids = kept_ids(group, [output(group, rank, "new_ids") for rank in range(len(tokens))])
    weights = torch.zeros(ids.shape, dtype=torch.float32)
    for rank in range(len(tokens)):
        weights[rank, : tokens[rank]] = torch.from_numpy(output(group, rank, "new_weights"))
    want, size = reference.combine(group.config, ids, weights.to(ids.device), placement.positions, outputs)
    for rank, number in enumerate(tokens):
        got = group.ranks[rank].outputs["combined"][:number].double()
        off = (got - want[rank, :number]).abs() - 2.0**-8 * want[rank, :number].abs() - 1e-6 * size[rank, :number]
        if (off > 0).any() or not torch.isfinite(got).all():
            token = int((~(off <= 0)).any(1).nonzero()[0])
            raise Mismatch(f"rank {rank} combined[{token}]: off by {float(off[token].max()):.3g}; {group.config}")
    check_guards(group)
