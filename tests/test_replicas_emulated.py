"""A plan with replicas by the CUDA kernels on the emulated machine, against the CPU's: integers to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import cases, replica_cases
from reference.replica_cases import ReplicaGroup
from sglang_macs.config import MacsConfig
from tests.support.emulated_plan import (
    Launchers,
    build,
)
from tests.support.emulated_replicas import check_plans


@pytest.fixture(scope="module")
def launchers() -> Launchers:
    return build()


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs(importance="gate", rho=0.0), st.integers(0, 3))
def test_kernels_plan_as_the_cpu_does(launchers: Launchers, group: ReplicaGroup, config: MacsConfig, seed: int) -> None:
    """Ranks of unequal, also no, tokens; entropies matter to nothing, so that weights are the same bits."""
    check_plans(launchers, group, config, seed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("protect_text", [True, False])
def test_a_batch_of_many_blocks(launchers: Launchers, dtype: torch.dtype, protect_text: bool) -> None:
    """Two copies of an expert on a rank, an expert on all ranks, and more experts than a warp has lanes."""
    gen = cases.generator(5)
    shape = {"num_tokens": 150, "num_experts": 36, "top_k": 4, "num_ranks": 2, "imbalance": 1.7}
    mapped = [*range(36), *[0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]]
    mapped = [mapped[i] for i in torch.randperm(48, generator=gen).tolist()]
    batches = [
        replica_cases.with_copies(cases.batch(gen, **shape | {"num_tokens": n}), mapped, gen) for n in (150, 0, 70, 33)
    ]
    batches = [replace(b, topk_ids=b.topk_ids.to(dtype)) for b in batches]
    group = ReplicaGroup(cases.Group(batches, 36, 4, torch.zeros(36, dtype=torch.int8)), mapped)
    for gamma in (1.0, 0.6):
        config = MacsConfig.from_preset("rank", gamma=gamma, protect_text=protect_text, reroute_rounds=2)
        check_plans(launchers, group, config, seed=1)


def test_all_rows_of_one_source_all_gates_equal(launchers: Launchers) -> None:
    gen = cases.generator(6)
    shape = {"num_experts": 6, "top_k": 2, "num_ranks": 2, "imbalance": 1.8, "ties": True}
    mapped = [0, 1, 2, 3, 4, 5, 0, 1]
    batches = [replica_cases.with_copies(cases.batch(gen, num_tokens=n, **shape), mapped, gen) for n in (0, 60, 0, 0)]
    group = ReplicaGroup(cases.Group(batches, 6, 4, torch.zeros(6, dtype=torch.int8)), mapped)
    check_plans(launchers, group, MacsConfig.from_preset("rank", gamma=0.9), seed=2)


@pytest.mark.parametrize(("num_sms", "dtype"), [(1, torch.int64), (2, torch.int32)])
def test_more_tokens_than_registers_hold(num_sms: int, dtype: torch.dtype) -> None:
    """Warps of three steps and of two, whose later ones keep their state in the output; slots without an expert."""
    gen = cases.generator(8)
    shape = {"num_experts": 12, "top_k": 8, "num_ranks": 2, "imbalance": 1.2, "empty_share": 0.1}
    mapped = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 3, 0, 1]
    tokens = 150, 0, 9, 70
    batches = [replica_cases.with_copies(cases.batch(gen, num_tokens=n, **shape), mapped, gen) for n in tokens]
    batches = [replace(b, topk_ids=b.topk_ids.to(dtype)) for b in batches]
    group = ReplicaGroup(cases.Group(batches, 12, 4, torch.zeros(12, dtype=torch.int8)), mapped)
    launchers = build(num_sms=num_sms)
    for gamma in (1.0, 0.6, float("inf")):
        check_plans(launchers, group, MacsConfig.from_preset("rank", gamma=gamma), seed=4)


@pytest.mark.parametrize("num_ranks", [8, 20])
def test_an_expert_on_every_rank_of_many(launchers: Launchers, num_ranks: int) -> None:
    """More places than registers hold, and more sources than a block has warps. More blocks than that are a GPU's:
    here each of their threads would map a stack and its guard, and a process has 65,530 maps.
    """
    gen = cases.generator(7)
    num_experts = 2 * num_ranks
    mapped = [x for rank in range(num_ranks) for x in (2 * rank, 2 * rank + 1, 0)]  # expert 0 beside each rank's own
    shape = {"num_experts": num_experts, "top_k": 2, "num_ranks": 2, "imbalance": 1.8}
    tokens = [[300, 40, 0][min(rank, 2)] + rank % 3 for rank in range(num_ranks)]
    batches = [replica_cases.with_copies(cases.batch(gen, num_tokens=n, **shape), mapped, gen) for n in tokens]
    group = ReplicaGroup(
        cases.Group(batches, num_experts, num_ranks, torch.zeros(num_experts, dtype=torch.int8)), mapped
    )
    check_plans(launchers, group, MacsConfig.from_preset("rank", gamma=0.9), seed=3)
