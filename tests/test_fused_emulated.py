"""The fused dispatch and combine on the emulated machine: their decisions, rows and sums against the reference, in many
schedules. What they do when a peer fails is in test_fused_faults_emulated.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import fused_c as fc
from reference.fused_case import FusedConfig, Group, make_group, masked
from reference.fused_checks import describe, output, play
from reference.fused_faults import (
    PAIR,
    forge_assignments,
    forge_rows,
    forge_weight,
)
from reference.kernel_reference import fixed
from tests.support.emulated import Kernels
from tests.support.emulated_fused import (
    PLAN,
    SOON_NS,
    build,
    each_by_itself,
    each_by_itself_in_two_phases,
    in_two_phases,
)
from tests.support.tiers import nightly_but

pytestmark = pytest.mark.emulated
MOST_LISTED = 512  # csrc/cuda/fused_block.cuh


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return build()


@pytest.fixture(autouse=True)
def schedule(kernels: Kernels) -> None:
    """The same for a test whatever ran before it, unless it asks for others."""
    kernels.machine.configure(1)


CASES = {
    "plain": FusedConfig(PLAN, (12, 7, 12, 1)),
    "one_rank": FusedConfig(replace(PLAN, R=1, scope="expert", empty=0.3, ids_i64=False), (12,), blocks=3),
    "eight_ranks": FusedConfig(replace(PLAN, R=8, T=5), (5, 0, 3, 5, 1, 5, 5, 2), blocks=2),
    "own_rows": masked(FusedConfig(PLAN, (12, 0, 12, 5))),
    "no_tokens": FusedConfig(PLAN, (0, 0, 0, 0)),
    "one_token": FusedConfig(PLAN, (0, 1, 0, 0)),
    "all_to_one_rank": FusedConfig(replace(PLAN, hot=60.0), (12, 12, 12, 12), row_experts=True),
    "all_to_one_rank_unbounded": FusedConfig(replace(PLAN, hot=60.0, gamma=float("inf")), (12, 12, 12, 12)),
    "rows_read_twice": FusedConfig(replace(PLAN, T=40, R=2, H=7168), (40, 33), blocks=1, alignment=1),
    "fp8": FusedConfig(PLAN, (12, 7, 0, 1), format="fp8", alignment=8),
    "fp8_own_rows": masked(FusedConfig(PLAN, (12, 7, 0, 1), format="fp8")),
    "fp8_power_of_two": masked(FusedConfig(replace(PLAN, H=2560), (3, 7, 4, 1), format="fp8_power_of_two")),
    "fp8_ue8m0": FusedConfig(PLAN, (12, 7, 0, 1), format="fp8_ue8m0", row_experts=True),
    "fp8_ue8m0_own_rows": masked(FusedConfig(replace(PLAN, H=3072), (2, 7, 0, 1), format="fp8_ue8m0")),
    "copied_outputs": FusedConfig(PLAN, (12, 7, 0, 1), copies_outputs=True),
    "many_experts": FusedConfig(replace(PLAN, E=256, K=16, R=2, T=9, scope="expert"), (9, 8), alignment=16),
    "many_images": FusedConfig(replace(PLAN, num_segments=5, shuffled=True, visual=1.0), (12, 12, 3, 12)),
    "no_entropies": FusedConfig(replace(PLAN, importance="gate", delta=0.0), (12, 12, 3, 12), needs_entropy=False),
    "odd_logits": FusedConfig(replace(PLAN, odd=0.2, grid=0.5, empty=0.3, scoring="sigmoid"), (12, 12, 3, 12)),
    "patient": FusedConfig(replace(PLAN, rounds=60, gamma=0.6), (12, 12, 12, 12)),
    "no_rounds": FusedConfig(replace(PLAN, rounds=0, gamma=0.6), (12, 12, 12, 12)),
}
FREE = replace(PLAN, gamma=4.0)  # rows show that nothing is exceeded, whatever the weights
UNCUT = {
    "free": FusedConfig(FREE, (12, 7, 12, 1)),
    "free_one_rank": FusedConfig(replace(FREE, R=1, scope="expert", gamma=16.0, reroute="none"), (12,), blocks=14),
    "free_own_rows": masked(FusedConfig(FREE, (12, 0, 12, 5), format="fp8")),
    "free_idle": FusedConfig(FREE, (0, 0, 0, 0)),
    "free_by_effective_load": FusedConfig(replace(FREE, load="effective"), (12, 7, 12, 1)),
    "free_empty_slots": FusedConfig(replace(FREE, empty=0.3, ids_i64=False), (12, 7, 12, 1), row_experts=True),
    "free_many_images": FusedConfig(replace(FREE, num_segments=5, shuffled=True), (12, 12, 3, 12)),
    "free_more_images_than_limbs": FusedConfig(replace(FREE, num_segments=200, bucket_bits=1), (12, 12, 3, 12)),
    "free_gate": FusedConfig(replace(FREE, importance="gate", delta=0.0), (12, 12, 3, 12), needs_entropy=False),
    "free_rows_read_twice": FusedConfig(replace(FREE, T=40, R=2, H=7168), (40, 33), blocks=1, alignment=1),
}
# Rows alone do not decide: experts lean on the visual share, or weights count. Nothing is exceeded all the same.
SENT_WITH_WEIGHTS = {
    "mix": FusedConfig(replace(PLAN, scope="expert", rho=1.9, gamma=5.0, hot=0.0), (12, 7, 12, 1)),
    "effective": FusedConfig(replace(PLAN, load="effective", hot=0.0, gamma=0.9, visual=1.0), (12, 7, 12, 1), blocks=2),
}
MANY = replace(PLAN, E=64, K=8, R=2, scope="expert", gamma=0.6, hot=0.5)  # bounds: a share of them for each block
EQUAL = replace(MANY, importance="entropy", delta=0.0, visual=1.0, gamma=0.4)  # all at one level
CUT = {
    "many": FusedConfig(MANY, (12, 9), blocks=3),
    "many_one_rank": FusedConfig(replace(MANY, R=1, reroute="none", bucket_bits=4), (12,), blocks=3),
    "many_effective": FusedConfig(replace(MANY, load="effective", gamma=0.4, reroute="local"), (12, 9)),
    "many_gate": FusedConfig(replace(MANY, importance="gate", delta=0.0, grid=0.5), (12, 0), needs_entropy=False),
    "many_in_one_block": FusedConfig(replace(MANY, bucket_bits=1), (5, 12), blocks=1),
    "many_idle_ranks": FusedConfig(replace(MANY, R=4, gamma=0.4), (0, 12, 0, 1), blocks=2),
    "fewer_than_blocks": FusedConfig(replace(PLAN, R=1, scope="expert", hot=3.0), (12,), blocks=20),
    "as_many_as_are_told": FusedConfig(replace(PLAN, R=8, hot=3.0), (12, 7, 12, 0, 1, 12, 5, 3), blocks=3),
    "fewer_than_are_told": FusedConfig(replace(PLAN, E=14, R=7, hot=3.0), (12, 7, 12, 0, 1, 12, 5), blocks=3),
    "equal": FusedConfig(EQUAL, (12, 11)),
    "equal_effective": FusedConfig(replace(EQUAL, load="effective", gamma=0.2), (12, 11), blocks=3),
    "equal_by_rank": FusedConfig(
        replace(EQUAL, R=4, scope="rank", gamma=0.5, hot=3.0, protect_text=False), (12, 5, 0, 12)
    ),
    "equal_and_many_slots": FusedConfig(
        replace(EQUAL, T=280, R=1, K=16, E=32), (280,), blocks=3, needs_entropy=False, max_rows=4800, alignment=8
    ),
    "group_not_kept": FusedConfig(replace(MANY, T=600, R=1, K=16, E=32), (12,), blocks=3, max_rows=2000, alignment=8),
    "group_not_kept_two_ranks": FusedConfig(
        replace(MANY, T=300, K=16, E=32), (12, 9), blocks=3, max_rows=2000, alignment=8
    ),
    "sources_not_named": FusedConfig(PLAN, (12, 7, 0, 12), names_sources=False),
    "more_images_than_limbs": FusedConfig(replace(PLAN, num_segments=200, bucket_bits=1), (12, 12, 3, 12)),
}
WITH_ROWS = {
    name: replace(config, scales_with_rows=True)
    for name, config in {
        "packed": FusedConfig(PLAN, (12, 7, 0, 1), format="fp8", alignment=8),
        "packed_alone": FusedConfig(replace(PLAN, R=1, T=40, H=7168), (40,), blocks=7, format="fp8", alignment=1),
        "own_rows": masked(FusedConfig(PLAN, (12, 7, 0, 1), format="fp8")),
        "power_of_two": masked(FusedConfig(replace(PLAN, H=2560), (3, 7, 4, 1), format="fp8_power_of_two", blocks=6)),
        "ue8m0": FusedConfig(replace(PLAN, H=2560), (12, 7, 0, 1), format="fp8_ue8m0", row_experts=True, blocks=9),
        "ue8m0_own_rows": masked(FusedConfig(replace(PLAN, H=7168, R=2), (2, 7), format="fp8_ue8m0", blocks=3)),
        "one_block": masked(FusedConfig(replace(PLAN, R=2), (12, 9), format="fp8", blocks=1)),
        "two_blocks": FusedConfig(replace(PLAN, R=2), (12, 9), format="fp8", blocks=2),
        # More than 32 rows of an expert.
        "all_to_one_rank": FusedConfig(
            replace(PLAN, hot=60.0, E=8, gamma=float("inf")), (12, 12, 9, 12), format="fp8", blocks=5
        ),
        "nobody": FusedConfig(PLAN, (0, 0, 0, 0), format="fp8"),
        "unused_by_bfloat16": FusedConfig(PLAN, (12, 7, 0, 1)),
    }.items()
}
CASES |= UNCUT | SENT_WITH_WEIGHTS | CUT | {f"with_rows_{name}": config for name, config in WITH_ROWS.items()}
CARRIED = {
    "plain": masked(FusedConfig(PLAN, (12, 7, 12, 1), carried=True)),
    "one_rank": masked(FusedConfig(replace(PLAN, R=1, empty=0.3, ids_i64=False), (12,), blocks=3, carried=True)),
    "two_ranks": masked(FusedConfig(replace(PLAN, R=2, hot=3.0), (12, 9), carried=True)),
    "eight_ranks": masked(FusedConfig(replace(PLAN, R=8, T=5), (5, 0, 3, 5, 1, 5, 5, 2), blocks=2, carried=True)),
    "one_token": masked(FusedConfig(replace(PLAN, T=1, R=2, K=8, H=7168), (1, 1), blocks=14, carried=True)),
    "padding": masked(FusedConfig(replace(PLAN, empty=0.9), (12, 12, 12, 12), blocks=3, carried=True)),
    "idle": masked(FusedConfig(PLAN, (0, 0, 0, 0), carried=True)),
    "idle_but_one": masked(FusedConfig(replace(PLAN, hot=60.0), (0, 0, 12, 0), carried=True)),
    "one_block": masked(FusedConfig(replace(PLAN, R=2), (12, 9), blocks=1, carried=True)),
    "rows_that_do_not_fit_at_once": masked(
        FusedConfig(replace(PLAN, T=40, R=2, H=7168), (40, 33), blocks=1, carried=True)
    ),
    "copied_outputs": masked(FusedConfig(replace(PLAN, R=2), (12, 0), copies_outputs=True, carried=True)),
    "fp8": masked(FusedConfig(PLAN, (12, 7, 0, 12), format="fp8", carried=True)),
    "fp8_with_rows": masked(FusedConfig(PLAN, (12, 7, 0, 1), format="fp8", scales_with_rows=True, carried=True)),
    "ue8m0_with_rows": masked(
        FusedConfig(replace(PLAN, H=2560), (3, 12, 4, 1), 9, "fp8_ue8m0", scales_with_rows=True, carried=True)
    ),
    "fp8_with_rows_one_block": masked(
        FusedConfig(replace(PLAN, R=2), (12, 9), 1, "fp8", scales_with_rows=True, carried=True)
    ),
}
CASES |= {f"carried_{name}": config for name, config in CARRIED.items()}
USUAL = (
    "plain", "one_rank", "eight_ranks", "own_rows", "no_tokens", "rows_read_twice", "fp8_own_rows", "copied_outputs",
    "many_experts", "no_entropies", "free", "free_idle", "mix", "effective", "many", "many_in_one_block",
    "equal_effective", "group_not_kept", "with_rows_packed", "with_rows_one_block",
)  # fmt: skip
POLICIES = list(
    itertools.product(
        ("expert", "rank"), ("rows", "effective"), ("entropy", "gate", "entropy_gate"), ("none", "local", "global")
    )
)


@pytest.mark.parametrize("name", nightly_but(CASES, *USUAL))
def test_rounds_over_the_same_regions(kernels: Kernels, name: str) -> None:
    group = Group(kernels, CASES[name], "cpu")
    for seed in range(3):
        kernels.machine.configure(seed)
        play(group, seed)
    assert all(group.epoch(rank) == 3 for rank in group.ranks)
    assert name not in CUT or (output(group, 0, "cut")[:, 0] >= 0).any(), "no bound was cut: the case shows nothing"


def sent_with_weights(group: Group, rank: int) -> bool:
    """Whether this epoch's assignments were sent with their weights: an LL word of any of its slots says so."""
    f = group.config.plan
    epochs = group.part(rank, "weighed", torch.int32, f.R, f.T * f.K, 2)[rank, :, 1]
    return bool((epochs == group.epoch(rank)).any())


