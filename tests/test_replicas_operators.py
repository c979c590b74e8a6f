"""The operators of a plan with replicas one by one, against the plan in one call, which is always the extension's.

test_triton.py runs this file under Triton's interpreter: they are Triton's then.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from reference import cases, replica_cases
from reference.replica_cases import ReplicaGroup
from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan, PlanResult
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.replicas import PLACED, assert_alike, exchanged, placed, plans

HAPPENS = {
    "two_ranks_linear": {"kept", "clipped", "re-routed"},
    "two_ranks_moved": {"kept", "clipped", "re-routed"},
    "one_copy": {"kept", "clipped", "moved"},
    "copies_beside_each_other": {"kept", "clipped", "moved"},
    "many_copies": {"kept", "moved"},
    "many_copies_half": {"kept", "clipped", "moved"},
    "many_copies_half_unprotected": {"kept", "clipped", "moved"},
    "everywhere": {"kept", "clipped", "moved"},
    "everywhere_unbounded": {"kept", "moved"},
    "eight_ranks": {"kept", "clipped", "re-routed", "moved"},
    "one_source_alike": {"kept", "clipped", "re-routed", "moved"},
    "no_tokens": set(),
}


def run(plan: Plan, tokens: RoutedTokens, total: torch.Tensor, whole: bool) -> tuple[PlanResult, torch.Tensor]:
    """The plan, and what it has exchanged; not whole: as where the operators are Triton's, which has no such plan."""
    sent = []

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.clone())
        tensor.copy_(total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "is_whole", lambda tensor: whole)
        return plan(tokens, all_reduce), sent[0]


def check(group: ReplicaGroup, config: MacsConfig) -> list[PlanResult]:
    """Every rank's plan by operators, which is that of one call."""
    of_rank, results = plans(group, config), []
    _, total = exchanged(group, of_rank)
    for plan, b in zip(of_rank, group.group.batches, strict=True):
        (mine, sent), (want, to_send) = (run(plan, b.routed, total, whole) for whole in (False, True))
        assert torch.equal(sent, to_send), "rows behind the histogram, too"
        assert_alike(mine, want)
        results.append(mine)
    return results


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs(importance="gate", rho=0.0))
def test_any_group_is_planned_as_in_one_call(group: ReplicaGroup, config: MacsConfig) -> None:
    check(group, config)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", PLACED)
def test_placements_are_planned_as_in_one_call(name: str, dtype: torch.dtype) -> None:
    group, config = placed(name, dtype)
    results = check(group, config)
    counts = torch.stack([result.counts for result in results]).sum((0, 2, 3)).tolist()
    happened = {what for what, rows in zip(("kept", "clipped", "re-routed", "moved"), counts, strict=True) if rows}
    assert happened == HAPPENS[name]
    assert results[0].topk_ids.dtype == dtype
