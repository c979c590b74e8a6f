"""What a round of the fused dispatch and combine left behind, against fused_reference. The first difference raises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import fused_c as fc
from . import fused_reference as reference
from .comparison import ENTROPY_ATOL, WEIGHT_RTOL, Mismatch, entropy_f64, expect, weight_f64
from .fused_case import Group, Inputs, make_group
from .kernel_case import POISON, POISON_WORD


def expect_same(name: str, group: Group, got: Tensor, want: Tensor) -> None:
    """Tensors equal to the bit."""
    expect(name, group.config, got.cpu().numpy(), want.cpu().numpy())


def check_dispatch(group: Group, ranks: list[Inputs], weights: list[np.ndarray] | None = None) -> reference.Placement:
    """Weights close; decisions, places, rows and scales to the bit; nothing written beside them.

    ranks: inputs of the whole group. weights: the kernels' own of all ranks, where not all are played here.
    """
    check_no_fault(group)
    if group.config.carried:
        return check_carried(group, ranks)
    own = {rank: check_weight(group, rank, ranks[rank]) for rank in group.ranks}
    plans = reference.plan_group(group.config, ranks, weights or list(own.values()))
    for rank in group.ranks:
        check_plan(group, rank, plans[rank], ranks[rank])
    placement = reference.place(group.config, in_one(group, [plan.ids for plan in plans], -1))
    check_places(group, placement)
    check_rows(group, ranks, placement)
    check_guards(group)
    return placement


def check_carried(group: Group, ranks: list[Inputs]) -> reference.Placement:
    """Every row where it was routed to, nothing else written."""
    placement = reference.place(group.config, in_one(group, [inputs.ids for inputs in ranks], -1))
    check_places(group, placement)
    check_rows(group, ranks, placement)
    check_guards(group)
    return placement


def check_no_fault(group: Group) -> None:
    for rank in group.ranks:
        status = group.status(rank)
        if status.fault:
            raise Mismatch(f"rank {rank}: {describe(status)}; {group.config}")


def describe(status: fc.FusedStatus) -> str:
    """A recorded fault in words."""
    name = fc.FAULTS[status.fault] if 0 <= status.fault < len(fc.FAULTS) else status.fault
    of = f"rank {status.peer}, block {status.block}, epoch {status.epoch}"
    return f"{name}: {of}, seen {status.seen}, expected {status.expected}"


def check_guards(group: Group) -> None:
    if damaged := group.arena.damaged():
        raise Mismatch(f"written outside of {', '.join(damaged)}; {group.config}")


def output(group: Group, rank: int, name: str) -> np.ndarray:
    """An output of a rank; those that have a row for each token, cut to its tokens."""
    tensor = group.tensors[rank].outputs[name]
    cut = name in ("new_ids", "new_weights", "weight", "combined")
    return (tensor[: group.structs[rank].num_tokens] if cut else tensor).cpu().numpy()


def check_weight(group: Group, rank: int, inputs: Inputs) -> np.ndarray:
    """[T] as the kernel has it: what everything else is decided by."""
    config, tokens = group.config, len(inputs.ids)
    weight = output(group, rank, "weight")
    if not config.needs_entropy:
        expect("weight without entropies", config, weight, np.where(inputs.segment >= 0, 0.5, 1.0).astype(np.float32))
        return weight
    ll_words = group.part(rank, "entropy", torch.float32, config.plan.T, 2)[:tokens]
    entropy = ll_words[:, 0].cpu().numpy()
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


def in_one(group: Group, of_rank: list[np.ndarray], empty: float) -> Tensor:
    """[T, K] of every rank as [R, T, K] on the group's device, `empty` behind a rank's tokens."""
    f = group.config.plan
    dtype = torch.from_numpy(of_rank[0]).dtype
    whole = torch.full((f.R, f.T, f.K), empty, dtype=dtype)
    for rank, one in enumerate(of_rank):
        whole[rank, : len(one)] = torch.from_numpy(one)
    return whole.to(group.arena.device)


def check_places(group: Group, placement: reference.Placement) -> None:
    config, f, local = group.config, group.config.plan, group.config.local
    for rank in group.ranks:
        tokens, mine = group.structs[rank].num_tokens, slice(rank * local, (rank + 1) * local)
        for name in ("received", "starts"):
            got = group.part(rank, name, torch.int32, local)
            expect_same(f"rank {rank} {name}", group, got, getattr(placement, name)[mine])
        got = group.part(rank, "positions", torch.int32, f.T, f.K)[:tokens]
        expect_same(f"rank {rank} positions", group, got, placement.positions[rank, :tokens])
        source = placement.source[rank]
        got = group.part(rank, "sources", torch.int32, config.rows)
        want = (source // max(f.T, 1) << 16) | source % max(f.T, 1)
        if not config.names_sources:
            want = torch.full_like(want, POISON_WORD)
        expect_same(f"rank {rank} sources", group, got[source >= 0], want[source >= 0])
        if config.row_experts:
            row = torch.arange(config.rows, device=source.device)
            owner = torch.searchsorted(placement.starts[mine].contiguous(), row, right=True) - 1
            got = group.tensors[rank].outputs["row_experts"]
            expect_same(f"rank {rank} row_experts", group, got, torch.where(source < 0, -1, owner))


def check_rows(group: Group, ranks: list[Inputs], placement: reference.Placement) -> None:
    """Every byte of the buffers of rows and scales: what was sent, or the poison."""
    config, f = group.config, group.config.plan
    hidden = torch.zeros((f.R, f.T, f.H), dtype=torch.bfloat16, device=group.arena.device)
    for rank, inputs in enumerate(ranks):
        hidden[rank, : len(inputs.ids)] = inputs.hidden
    features, scales = reference.cast(hidden.view(-1, f.H), config.format)
    for rank in group.ranks:
        source = placement.source[rank]
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
            want = torch.where(empty, POISON_WORD, scales[source.clamp(min=0)])
            expect_same(f"rank {rank} scales", group, got, want)
            check_row_scales(group, rank)


def check_row_scales(group: Group, rank: int) -> None:
    """Where scales come with rows, all that came has been taken away again: 0. The poison elsewhere."""
    left = group.bytes_of(rank, "row_scales")
    want = 0 if group.config.scales_with_rows else POISON
    if (left != want).any():
        raise Mismatch(f"rank {rank}: {int((left != want).sum())} bytes of row_scales are not {want}; {group.config}")


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


def routed(group: Group, ranks: list[Inputs]) -> list[Decided] | None:
    """What combine goes by where nothing was planned; None: what the dispatch has decided."""
    return [(inputs.ids, inputs.gates) for inputs in ranks] if group.config.carried else None


Decided = tuple[np.ndarray, np.ndarray]  # a rank's new ids and new weights [T, K]


def check_combine(
    group: Group, placement: reference.Placement, outputs: Tensor, decided: list[Decided] | None = None
) -> None:
    """Sums in f32 and one rounding to bf16; zeros for a token without a row.

    outputs: [R, rows, H] of the whole group. decided: of all ranks, where not all are played here.
    """
    check_no_fault(group)
    decided = decided or [(output(group, rank, "new_ids"), output(group, rank, "new_weights")) for rank in group.ranks]
    ids = in_one(group, [ids for ids, _ in decided], -1)
    weights = in_one(group, [weights for _, weights in decided], 0.0)
    want, size = reference.combine(group.config, ids, weights, placement.positions, outputs)
    for rank in group.ranks:
        tokens = group.structs[rank].num_tokens
        got = group.tensors[rank].outputs["combined"][:tokens].double()
        off = (got - want[rank, :tokens]).abs() - 2.0**-8 * want[rank, :tokens].abs() - 1e-6 * size[rank, :tokens]
        if not bool((off <= 0).all()):
            token = int((~(off <= 0)).any(1).nonzero()[0])
            raise Mismatch(f"rank {rank} combined[{token}]: off by {float(off[token].max()):.3g}; {group.config}")
    check_guards(group)


def play(group: Group, seed: int, dispatch: Callable[[Group], None] = Group.dispatch) -> None:
    """One round of dispatch and combine over fresh data, everything checked."""
    ranks = make_group(group.config, seed, group.arena.device)
    group.load(ranks)
    group.poison()
    dispatch(group)
    placement = check_dispatch(group, ranks)
    outputs = fresh_outputs(group, seed)
    group.set_outputs(outputs)
    group.combine()
    check_combine(group, placement, outputs, routed(group, ranks))