@pytest.mark.parametrize(("name", "again"), [*((n, False) for n in UNCUT), *((n, True) for n in SENT_WITH_WEIGHTS)])
def test_entropies_are_awaited_only_where_they_may_decide(kernels: Kernels, name: str, again: bool) -> None:
    group = Group(kernels, CASES[name], "cpu")
    for seed in range(3):
        kernels.machine.configure(seed + 10)
        play(group, seed)
        for rank in group.ranks:
            assert sent_with_weights(group, rank) == (again and group.config.tokens[rank] > 0)
            assert (output(group, rank, "cut")[:, 0] == -1).all(), "a bound was cut: the case shows nothing"


@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_every_policy(kernels: Kernels, policy: tuple[str, ...]) -> None:
    scope, load, importance, reroute = policy
    seed = POLICIES.index(policy)
    plan = replace(
        PLAN, R=2, scope=scope, load=load, importance=importance, reroute=reroute, gamma=0.6 if load == "rows" else 0.3,
        bucket_bits=1 + seed % 4, protect_text=seed % 3 > 0, c_min=seed % 2, alpha=(1.0, 0.0, 2.3)[seed % 3],
    )  # fmt: skip
    group = Group(kernels, FusedConfig(plan, (12, 9), blocks=2), "cpu")
    play(group, seed)
    assert (output(group, 0, "cut")[:, 0] >= 0).any(), "no bound was cut: the case shows nothing"


