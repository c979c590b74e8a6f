"""How a layer's router chooses a token's experts: what the order of re-routing and its weights follow."""

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..choices import SCORINGS
from ..ops import policy


@dataclass(frozen=True, eq=False)
class Routing:
    """A router: experts are ranked by score plus bias within the token's best groups, and weighed by score alone.

    scoring: "softmax", "sigmoid" or "sqrtsoftplus" of the logits.
    correction_bias: [E], added to the scores for the choice alone; read anew in every plan, since weights are loaded
    into it later. None: nothing is added.
    num_groups, topk_groups: the experts of a token come from the best topk_groups of num_groups equal groups.

    Raises MacsError for a scoring that does not exist.
    """

    scoring: str = "softmax"
    correction_bias: Tensor | None = None
    num_groups: int = 1
    topk_groups: int = 1

    def __post_init__(self) -> None:
        policy.choice("scoring", self.scoring, SCORINGS)

    @property
    def needs_selection(self) -> bool:
        """Whether experts are ranked otherwise than by their logits."""
        return self.correction_bias is not None or self.topk_groups < self.num_groups

    def selection(self, router_logits: Tensor) -> Tensor | None:
        """[T, E] f32, what a token's experts are ranked by, from logits [T, E]; None: by their logits."""
        if not self.needs_selection:
            return None
        bias = None if self.correction_bias is None else self.correction_bias.float()
        return ops.selection_score(router_logits, bias, self.scoring, self.num_groups, self.topk_groups)
