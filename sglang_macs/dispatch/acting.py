"""Which layers of a pass are worth a plan (`--macs-act auto`).

A plan takes rows off the most loaded rank, and takes time itself. What a layer would gain follows from what its last
plans did gain, and from the size of the batch now. A layer that would gain less than a plan costs is left alone, but
planned once in `LOOK_EVERY` passes nevertheless: loads are exchanged by plans alone. Gains are averaged over plans of
passes in a row, since pictures and text load ranks differently and take turns; a plan behind a gap begins anew, so that
one look finds a change.

A plan is collective: a rank that decided by itself would wait for ever. So every input of the decision is alike on all
ranks by construction: the group's histogram and its bounds, the group's tokens, a count of passes, and a number of rows
that the ranks agreed upon at start-up. *When* loads count does not depend on when they arrive, either: pass n goes by
what was exchanged up to pass n - `LAG`, and waits for it. On a GPU loads follow their pass to the host. As a rule there
is nothing to wait for: SGLang's scheduler has the results of pass n - 2 before it launches pass n
(`Scheduler.event_loop_overlap`). Where it runs further ahead (pipeline stages) the wait ends, since no rank's pass
n - 2 needs a later one.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import NUM_SUMS
from ..observe.backlog import to_host
from ..observe.stats import rows_per_bound
from ..plan.batch import Batch
from ..plan.plan import Plan, PlanResult

LAG = 2  # passes
AVERAGED = 8  # plans
LOOK_EVERY = 31  # passes; no divisor of --macs-verify-every's 64, so that every layer's plan meets a recount


def rows_gained(loads: Tensor, bounds: Tensor, assignments: Tensor, num_ranks: int) -> list[int]:
    """Rows that each of N plans took off the most loaded rank. What is clipped from a bound is taken to leave the rank.

    loads [N, E] and bounds [N, NB] i64 in units, assignments [N] i64, all of the group.
    """
    routed = rows_per_bound(loads, bounds.shape[1])
    kept = torch.minimum(routed, bounds)
    before, after = (rows_per_bound(units, num_ranks).amax(dim=1) for units in (routed, kept))
    return ((before - after) * assignments // loads.sum(dim=1).clamp(min=1)).tolist()


class _Planned(NamedTuple):
    """What is kept of one plan until its pass ends, of `PlanResult`: the group's histogram, cut [NB, 4], and with
    replicas rank_rows [2, R].
    """

    layer_id: int
    group: Tensor
    cut: Tensor
    rank_rows: Tensor | None


class _Plans(NamedTuple):
    """Plans of layers of equal size: what is read of each is numbers [N, E + NB + 1], loads, bounds and assignments;
    with replicas (num_experts is 0) [N, 3 R], rows of each rank as routed and as balanced, and bounds.
    """

    layer_ids: list[int]
    num_experts: int
    num_ranks: int
    numbers: Tensor

    def rows_gained(self) -> list[int]:
        if not self.num_experts:
            routed, balanced, bounds = self.numbers.split(self.num_ranks, dim=1)
            return (routed.amax(dim=1) - torch.minimum(balanced, bounds).amax(dim=1)).tolist()
        num_bounds = self.numbers.shape[1] - self.num_experts - 1
        loads, bounds, assignments = self.numbers.split([self.num_experts, num_bounds, 1], dim=1)
        return rows_gained(loads, bounds, assignments.squeeze(1), self.num_ranks)


class _Gains:
    """Of one layer's last plans, in passes in a row, at most `AVERAGED`: rows off the most loaded rank."""

    def __init__(self) -> None:
        self._plans: deque[tuple[int, int]] = deque()
        self._rows = self._tokens = 0  # of all of them
        self._number = 0

    def add(self, number: int, tokens: int, rows: int) -> None:
        """Of pass `number`, in a batch of so many tokens of the group."""
        if self._number < number - 1:
            self._plans.clear()
            self._rows = self._tokens = 0
        elif len(self._plans) == AVERAGED:
            old_tokens, old_rows = self._plans.popleft()
            self._tokens -= old_tokens
            self._rows -= old_rows
        self._plans.append((tokens, rows))
        self._tokens += tokens
        self._rows += rows
        self._number = number

    def expected(self, tokens: int) -> int:
        """Rows to expect of a plan for `tokens` tokens of the group."""
        return self._rows * tokens // (self._tokens or 1)


