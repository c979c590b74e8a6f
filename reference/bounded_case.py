"""Cases of the bounded permutation, and what its operators must give, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.bounded import Sizes
from sglang_macs.plan.plan import Plan

POISON = 7  # in every output before a call; as a byte, a bf16 or an integer
NOWHERE, LOST = -1, -2


@dataclass(frozen=True)
class Case:
    """tokens: received, the last `absent` of which never came; experts: of the rank; rows: of the buffer, None = just
    enough; one: all rows to the last expert.
    """

    tokens: int
    top_k: int
    experts: int
    tile: int = 4
    hidden_size: int = 128
    absent: int = 0
    rows: int | None = None
    one: bool = False

    def __str__(self) -> str:
        return (
            f"{self.tokens}x{self.top_k} to {self.experts}" + (", one" if self.one else "") + f", {self.absent} absent"
        )


CASES = [
    Case(0, 2, 3, rows=12),
    Case(1, 1, 1),
    Case(5, 2, 7, tile=1),
    Case(40, 4, 6, absent=40, rows=24),  # no token came
    Case(300, 8, 16, absent=33, tile=128),
    Case(300, 8, 16, absent=33, rows=1500),
    Case(520, 3, 5, one=True),
    Case(700, 32, 40, hidden_size=64),
    Case(260, 6, 300, tile=2),
    Case(70, 8, 8, hidden_size=2304, absent=3),  # more than a lane has in flight
]


def topk_ids(case: Case, seed: int) -> Tensor:
    """[N, K] i64: distinct experts, about half of the slots empty."""
    g = torch.Generator().manual_seed(seed)
    if case.one:
        ids = torch.full((case.tokens, case.top_k), -1)
        slots = torch.randint(case.top_k, (case.tokens, 1), generator=g)
        return ids.scatter_(1, slots, case.experts - 1)
    order = torch.rand(case.tokens, max(case.experts, case.top_k), generator=g).argsort(dim=1)[:, : case.top_k]
    here = (order < case.experts) & (torch.rand(order.shape, generator=g) < 0.5)
    ids = torch.where(here, order, -1)
    ids[case.tokens - case.absent :] = -1
    return ids


def rows_needed(ids: Tensor, experts: int, tile: int) -> int:
    return sum(-(-int((ids == e).sum()) // tile) * tile for e in range(experts))


def arguments(case: Case, format: str, seed: int, device: str = "cpu") -> dict:
    """Of `ops.bounded_permute`, its outputs poisoned."""
    g = torch.Generator().manual_seed(seed + 1000)
    ids = topk_ids(case, seed)
    rows = case.rows if case.rows is not None else rows_needed(ids, case.experts, case.tile)
    x = torch.randn(case.tokens, case.hidden_size, generator=g)
    fp8 = format == "fp8"
    scales = torch.rand(case.tokens, max(1, case.hidden_size // 128), generator=g) if fp8 else None
    tokens = x.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    out = {
        "place": torch.full(ids.shape, POISON, dtype=torch.int32),
        "expert_end": torch.full((case.experts,), POISON, dtype=torch.int32),
        "rows": torch.full((rows, case.hidden_size), POISON, dtype=torch.float32).to(tokens.dtype),
        "row_scales": torch.full((scales.shape[1], rows), float(POISON)) if fp8 else None,
        "workspace": torch.full((ops.bounded_workspace_size(case.tokens, case.experts),), POISON, dtype=torch.int32),
        "lost": torch.zeros(1, dtype=torch.int32),
    }
    given = {"topk_ids": ids, "tokens": tokens, "scales": scales, "num_experts": case.experts, "tile": case.tile} | out
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}


def check_permute(permute: Callable, case: Case, format: str, seed: int, device: str = "cpu") -> None:
    """One call of `ops.bounded_permute` or what stands in for it."""
    given = arguments(case, format, seed, device)
    permute(**given)
    given = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()}
    ids, tokens, rows = given["topk_ids"], given["tokens"], given["rows"]
    place, ends = torch.full_like(given["place"], NOWHERE), []
    written, start = torch.zeros(len(rows), dtype=torch.bool), 0
    for expert in range(case.experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)  # in the order of tokens
        at = torch.arange(start, start + len(token))
        place[token, slot] = at.int()
        assert torch.equal(rows[at].view(torch.uint8), tokens[token].view(torch.uint8))
        if format == "fp8":
            assert torch.equal(given["row_scales"][:, at], given["scales"][token].t())
        written[at] = True
        ends.append(start + len(token))
        start += -(-len(token) // case.tile) * case.tile
    assert torch.equal(given["place"], place)
    assert given["expert_end"].tolist() == ends
    assert int(given["lost"]) == 0
    assert (rows[~written].float() == POISON).all(), "a row without an assignment was written"
    if format == "fp8":
        assert (given["row_scales"][:, ~written] == POISON).all()


def check_gather(
    gather: Callable, case: Case, seed: int, device: str = "cpu", reference: Callable | None = None
) -> None:
    """One call of `ops.bounded_gather` or what stands in for it: against `reference` to the bit, else in float64."""
    g = torch.Generator().manual_seed(seed + 2000)
    given = arguments(case, "bf16", seed)
    ops.bounded_permute(**given)
    place, rows = given["place"], len(given["rows"])
    outputs = torch.randn(rows, case.hidden_size, generator=g).to(torch.bfloat16)
    weights = torch.rand(place.shape, generator=g)
    tokens = torch.full((case.tokens, case.hidden_size), float(POISON)).to(torch.bfloat16).to(device)
    gather(outputs.to(device), place.to(device), weights.to(device), tokens)
    came = (place >= 0).any(dim=1)
    assert (tokens.cpu()[~came] == POISON).all(), "a token that never came was written"
    if reference is not None:
        expected = torch.full_like(tokens, POISON, device="cpu")
        reference(outputs, place, weights, expected)
        assert torch.equal(tokens.cpu(), expected)
        return
    exact = torch.zeros(case.tokens, case.hidden_size, dtype=torch.float64)
    for k in range(case.top_k):
        here = place[:, k] >= 0
        exact[here] += outputs[place[here, k].long()].double() * weights[here, k].double().unsqueeze(1)
    difference = (tokens.double() - exact)[came].abs()
    assert (difference <= exact[came].abs() * 2**-8 + 1e-5).all()


def check_lost(permute: Callable, device: str = "cpu") -> None:
    """What has no row is counted, and nothing is written for it."""
    ids = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 3], [9, 2], [-5, 1]])
    case = Case(6, 2, 4, tile=2, rows=6)  # expert 3 begins behind the buffer's end
    given = arguments(case, "fp8", 0, device) | {"topk_ids": ids.to(device)}
    permute(**given)
    #        0: rows 0, 1; 1: rows 2, 3, 4; 2: from row 6 on, which is no more
    expected = [[0, 2], [3, 1], [LOST, LOST], [LOST, LOST], [LOST, LOST], [NOWHERE, 4]]
    assert given["place"].tolist() == expected
    assert given["expert_end"].tolist() == [2, 5, 6, 6]
    assert int(given["lost"]) == sum(row.count(LOST) for row in expected)
    assert (given["rows"][5].float() == POISON).all()
    given["place"].fill_(POISON)
    permute(**given)
    assert int(given["lost"]) == 2 * sum(row.count(LOST) for row in expected), "lost is added to"


def plan(config: MacsConfig, sizes: Sizes) -> Plan:
    return Plan(config, sizes.num_experts, sizes.num_ranks)