@pytest.mark.parametrize(("tokens", "listed"), [(300, "all"), (600, "some"), (800, "none")])
def test_more_assignments_of_a_bound_than_a_block_lists(kernels: Kernels, tokens: int, listed: str) -> None:
    plan = replace(PLAN, R=1, E=8, K=7, T=800, scope="expert", gamma=0.9, reroute="none", importance="gate")
    config = FusedConfig(plan, (tokens,), blocks=12, needs_entropy=False)
    group = Group(kernels, config, "cpu")
    play(group, 5)
    fits = np.bincount(make_group(config, 5)[0].ids.flatten(), minlength=plan.E) <= MOST_LISTED
    assert listed == ("all" if fits.all() else "some" if fits.any() else "none")
    assert (output(group, 0, "cut")[:, 0] >= 0).sum() > 1, "no bound was cut: the case shows nothing"


@pytest.mark.parametrize("seed", range(8))
def test_schedules_do_not_matter(kernels: Kernels, seed: int) -> None:
    group = Group(kernels, FusedConfig(replace(PLAN, gamma=0.8), (12, 7, 0, 12), blocks=3), "cpu")
    kernels.machine.configure(seed)
    for step in range(2):
        play(group, step)


@pytest.mark.parametrize("dispatch", [each_by_itself, in_two_phases, each_by_itself_in_two_phases])
@pytest.mark.parametrize(
    "name",
    nightly_but(
        [
            *("plain", "with_rows_packed", "with_rows_ue8m0", "with_rows_one_block"),
            *("carried_plain", "carried_ue8m0_with_rows", "carried_fp8_with_rows_one_block"),
        ],
        *("plain", "with_rows_one_block", "carried_plain", "carried_fp8_with_rows_one_block"),
    ),
)
def test_other_ways_to_launch(kernels: Kernels, name: str, dispatch: Callable[[Group], None]) -> None:
    group = Group(kernels, CASES[name], "cpu")
    for seed in range(4):
        play(group, seed, dispatch)


