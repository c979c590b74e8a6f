"""The fused dispatch on the emulated machine when a peer dies, stalls or sends nonsense: it is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from reference import fused_c as fc
from reference.fused_case import FusedConfig, Group, make_group, masked
from reference.fused_checks import check_guards, describe, fresh_outputs, play
from reference.fused_faults import (
    PAIR,
    PAIRS,
    SCENARIOS,
    check_fault,
    forge_assignments,
    forge_counts,
    forge_rows,
    forge_weight,
)
from reference.kernel_case import POISON
from tests.support import emulated
from tests.support.emulated import Kernels
from tests.support.emulated_fused import SOON_NS, build, each_by_itself_in_two_phases, in_two_phases

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return build()


@pytest.fixture(autouse=True)
def schedule(kernels: Kernels) -> None:
    """The same for a test whatever ran before it, unless it asks for others."""
    kernels.machine.configure(2)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_is_named_and_the_next_epoch_works(kernels: Kernels, name: str, kind: str) -> None:
    check_fault(kernels, "cpu", SCENARIOS[name], SOON_NS, PAIRS[kind])


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_sending_waits_for_nobodys_rows(kernels: Kernels, pair: FusedConfig) -> None:
    pair = replace(pair, plan=replace(pair.plan, gamma=float("inf")), timeout_ns=SOON_NS)
    group = Group(kernels, pair, "cpu")
    group.load(make_group(pair, 7))
    forge_assignments(group)
    forge_weight(group)
    group.dispatch(fc.SEND, only=0)
    assert not group.status(0).fault, describe(group.status(0))


@pytest.mark.parametrize("phases", [(fc.BOTH,), (fc.SEND, fc.RECEIVE)])
def test_signals_without_scales_are_a_fault(kernels: Kernels, phases: tuple[int, ...]) -> None:
    """Nobody sends that; nobody waits for it for ever."""
    pair = PAIRS[", scales with rows"]
    pair = replace(pair, plan=replace(pair.plan, gamma=float("inf")), timeout_ns=SOON_NS)
    group = Group(kernels, pair, "cpu")
    group.load(make_group(pair, 7))
    group.poison()
    forge_assignments(group)
    forge_weight(group)
    forge_rows(group, scales=False)
    for phase in phases:
        group.dispatch(phase, only=0)
    assert fc.FAULTS[group.status(0).fault] == "rows" and group.status(0).peer == -1, describe(group.status(0))
    check_guards(group)
    group.recover()
    play(group, 8)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_rank_that_dies_between_phases_is_named_and_the_next_epoch_works(kernels: Kernels, pair: FusedConfig) -> None:
    group = Group(kernels, replace(pair, timeout_ns=SOON_NS), "cpu")
    play(group, 0)
    group.load(make_group(pair, 7))
    group.poison()
    group.dispatch(fc.SEND)  # of both; then rank 1 neither receives nor combines
    group.dispatch(fc.RECEIVE, only=0)
    assert not group.status(0).fault and group.part(0, "received", torch.int32, 8).sum() > 0
    group.combine(only=0)
    assert fc.FAULTS[group.status(0).fault] == "outputs" and group.status(0).peer == 1, describe(group.status(0))
    assert (group.tensors[0].outputs["combined"] == 0).all()
    check_guards(group)
    group.recover()
    play(group, 8, in_two_phases)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_rank_that_never_sends_is_named_behind_both_phases(kernels: Kernels, pair: FusedConfig) -> None:
    group = Group(kernels, replace(pair, timeout_ns=SOON_NS), "cpu")
    group.load(make_group(pair, 7))
    group.poison()
    for phase in (fc.SEND, fc.RECEIVE):
        group.dispatch(phase, only=0)
    assert fc.FAULTS[group.status(0).fault] == "assignments" and group.status(0).peer == 1, describe(group.status(0))
    assert not group.part(0, "received", torch.int32, 8).any()
    group.recover()
    play(group, 8, in_two_phases)


@pytest.mark.parametrize("rows", [{"max_rows": 40, "alignment": 8}, {"expert_rows": 5}])
def test_more_rows_than_the_buffer_holds_are_refused_by_all(kernels: Kernels, rows: dict[str, int]) -> None:
    config = replace(PAIR, plan=replace(PAIR.plan, gamma=float("inf")), **rows)
    group = Group(kernels, config, "cpu")
    group.load(make_group(config, 3))
    group.poison()
    group.dispatch()
    for rank in group.ranks:
        assert fc.FAULTS[group.status(rank).fault] == "overflow" and group.status(rank).peer == 0
        assert (group.bytes_of(rank, "rows") == POISON).all()
        assert not group.part(rank, "received", torch.int32, config.local).any()
    check_guards(group)


def test_a_peer_that_offers_no_outputs_is_named_and_gives_zeros(kernels: Kernels) -> None:
    group = Group(kernels, replace(PAIR, timeout_ns=SOON_NS), "cpu")
    group.load(make_group(PAIR, 7))
    group.dispatch()
    group.combine(only=0)
    status = group.status(0)
    assert fc.FAULTS[status.fault] == "outputs" and status.peer == 1, describe(status)
    assert (group.tensors[0].outputs["combined"] == 0).all()
    group.recover()
    play(group, 8)


SIZES = {"hidden": {"H": 1000}, "experts": {"E": 512, "R": 2}, "top_k": {"K": 17, "E": 32}}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_are_refused(kernels: Kernels, name: str) -> None:
    group = Group(kernels, replace(PAIR, plan=replace(PAIR.plan, **SIZES[name])), "cpu")
    with pytest.raises(emulated.Failure, match="refused before the launch"):
        group.dispatch()


CARRIED_PAIR = masked(replace(PAIR, plan=replace(PAIR.plan, hot=1.5), blocks=3, carried=True, timeout_ns=SOON_NS))
I32_MAX = 2**31 - 1


def alone(group: Group) -> None:
    group.dispatch(only=0)


def sent_then_alone(count: int) -> Callable[[Group], None]:
    def inject(group: Group) -> None:
        forge_counts(group, [count] * 16)
        group.dispatch(only=0)

    return inject


def own_expert(group: Group) -> None:
    group.tensors[0].inputs["topk_ids"][4, 2] = 16
    group.dispatch()


def peers_expert(group: Group) -> None:
    group.tensors[1].inputs["topk_ids"][4, 2] = 511
    group.dispatch()


def one_expert_twice(group: Group) -> None:
    group.tensors[0].inputs["topk_ids"][:, :2] = 3
    group.dispatch()


@pytest.mark.parametrize(
    "rows", [{}, {"format": "fp8", "scales_with_rows": True, "blocks": 4}], ids=["", "with scales"]
)
@pytest.mark.parametrize(
    ("inject", "fault", "peer", "seen"),
    [
        pytest.param(alone, "counts", 1, None, id="dead rank"),
        pytest.param(sent_then_alone(0), "rows", 1, None, id="dead before its rows"),
        *(pytest.param(sent_then_alone(n), "bad count", 1, n, id=f"{n} rows") for n in (-2, 13, I32_MAX)),
        pytest.param(peers_expert, "bad expert", 1, -1, id="expert 511"),
        pytest.param(own_expert, "bad expert", 0, 16, id="own expert 16"),
        pytest.param(one_expert_twice, "bad count", 0, None, id="an expert twice"),
    ],
)
def test_a_fault_where_nothing_is_planned(kernels: Kernels, inject, fault: str, peer: int, seen, rows: dict) -> None:
    config = replace(CARRIED_PAIR, **rows)
    group = Group(kernels, config, "cpu")
    play(group, 0)
    group.load(make_group(config, 7))
    group.poison()
    inject(group)
    status = group.status(0)
    assert (fc.FAULTS[status.fault], status.peer, status.epoch) == (fault, peer, 2), describe(status)
    assert seen in (None, status.seen), describe(status)
    assert not group.part(0, "received", torch.int32, config.local).any(), "rows are delivered"
    group.set_outputs(fresh_outputs(group, 1))
    group.combine(only=0)
    assert (group.tensors[0].outputs["combined"] == 0).all(), "something old passes for a result"
    check_guards(group)
    group.recover()
    for seed in range(2):
        play(group, 50 + seed, each_by_itself_in_two_phases if seed else Group.dispatch)


def test_places_that_are_not_static_are_refused(kernels: Kernels) -> None:
    for config in (replace(CARRIED_PAIR, expert_rows=23), replace(CARRIED_PAIR, expert_rows=0)):
        with pytest.raises(emulated.Failure, match="refused before the launch"):
            Group(kernels, config, "cpu").dispatch()
