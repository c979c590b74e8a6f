"""A layer's tables (csrc/include/macs/replicas.h) as kernels take them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from ..policy import unpack
from . import checks


class Places(NamedTuple):
    """Views of the one tensor that is refreshed in place: a graph that holds their addresses sees experts move.

    head [3]: own rank, numbers of replicated experts and of steps. The rest as in the header, all i32.
    """

    head: Tensor
    logical: Tensor
    first: Tensor
    rank: Tensor
    physical: Tensor
    row: Tensor
    step_end: Tensor
    step_order: Tensor

    @property
    def num_physical(self) -> int:
        """P."""
        return self.logical.numel()

    @property
    def num_redundant(self) -> int:
        """X = P - E."""
        return self.step_order.numel()


def read(policy: list[float], table: Tensor, beside: Tensor) -> tuple[SimpleNamespace, Places]:
    """The options that go with these tables, and the tables. Raises ValueError for what does not go together."""
    num_physical = checks.tables(table, beside)
    p = unpack(policy, num_physical)
    checks.goes_with_places(p, num_physical)
    num_experts, num_redundant = p.num_experts, num_physical - p.num_experts
    sizes = 3, num_physical, num_experts + 1, num_physical, num_physical, num_experts, num_redundant, num_redundant
    return p, Places(*table.contiguous().split(sizes))


def read_optional(policy: list[float], table: Tensor | None, beside: Tensor) -> tuple[SimpleNamespace, Places | None]:
    """As `read`; None: experts lie linearly."""
    return (unpack(policy), None) if table is None else read(policy, table, beside)