def test_sums_are_of_this_epoch_though_a_rank_is_one_ahead(kernels: Kernels) -> None:
    """What its tokens weigh arrives late: its next word must not lie in the same place."""
    config = replace(PAIR, plan=replace(PAIR.plan, gamma=float("inf")), timeout_ns=SOON_NS)
    group = Group(kernels, config, "cpu")
    group.load(ranks := make_group(config, 7))
    group.poison()
    for forge in (forge_assignments, forge_weight, forge_rows):
        forge(group)
    ahead = group.epoch(0) + 2
    group.part(0, "weights", torch.int32, 2, 2, 2)[ahead & 1, 1] = torch.tensor([7, ahead])
    group.dispatch(only=0)
    assert not group.status(0).fault, describe(group.status(0))
    own = fixed(output(group, 0, "weight"))[ranks[0].segment >= 0].sum()
    assert output(group, 0, "sums")[2] == own + 12 * 128


def test_barrier_flags_of_long_ago_do_not_count(kernels: Kernels) -> None:
    """After half of all epochs without a barrier its old flags look as if they were of later epochs."""
    group = Group(kernels, FusedConfig(replace(PLAN, gamma=0.8), (12, 7, 0, 12), blocks=3), "cpu")
    for seed in range(4):
        kernels.machine.configure(seed)
        ahead = (group.epoch(0) + 1) * 64 + 2**30
        for rank in group.ranks:
            group.part(rank, "barrier", torch.int32, group.config.shape.num_blocks).fill_(ahead)
        play(group, seed)


