"""What do high-entropy tokens carry? Visual tokens by fifths of their entropy: what is seen in them, and what answers
lose without their routed experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lab.lab_architecture import Routing
from lab.lab_cases import Case, Course, divergence, inputs_of, kept_of
from lab.lab_methods import Inputs, WithPlan
from sglang_macs.plan.plan import Plan

FIFTHS = 5
MEASURES = ("detail", "unlike the one before", "attention received", "greatest gate", "norm of the features")


def _fifths(given: Inputs) -> Tensor:
    """[P] i64: 0 for the fifth of visual tokens with the lowest entropy, ... 4 the highest; -1 for text."""
    layout, config = given.layout, WithPlan({"importance": "entropy_gate"}).config(1.0)
    plan = Plan(config, given.num_experts, 1)
    weight = plan.weight(given.hidden, layout.segment, layout.num_segments)  # falls with entropy
    found = torch.full_like(layout.tokens, -1)
    place = torch.nonzero(given.visual)[:, 0]
    order = (-weight[place]).argsort(stable=True)
    found[place[order]] = torch.arange(len(place), device=place.device) * FIFTHS // max(len(place), 1)
    return found


def _chance(given: Inputs) -> Tensor:
    """As `_fifths`, at random."""
    found = torch.randint(FIFTHS, given.layout.tokens.shape, device=given.ids.device)
    return found.masked_fill(~given.visual, -1)


def _measures(given: Inputs) -> dict[str, Tensor]:
    """What is known of each token, [P]."""
    hidden = given.hidden.float()
    unit = torch.nn.functional.normalize(hidden, dim=1)
    alike = torch.nn.functional.pad((unit[1:] * unit[:-1]).sum(1), (1, 0))
    found = (given.layout.detail, 1 - alike, given.received, given.weights.max(1).values, hidden.norm(dim=1))
    return dict(zip(MEASURES, found, strict=True))


@torch.no_grad()
def study(course: Course, seeds: Sequence[int], ranks: int = 8) -> dict:
    """Means over cases of every mix and seed: `measures` by fifth, `kl` and `kept` without a fifth's experts."""
    course.model.records_attention = True
    sums: dict[str, list[float]] = {name: [0.0] * FIFTHS for name in MEASURES}
    lost: dict[str, list[list[float]]] = {"entropy": [], "chance": []}
    specs = [(0, seed, mix) for seed in seeds for mix in range(len(course.mixes))]
    for spec in specs:
        case = course.case(*spec, ranks)
        for given in case.inputs:
            fifth = _fifths(given)
            for name, values in _measures(given).items():
                for i in range(FIFTHS):
                    sums[name][i] += float(values[fifth == i].mean()) / len(case.inputs) / len(specs)
        for name, split, fifths in (("entropy", _fifths, range(FIFTHS)), ("chance", _chance, (0,))):
            lost[name] += [[i, *_without(course, case, split, i)] for i in fifths]
    course.model.records_attention = False

    def mean(name: str, column: int) -> list[float]:
        chosen = [[row[column] for row in lost[name] if row[0] == i] for i in range(FIFTHS)]
        return [round(sum(x) / len(x), 6) for x in chosen if x]

    return {
        "cases": len(specs),
        "measures": {name: [round(x, 5) for x in row] for name, row in sums.items()},
        "kl": {name: mean(name, 1) for name in lost},
        "kept": {name: mean(name, 2) for name in lost},
    }


def _without(course: Course, case: Case, split: Callable[[Inputs], Tensor], fifth: int) -> tuple[float, float]:
    """KL of the answers' tokens and share of right answers kept, if a fifth of the visual tokens has no routed experts
    in any layer.
    """

    def seam(routing: Routing) -> tuple[Tensor, Tensor]:
        given = inputs_of(course.model, routing, case.layout)
        gone = torch.zeros(len(routing.ids), 1, dtype=torch.bool, device=routing.ids.device)
        gone[case.layout.tokens] = (split(given) == fifth)[:, None]
        return routing.ids.masked_fill(gone, -1), routing.weights.masked_fill(gone, 0)

    logits, _ = course.model.decode(case.embedded, seam, course.dtype)
    return divergence(case, logits), kept_of(case, logits)
