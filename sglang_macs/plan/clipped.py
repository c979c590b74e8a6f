"""Whose tokens lost assignments in a pass: noted on the device, layer by layer, and read once behind the last one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Clipped:
    """Of one pass, on this rank."""

    def __init__(self) -> None:
        self._rows: dict[int | None, Tensor] = {}  # by half: which rows of a MoE layer, [rows] bool

    def add(self, half: int | None, routed: Tensor, sent: Tensor) -> None:
        """One dispatch; experts [rows, K] of the router, and those that are sent to."""
        changed = (routed != sent).any(dim=1)
        known = self._rows.get(half)
        self._rows[half] = changed if known is None else known | changed

    def of_tokens(
        self,
        tokens: int,
        halves: Sequence[tuple[int, int]],
        attn_tp: tuple[int, int],
        all_reduce: Callable[[Tensor], object],
    ) -> Tensor | None:
        """[tokens] bool of the batch, as all ranks that share it know it; None where nothing was planned. Collective
        among those.

        halves: (start, end) token of each half under two-batch overlap; attn_tp: (rank, size) of the ranks that share
        a batch; all_reduce: sums over them, in place.
        """
        if not self._rows:
            return None
        rank, size = attn_tp
        of_batch = next(iter(self._rows.values())).new_zeros(tokens, dtype=torch.int32)
        for half, rows in self._rows.items():
            share = len(rows)
            whole = of_batch.new_zeros(share * size)
            whole[rank * share : (rank + 1) * share] = rows
            if size > 1:
                all_reduce(whole)
            start, end = (0, tokens) if half is None else halves[half]
            of_batch[start:end] += whole[: end - start] if end - start <= len(whole) else 1  # rows of another batch
        return of_batch > 0


def requests(lengths: Sequence[int], of_tokens: Tensor) -> list[bool]:
    """Which requests have such a token; lengths: tokens of each. of_tokens: on the host."""
    return [bool(part.any()) for part in of_tokens[: sum(lengths)].split(list(lengths))]
