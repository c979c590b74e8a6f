"""What experts were asked for, for those who count rows behind a dispatch, where plans have cut and moved them."""

from torch import Tensor

from ..plan.plan import PlanResult

CLIPPED, REROUTED_IN = 1, 2  # rows of `PlanResult.counts`


class GivenUp:
    """Of the pass that is running, what plans of this rank's tokens took from each expert: rows clipped, less those
    re-routed in. Added to the rows that arrive, over all ranks, it gives those that were routed.
    """

    def __init__(self) -> None:
        self._counts: dict[int, list[Tensor]] = {}

    def add(self, layer_id: int, result: PlanResult) -> None:
        """One plan; of a layer's halves there are two."""
        self._counts.setdefault(layer_id, []).append(result.counts)

    def take(self) -> dict[int, Tensor]:
        """[E] of each layer that was planned since the last call."""
        taken, self._counts = self._counts, {}
        return {i: sum((c[CLIPPED] - c[REROUTED_IN]).sum(dim=1) for c in plans) for i, plans in taken.items()}
