"""Whether a batch's answers are right, and how unevenly its tokens load the ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lab.lab_architecture import Batch, Routing
from lab.lab_pictures import patches
from lab.lab_tasks import NO_LABEL, Group

RANKS = 8  # virtual expert-parallel ranks; experts are placed linearly


def as_batch(group: Group) -> Batch:
    """The group as the model takes it."""
    return Batch(group.size, group.ids, None if group.pictures is None else patches(group.pictures), group.length)


def exact(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] bool: every token of the answer is the likeliest one after those before it, so greedy decoding is right."""
    return ((logits.argmax(-1) == labels) | (labels == NO_LABEL)).all(1)


def by_task(groups: Sequence[Group], right: Sequence[Tensor]) -> dict[str, list[bool]]:
    """Rows of `right` [n] per group under "task/size"."""
    found: dict[str, list[bool]] = {}
    for group, rows in zip(groups, right, strict=True):
        for (task, _), part in zip(group.tasks, rows.split([n for _, n in group.tasks]), strict=True):
            found.setdefault(f"{task}/{group.name}", []).extend(part.tolist())
    return found


def expert_rows(routing: Routing, num_experts: int) -> Tensor:
    """[E] f32: assignments of each expert."""
    ids = routing.ids.flatten()
    return torch.zeros(num_experts, device=ids.device).scatter_add_(0, ids.clamp(min=0), (ids >= 0).float())


def max_over_mean(rows: Tensor, parts: int = RANKS) -> Tensor:
    """Load of the fullest of `parts` equal blocks of experts, over the mean; 0-dim."""
    load = rows.view(parts, -1).sum(1)
    return load.max() / load.mean().clamp(min=1e-9)
