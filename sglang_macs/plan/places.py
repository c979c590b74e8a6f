"""Where one MoE layer's experts lie, and the tables by which a plan chooses among replicas (docs/design/method.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MacsError


class Places:
    """One layer's experts on the ranks. A *place* is an expert's first copy on a rank; further ones there get no rows.

    The tables are one tensor (csrc/include/macs/replicas.h) of a size that never changes, refreshed in place: whatever
    holds its address, such as a CUDA graph, sees the new ones. Refresh between two passes, on all ranks alike.

    logical [P + 1] i64, of each physical expert, and -1 behind it for the id -1; on_ranks [E, R] bool, which ranks have
    it; first [E] i64, its physical expert on the lowest of them: of this moment, new with every refresh, so that what
    counts late may keep them. On the host.

    Args:
        num_experts, num_physical, num_ranks: E, P and R; E <= P, P % R == 0.
        rank: this process's.
        physical_to_logical: [P], as of `refresh`.
    """

    def __init__(
        self,
        num_experts: int,
        num_physical: int,
        num_ranks: int,
        rank: int,
        physical_to_logical: Sequence[int] | Tensor,
    ) -> None:
        if num_ranks < 1 or num_physical % num_ranks or num_physical < num_experts:
            got = f"{num_physical} copies of {num_experts} experts on {num_ranks} ranks"
            raise MacsError("expert parallelism", got, "a whole number of copies on each, and every expert once")
        self.num_experts, self.num_physical = num_experts, num_physical
        self.num_ranks, self.rank = num_ranks, rank
        self._table = torch.zeros(4 + 5 * num_physical, dtype=torch.int32, device="cpu")
        self._elsewhere: dict[torch.device, Tensor] = {}
        self._logical_elsewhere: dict[torch.device, Tensor] = {}
        self.refresh(physical_to_logical)

    @property
    def num_redundant(self) -> int:
        """X = P - E."""
        return self.num_physical - self.num_experts

    @property
    def exchange_size(self) -> int:
        """Numbers that the exchange sums behind the histogram."""
        return self.num_ranks * (1 + 2 * self.num_redundant)

    def table(self, device: torch.device) -> Tensor:
        """The tables on `device`; always the same memory."""
        return _on(device, self._table, self._elsewhere)

    def logical_on(self, device: torch.device) -> Tensor:
        """`logical` on `device`."""
        return _on(device, self.logical, self._logical_elsewhere)

    def refresh(self, physical_to_logical: Sequence[int] | Tensor) -> None:
        """From [P], the logical expert of each physical one. Raises MacsError where an expert is nowhere."""
        logical = torch.as_tensor(physical_to_logical, dtype=torch.int64, device="cpu").clone()
        if wrong := self._wrong(logical):
            raise MacsError(
                "expert location", wrong, f"{self.num_physical} copies of experts 0 to {self.num_experts - 1}"
            )
        first = self._first_copies(logical.tolist())
        self.logical = torch.cat([logical, logical.new_tensor([-1])])
        with torch.device("cpu"):  # a model is built with its GPU as the default device, and EPLB moves experts without
            self.first = torch.tensor([next(iter(of_expert.values())) for of_expert in first])
            self.on_ranks = torch.zeros((self.num_experts, self.num_ranks), dtype=torch.bool)
            numbers = torch.tensor(self._numbers(first), dtype=torch.int32)
        for expert, of_expert in enumerate(first):
            self.on_ranks[expert, list(of_expert)] = True
        self._logical_elsewhere.clear()
        self._table.copy_(numbers)
        for table in self._elsewhere.values():
            table.copy_(self._table)

    def _wrong(self, logical: Tensor) -> str:
        """What is wrong with a placement, or ""."""
        if logical.shape != (self.num_physical,):
            return f"numbers of shape {tuple(logical.shape)}"
        known, given = set(range(self.num_experts)), set(logical.tolist())
        if unknown := given - known:
            return f"expert {min(unknown)}"
        return f"none of expert {min(known - given)}" if known - given else ""

    def _first_copies(self, logical: list[int]) -> list[dict[int, int]]:
        """{rank: physical expert} of each expert, by ascending rank."""
        width = self.num_physical // self.num_ranks
        first: list[dict[int, int]] = [{} for _ in range(self.num_experts)]
        for physical, expert in enumerate(logical):
            first[expert].setdefault(physical // width, physical)
        return first

    def _numbers(self, first: list[dict[int, int]]) -> list[int]:
        ends, ranks, physical = [0], list[int](), list[int]()
        for of_expert in first:
            ranks += of_expert.keys()
            physical += of_expert.values()
            ends.append(len(ranks))
        unused = [0] * (self.num_physical - len(ranks))
        replicated = [expert for expert, of_expert in enumerate(first) if len(of_expert) > 1]
        row = [-1] * self.num_experts
        for i, expert in enumerate(replicated):
            row[expert] = i
        steps = _steps([list(first[expert]) for expert in replicated])
        order = [replicated[i] for step in steps for i in step]
        step_ends = [sum(map(len, steps[: i + 1])) for i in range(len(steps))]
        numbers = [self.rank, len(replicated), len(steps), *self.logical[:-1].tolist(), *ends]
        numbers += [*ranks, *unused, *physical, *unused, *row]
        return numbers + [n for part in (step_ends, order) for n in (*part, *[0] * (self.num_redundant - len(part)))]


def _on(device: torch.device, on_host: Tensor, elsewhere: dict[torch.device, Tensor]) -> Tensor:
    """The tensor itself on the host, else its copy on `device`, made once."""
    if device.type == "cpu":
        return on_host
    if device not in elsewhere:
        elsewhere[device] = on_host.to(device)
    return elsewhere[device]


def _steps(ranks: list[list[int]]) -> list[list[int]]:
    """Which of the experts with places on `ranks` are poured together: most places first, and no two of a step share a
    rank, so that a step gives the same whether its experts go one after the other or at once.
    """
    steps: list[list[int]] = []
    used: list[set[int]] = []
    for i in sorted(range(len(ranks)), key=lambda i: (-len(ranks[i]), i)):
        at = next((n for n, taken in enumerate(used) if taken.isdisjoint(ranks[i])), len(steps))
        if at == len(steps):
            steps.append([])
            used.append(set())
        steps[at].append(i)
        used[at].update(ranks[i])
    return steps
