"""peer_all_reduce on the emulated machine: sums of many epochs over the same regions, ranks that run apart, and a dead
one."""

from __future__ import annotations

import pytest
import torch

from reference import fused_c as fc
from reference.peer_reduce_case import ReduceGroup
from tests.support import emulated
from tests.support.emulated import Kernels

pytestmark = pytest.mark.emulated
SOURCES = [emulated.CUDA / name for name in ("peer_all_reduce.cu", "peer_capi.cu")]
SOON_NS = 300_000  # of simulated time


def build(*defines: str, races: bool = False) -> Kernels:
    return Kernels(emulated.build("peer_all_reduce", *SOURCES, defines=["MACS_C_API", *defines], races=races))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "watched"])
def kernels(request) -> Kernels:
    return build(races=request.param)


def launch(group: ReduceGroup, ranks) -> None:
    """Those ranks, at the same time."""
    with group.kernels.machine.together():
        for rank in ranks:
            group.kernels.stream = rank + 1
            group.launch(rank)


# Less than a block, and some blocks; with more sources than are in flight.
@pytest.mark.parametrize(("ranks", "size"), [(1, 5), (2, 700), (3, 1), (4, 1030), (10, 300)])
@pytest.mark.parametrize("hops", [1, 2])
def test_sums_of_many_epochs(kernels: Kernels, ranks: int, size: int, hops: int) -> None:
    group = ReduceGroup(kernels, ranks, size, "cpu", hops=hops)
    for seed in range(5):
        kernels.machine.configure(seed)
        group.load(seed)
        launch(group, range(ranks))
        for rank in range(ranks):
            assert torch.equal(group.values(rank), group.expected())
            assert group.status(rank).fault == 0
    assert not group.unguarded()


@pytest.mark.parametrize("hops", [1, 2])
def test_a_thread_adds_more_values_than_one(hops: int) -> None:
    """As of 128 experts, where all blocks have fewer threads than there are values: here two blocks do."""
    group = ReduceGroup(build("MACS_REDUCE_BLOCKS=2"), 3, 2 * 2 * 256 + 4, "cpu", hops=hops)
    for seed in range(3):
        group.load(seed)
        launch(group, range(3))
        for rank in range(3):
            assert torch.equal(group.values(rank), group.expected())


@pytest.mark.parametrize("hops", [1, 2])
def test_a_rank_may_be_an_epoch_ahead(kernels: Kernels, hops: int) -> None:
    """Several epochs of all ranks in flight, each over the sums of the one before: the words of the next epoch do not
    take those of this one away.
    """
    group = ReduceGroup(kernels, 3, 600, "cpu", hops=hops)
    for seed in range(4):
        group.load(seed)
        kernels.machine.configure(seed)
        with kernels.machine.together():
            for rank in range(3):
                kernels.stream = rank + 1
                for _ in range(3):
                    group.launch(rank)
        for rank in range(3):
            assert torch.equal(group.values(rank), group.expected() * 9)


@pytest.mark.parametrize("hops", [1, 2])
def test_a_rank_that_never_comes_is_named_and_nobody_gets_half_a_sum(kernels: Kernels, hops: int) -> None:
    group = ReduceGroup(kernels, 3, 600, "cpu", timeout_ns=SOON_NS, hops=hops)
    for seed in range(2):
        group.load(seed)
        launch(group, range(3))
    group.load(9)
    launch(group, [0, 2])
    for rank in (0, 2):
        found = group.status(rank)
        assert (fc.FAULTS[found.fault], found.peer, found.epoch, found.seen) == ("values", 1, 3, 1)
        assert torch.equal(group.values(rank), group.own[rank])
    before = kernels.machine.now_ns
    launch(group, [0, 2])  # with a fault on record nobody waits any more
    assert kernels.machine.now_ns - before < SOON_NS
    assert not group.unguarded()


def test_sizes_that_are_none_are_refused(kernels: Kernels) -> None:
    for wrong in ({"num_ranks": 17}, {"rank": 2}, {"size": 0}, {"hops": 3}, {"hops": -1}):
        params = ReduceGroup(kernels, 2, 4, "cpu").params(0)
        for name, value in wrong.items():
            setattr(params, name, value)
        with pytest.raises(emulated.Failure, match="refused before the launch"):
            kernels("peer_all_reduce", params)


def words_sent(kernels: Kernels, ranks: int, size: int, hops: int) -> list[int]:
    """Of every rank in one epoch: how many LL words lie in its peers' inboxes where it writes."""
    group = ReduceGroup(kernels, ranks, size, "cpu", hops=hops)
    group.load(1)
    launch(group, range(ranks))
    inboxes = [group.inbox(rank)[1] for rank in range(ranks)]  # of the first epoch, an odd one
    return [
        sum(int((inboxes[peer][rank] >> 32 == 1).sum()) for peer in range(ranks) if peer != rank)
        for rank in range(ranks)
    ]


def test_bytes_do_not_grow_with_the_ranks_where_owners_add_up(kernels: Kernels) -> None:
    assert words_sent(kernels, 5, 320, 1) == [4 * 320] * 5
    assert words_sent(kernels, 5, 320, 2) == [2 * 4 * 320 // 5] * 5
    assert words_sent(kernels, 5, 320, 0) == words_sent(kernels, 5, 320, 2)
    assert words_sent(kernels, 4, 320, 0) == words_sent(kernels, 4, 320, 1)
    assert words_sent(kernels, 5, 159, 0) == words_sent(kernels, 5, 159, 1)  # a rank would own nothing
