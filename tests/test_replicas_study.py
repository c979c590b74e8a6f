"""The study of replicas on published loads: what is committed, and the choices that it compares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import replicas_study
from sglang_macs.config import MacsConfig
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "replicas.json"
ROWS = {tuple(row["case"].values()): row for row in json.loads(FILE.read_text())["rows"]}


@pytest.mark.parametrize(
    ("choice", "max_over_mean"), [("linear", 1.249), ("static", 1.141), ("dynamic", 1.135), ("balance", 1.0)]
)
def test_eight_ranks_with_32_redundant_experts(choice: str, max_over_mean: float) -> None:
    assert ROWS[8, 32, choice, 1.0]["max_over_mean"] == pytest.approx(max_over_mean, abs=0.02)


def test_balanced_replicas_leave_less_over_every_bound_than_any_other_choice() -> None:
    for (ep, redundant, choice, gamma), row in ROWS.items():
        assert row["clipped"] >= ROWS[ep, redundant, "balance", gamma]["clipped"], (ep, redundant, choice, gamma)
    assert ROWS[8, 32, "balance", 1.05]["clipped"] == 0
    assert len(ROWS) == len(replicas_study.CLUSTERS) * 4 * len(replicas_study.GAMMAS)


def test_every_choice_sends_every_row_somewhere() -> None:
    """Expert 0 on ranks 0 and 1, expert 1 on rank 1, expert 2 on rank 2 twice."""
    sources = np.array([[6, 1, 0], [2, 5, 4], [9, 3, 8]])
    mapped = [0, 3, 0, 1, 2, 2]
    static = replicas_study.chosen(np.pad(sources, ((0, 0), (0, 1))), mapped, 3, "static")
    dynamic = replicas_study.chosen(sources, mapped, 3, "dynamic")
    plan = Plan(MacsConfig(buckets=32), 4, 3, places=Places(4, 6, 3, 0, mapped))
    balanced = replicas_study.balanced(np.append(sources.sum(0), 0), plan)
    assert static.sum() == dynamic.sum() == balanced.sum() == sources.sum()
    assert dynamic.tolist() == [8.5, 17.5, 12] and static.tolist() in ([6 + 9, 11, 12], [6, 20, 12])
    assert balanced.tolist() == [13, 13, 12]
