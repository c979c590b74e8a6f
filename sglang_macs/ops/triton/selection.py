"""selection_score (docs/design/method.md 5) in torch's own operations: few routers need it, and once a layer."""

import torch
from torch import Tensor
from torch.nn import functional

from ...choices import SCORINGS
from . import checks


def selection_score(
    router_logits: Tensor, correction_bias: Tensor | None, scoring: int, num_groups: int, topk_groups: int
) -> Tensor:
    checks.selects(router_logits, correction_bias, num_groups, topk_groups)
    logits = router_logits.float()
    closed = ~logits.isfinite()
    score = _scores(logits.masked_fill(closed, float("-inf")), SCORINGS[scoring])
    if correction_bias is not None:
        score = score + correction_bias
    score = score.masked_fill(closed | ~score.isfinite(), float("-inf"))
    if topk_groups == num_groups:
        return score
    in_groups = score.unflatten(1, (num_groups, -1))
    best = in_groups.topk(1 if correction_bias is None else 2, dim=2).values.sum(2)
    order = best.sort(dim=1, descending=True, stable=True).indices  # of equal groups the first is better
    taken = torch.zeros_like(best, dtype=torch.bool).scatter_(1, order[:, :topk_groups], True)
    return in_groups.masked_fill(~taken.unsqueeze(2), float("-inf")).flatten(1)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else functional.softplus(logits).sqrt()