@dataclass(frozen=True)
class _Exchanged:
    """What pass `number` exchanged, on its way to the host."""

    number: int
    tokens: int
    plans: list[_Plans]
    arrived: torch.cuda.Event | None


class Acting:
    """Decides for one process, as all ranks of its EP group do. `rows_that_pay` 0: every layer is planned."""

    def __init__(self) -> None:
        self.rows_that_pay = 0
        self._passes = 0  # that were planned, in part at least
        self._tokens = 0  # of the pass that is running
        self._planned: dict[tuple, list[_Planned]] = {}  # in it, by their sizes
        self._exchanged: deque[_Exchanged] = deque()
        self._gains: dict[int, _Gains] = {}  # of each layer

    def forget(self, rows_that_pay: int) -> None:
        """Begins anew: gains under other options say nothing of these. On all ranks before the same pass."""
        self.rows_that_pay = rows_that_pay
        self._exchanged.clear()
        self._gains.clear()

    def decide(self, decided: Batch, *, every_layer: bool = False) -> Batch:
        """`decided`, a batch that is to be planned, with the layers that are left alone in it. Before each such pass.

        every_layer: none is, though it be for other reasons than rows.
        """
        if not self.rows_that_pay:
            return decided
        number, self._tokens = self._passes, decided.group_tokens
        self._passes += 1
        while self._exchanged and self._exchanged[0].number <= number - LAG:
            self._learn(self._exchanged.popleft())
        gain = {layer_id: gains.expected(decided.group_tokens) for layer_id, gains in self._gains.items()}
        too_little = (i for i, rows in gain.items() if rows < self.rows_that_pay and (number + i) % LOOK_EVERY)
        return replace(decided, gain=gain, no_gain=frozenset() if every_layer else frozenset(too_little))

    def add(self, layer_id: int, plan: Plan, result: PlanResult) -> None:
        """One plan of the pass that is running. Its histogram is kept until the end of the pass."""
        if self.rows_that_pay:
            num_experts = plan.num_experts if result.rank_rows is None else 0
            alike = (num_experts, plan.num_ranks, result.group.shape, result.cut.shape)
            planned = _Planned(layer_id, result.group, result.cut, result.rank_rows)
            self._planned.setdefault(alike, []).append(planned)

    def end_pass(self) -> None:
        """Behind each pass, on its stream: sends what was exchanged on its way. The host does not wait."""
        if not self._planned:
            return
        with torch.inference_mode():
            plans = [_read(alike[0], alike[1], planned) for alike, planned in self._planned.items()]
        arrived = None
        if any(one.group.is_cuda for planned in self._planned.values() for one in planned):
            arrived = torch.cuda.Event()
            arrived.record()
        self._planned = {}
        self._exchanged.append(_Exchanged(self._passes - 1, self._tokens, plans, arrived))

    def _learn(self, exchanged: _Exchanged) -> None:
        if exchanged.arrived is not None:
            exchanged.arrived.synchronize()
        rows: dict[int, int] = {}
        for plans in exchanged.plans:
            for layer_id, gained in zip(plans.layer_ids, plans.rows_gained(), strict=True):
                rows[layer_id] = rows.get(layer_id, 0) + gained  # both halves' under two-batch overlap
        for layer_id, gained in rows.items():
            if layer_id not in self._gains:
                self._gains[layer_id] = _Gains()
            self._gains[layer_id].add(exchanged.number, exchanged.tokens, gained)


def _read(num_experts: int, num_ranks: int, planned: list[_Planned]) -> _Plans:
    bounds = torch.stack([one.cut for one in planned])[:, :, 3]
    if not num_experts:
        rank_rows = torch.stack([one.rank_rows for one in planned]).flatten(1)
        return _Plans([one.layer_id for one in planned], 0, num_ranks, to_host(torch.cat([rank_rows, bounds], dim=1)))
    groups = torch.stack([one.group for one in planned])
    loads = groups[:, :-NUM_SUMS].unflatten(1, (num_experts, -1)).sum(dim=2)
    numbers = torch.cat([loads, bounds, groups[:, -NUM_SUMS, None]], dim=1)
    return _Plans([one.layer_id for one in planned], num_experts, num_ranks, to_host(numbers))
