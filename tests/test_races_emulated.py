"""No data race in the kernels of csrc/cuda, on the emulated machine that watches every access.

The plan; the fused dispatch and combine in epochs over the same regions, every rank on a stream of
its own and the host never waiting in between, so that what one epoch leaves and the next overwrites is watched too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from reference import cases, replica_cases
from reference import fused_c as fc
from reference.fused_case import FusedConfig, Group, make_group, masked
from reference.kernel_case import Config
from reference.replica_cases import ReplicaGroup
from sglang_macs.config import MacsConfig
from tests.support import emulated
from tests.support.emulated import Kernels
from tests.support.emulated_plan import FUSED_CASES, Launchers, one_by_one, peer_group, small_group
from tests.support.emulated_replicas import check_plans
from tests.support.operator_cases import SELECTIONS, USUAL, selection_case

pytestmark = pytest.mark.emulated
EPOCHS = 3


def watched() -> emulated.Library:
    sources = sorted(emulated.CUDA.glob("*.cu"))
    return emulated.build("watched", *sources, defines=["MACS_C_API"], races=True, num_sms=2)


@pytest.mark.parametrize("options", FUSED_CASES.values(), ids=FUSED_CASES)
def test_plan(options: dict[str, str]) -> None:
    launchers, group, options = Launchers(watched()), small_group(), USUAL | options
    for seed in range(2):
        launchers.library.configure(seed)
        one_by_one(launchers, group, options)
        launchers.plan(group, options | {"num_ranks": group.num_ranks, "scoring": group.scoring})


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection(name: str) -> None:
    Launchers(watched()).selection_score(*selection_case(name))


def test_plan_with_its_exchange() -> None:
    """Two ranks' chains of launches, a stream each."""
    launchers, group = Launchers(watched()), peer_group(torch.bfloat16)
    options = USUAL | {"importance": "gate", "buckets": 32, "gamma": 1.05, "num_ranks": 2, "scoring": group.scoring}
    launchers.plans(group, options, scored=False)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_plan_with_replicas(gamma: float) -> None:
    """Two ranks over their bounds, one idle."""
    launchers, gen, mapped = Launchers(watched()), cases.generator(7), [0, 1, 2, 3, 4, 0, 5, 1, 0]
    shape = {"num_experts": 6, "top_k": 2, "num_ranks": 2, "imbalance": 1.6}
    batches = [replica_cases.with_copies(cases.batch(gen, num_tokens=n, **shape), mapped, gen) for n in (24, 0, 10)]
    group = ReplicaGroup(cases.Group(batches, 6, 3, torch.zeros(6, dtype=torch.int8)), mapped)
    check_plans(launchers, group, MacsConfig.from_preset("rank", gamma=gamma, buckets=32), seed=1)


PLAN = Config(T=6, H=2048, E=8, K=3, R=2, hot=1.5, visual=0.8, gamma=1.0)
FUSED = {
    "rank": FusedConfig(PLAN, (6, 4), blocks=2),
    "expert": FusedConfig(replace(PLAN, scope="expert", load="effective", reroute="local"), (6, 5), blocks=2),
    "fp8": FusedConfig(PLAN, (6, 4), blocks=2, format="fp8_ue8m0", row_experts=True),
    "fp8_with_rows": FusedConfig(PLAN, (6, 4), blocks=4, format="fp8", scales_with_rows=True, alignment=1),
    "copied_outputs": FusedConfig(PLAN, (6, 0), blocks=2, copies_outputs=True),
    "nothing_exceeded": FusedConfig(replace(PLAN, gamma=float("inf")), (6, 4), blocks=2),
    "mix_decides": FusedConfig(replace(PLAN, scope="expert", rho=1.9, gamma=5.0, hot=0.0), (6, 4), blocks=2),
    "gate": FusedConfig(replace(PLAN, importance="gate", delta=0.0), (6, 4), blocks=2, needs_entropy=False),
    "more_images_than_limbs": FusedConfig(replace(PLAN, num_segments=200, bucket_bits=1), (6, 4), blocks=2),
    "many_cuts_of_a_group_not_kept": FusedConfig(
        replace(PLAN, T=500, K=9, E=32, scope="expert", gamma=0.6), (6, 5), blocks=2, max_rows=500, alignment=8
    ),
    "many_cuts": FusedConfig(replace(PLAN, E=32, scope="expert", gamma=0.6), (6, 5), blocks=3),
    "rows_read_twice": FusedConfig(replace(PLAN, T=20, H=7168), (20, 3), blocks=1, alignment=1),
    "many_reroute_rounds": FusedConfig(replace(PLAN, rounds=8, gamma=0.6), (6, 6), blocks=2),
    "carried": masked(FusedConfig(PLAN, (6, 4), blocks=2, carried=True)),
    "carried_with_rows": masked(FusedConfig(PLAN, (6, 4), blocks=4, format="fp8", scales_with_rows=True, carried=True)),
    "carried_in_one_block": masked(
        FusedConfig(replace(PLAN, T=20, H=7168), (20, 3), blocks=1, format="fp8", scales_with_rows=True, carried=True)
    ),
    "three_ranks_carried": masked(FusedConfig(replace(PLAN, R=3, E=6), (2, 3, 1), blocks=1, carried=True)),
    "three_ranks": FusedConfig(replace(PLAN, R=3, E=6), (2, 3, 1), blocks=1),
}


def in_one(group: Group, rank: int) -> None:
    group.dispatch(only=rank)


def in_two_phases(group: Group, rank: int) -> None:
    group.dispatch(fc.SEND, only=rank)
    group.dispatch(fc.RECEIVE, only=rank)


@pytest.mark.parametrize(
    ("name", "dispatch", "combines"),
    [
        *((name, in_one, True) for name in FUSED),
        ("rank", in_two_phases, True),
        pytest.param("fp8_with_rows", in_two_phases, True, marks=pytest.mark.nightly),
        ("fp8_with_rows", in_one, False),
        pytest.param("fp8_with_rows", in_two_phases, False, marks=pytest.mark.nightly),
        *((name, in_one, False) for name in ("carried", "carried_with_rows", "three_ranks_carried")),
        pytest.param("carried", in_two_phases, True, marks=pytest.mark.nightly),
        ("carried_with_rows", in_two_phases, True),
        ("nothing_exceeded", in_one, False),  # sums arrive late, while others may be an epoch ahead
    ],
)
def test_fused_epochs(name: str, dispatch: Callable[[Group, int], None], combines: bool) -> None:
    kernels = Kernels(watched())
    group = Group(kernels, FUSED[name], "cpu")
    group.load(make_group(group.config, 1))
    group.poison()
    kernels.machine.configure(len(name))
    with kernels.machine.together():
        for _ in range(EPOCHS):
            for rank in group.ranks:
                kernels.stream = rank + 1
                dispatch(group, rank)
                if combines:
                    group.combine(only=rank)
    assert all(group.status(rank).fault == 0 and group.epoch(rank) == EPOCHS for rank in group.ranks)


@pytest.mark.parametrize("dispatch", [in_one, in_two_phases])
@pytest.mark.parametrize("name", ["rank", "fp8_with_rows", "carried", "carried_with_rows"])
def test_a_dead_rank(name: str, dispatch: Callable[[Group, int], None]) -> None:
    """The ways out of a dispatch and a combine that gave up."""
    kernels = Kernels(watched())
    group = Group(kernels, replace(FUSED[name], timeout_ns=100_000), "cpu")
    group.load(make_group(group.config, 1))
    with kernels.machine.together():
        dispatch(group, 0)
        group.combine(only=0)
    assert group.status(0).fault != 0 and group.status(0).peer == 1
