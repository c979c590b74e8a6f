"""Expert skipping after MoDES (CVPR 2026, https://github.com/ModelTC/MoDES), as a method of the comparison.

An assignment is skipped where its gate times its layer's importance is below a threshold of its token's modality. The
layer's importance is measured: by how much the answers change without the layer's routed experts. MoDES searches the
thresholds once, for a share of skipped assignments; here the bound on the fullest rank sets them, as for all methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lab.lab_methods import Decide, Inputs, Method, Outcome, fullest, limit, mildest

RATIOS = (0.1, 0.3, 1.0)  # text's threshold over visual tokens'; the best is taken by calibration


@dataclass(frozen=True)
class Skipping:
    """importance: of every MoE layer, at most 1; ratio: one of `RATIOS`."""

    ratio: float = 1.0
    importance: dict[int, float] = field(default_factory=dict)

    def __call__(self, given: Inputs, bound: float) -> Outcome:
        """With the lowest threshold at which this layer meets the bound; misses it where that skips all that it may."""
        most = limit(given, bound)
        kept = mildest(lambda k: fullest(given, self.skip(given, 1 / k)) <= most, 1e-3, 1e9)
        return self.outcome(given, 1 / kept)

    def across(self, inputs: list[Inputs], bound: float) -> Decide:
        """With one threshold for all layers, at which their fullest ranks meet the bound on average: as much work of
        the slowest rank over the whole pass, spread as the layers' importance has it.
        """

        def fits(kept: float) -> bool:
            over = [fullest(x, self.skip(x, 1 / kept)) / (x.ids.numel() / x.layout.ranks) for x in inputs]
            return sum(over) / len(over) <= bound

        threshold = 1 / mildest(fits, 1e-3, 1e9)
        return lambda given, _: self.outcome(given, threshold)

    def skip(self, given: Inputs, threshold: float) -> Tensor:
        """ids [P, K]; a token's best expert stays."""
        score = given.weights * self.importance.get(given.layer, 1.0)
        of_token = torch.where(given.visual, threshold, threshold * self.ratio)[:, None]
        best = score >= score.max(1, keepdim=True).values
        return given.ids.masked_fill((score < of_token) & ~best, -1)

    def outcome(self, given: Inputs, threshold: float) -> Outcome:
        ids = self.skip(given, threshold)
        return Outcome(ids, given.weights.masked_fill(ids < 0, 0))


def methods(ratio: float, importance: dict[int, float]) -> list[Method]:
    by_layer, whole = Skipping(ratio), Skipping(ratio, importance)
    return [
        Method("skipping", by_layer, "low gate, a threshold in each layer"),
        Method("skipping, one threshold", whole, "low gate x layer's importance", across=whole.across),
    ]


def relative(changes: Sequence[float], layers: Sequence[int]) -> dict[int, float]:
    """Importance by layer of how much the answers changed without each."""
    most = max(max(changes), 1e-9)
    return {layer: max(change / most, 1e-3) for layer, change in zip(layers, changes, strict=True)}