@pytest.mark.parametrize("seed", range(8))
def test_schedules_do_not_matter_where_nothing_is_planned(kernels: Kernels, seed: int) -> None:
    group = Group(kernels, CARRIED["plain"], "cpu")
    kernels.machine.configure(seed)
    for step in range(2):
        play(group, step, each_by_itself)


@pytest.mark.parametrize("format", ["bfloat16", "fp8"])
def test_planned_rounds_and_others_take_turns(kernels: Kernels, format: str) -> None:
    """Prefill and decode over the same regions."""
    config = masked(FusedConfig(replace(PLAN, gamma=0.8), (12, 7, 0, 12), format=format, scales_with_rows=True))
    planned = Group(kernels, config, "cpu")
    carried = Group(kernels, replace(config, carried=True), "cpu", regions=planned.regions)
    for seed in range(3):
        for group in (planned, carried):
            kernels.machine.configure(seed)
            play(group, seed, each_by_itself_in_two_phases if seed % 2 else Group.dispatch)
    assert planned.epoch(0) == 6


def test_the_first_source_of_an_expert_waits_for_nobody(kernels: Kernels) -> None:
    """Of two ranks that is the other one: what crosses NVLink is on its way at once."""
    config = masked(FusedConfig(replace(PLAN, R=2), (12, 12), timeout_ns=SOON_NS, carried=True))
    group = Group(kernels, config, "cpu")
    ranks = make_group(config, 7)
    ranks[0].ids[ranks[0].ids < config.local] = -1  # to rank 1's experts alone
    group.load(ranks)
    group.poison()
    group.dispatch(fc.SEND, only=0)
    sent = int((ranks[0].ids >= 0).sum())
    source = group.part(1, "sources", torch.int32, config.rows)
    assert sent > 0 and (source >> 16 == 0).sum() == sent, "rank 1 has not even begun"
