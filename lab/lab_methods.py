"""What is compared: every way of giving assignments up, behind one interface, at one bound on the fullest rank.

A method turns a layer's routing into what is dispatched. `bound` is the most rows that a rank may get over the mean of
the ranks before clipping. Methods with a bound per rank meet it by construction; those with a bound per expert, and the
visual cut, are given the mildest strength that meets it in this batch and layer (`mildest`), so that all are compared
at equal work of the slowest rank. Only prompts are planned: answers are decoded, which MACS leaves alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.routing import Routing as Router

SOFTMAX = Router()
EFFORT = 9  # halvings of the bracket in which `mildest` looks


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch that are planned, source rank by source rank.

    tokens [P] i64: places in [T]; sizes: of each rank's share; segment [P] i32, -1 = text; num_segments per rank;
    detail [P] f32: how much is to be seen in a visual token's pixels, 0 to 1, 1 for text.
    """

    tokens: Tensor
    sizes: list[int]
    segment: Tensor
    num_segments: int = 1
    detail: Tensor | None = None

    @property
    def ranks(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Inputs:
    """One layer's routing, restricted to the layout's tokens: hidden [P, H], logits [P, E], ids, weights [P, K];
    received [P] f32: attention that later tokens of the request paid to each, where that is recorded; router: how the
    layer chooses and weighs.
    """

    layer: int
    hidden: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor
    layout: Layout
    received: Tensor | None = None
    router: Router = SOFTMAX

    @property
    def visual(self) -> Tensor:
        return self.layout.segment >= 0

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    @property
    def per_rank(self) -> int:
        return self.num_experts // self.layout.ranks


@dataclass(frozen=True)
class Outcome:
    """ids, weights [P, K] to dispatch, and the seconds that the decision took (0 where it is not timed); rows [R] of
    each rank, where experts do not lie linearly.
    """

    ids: Tensor
    weights: Tensor
    seconds: float = 0.0
    rows: Tensor | None = None


Decide = Callable[[Inputs, float], Outcome]


@dataclass(frozen=True)
class Method:
    """A named way of deciding; `note` says what it stands for."""

    name: str
    decide: Decide
    note: str = ""
    acts_above_bound_only: bool = True  # a batch whose ranks are all within the bound passes unchanged
    # For a strength that all layers share: makes `decide` from their unclipped routings and the bound.
    across: Callable[[list[Inputs], float], Decide] | None = None


def rank_rows(ids: Tensor, num_experts: int, ranks: int) -> Tensor:
    """[R] i64: rows of every rank."""
    rank = torch.where(ids >= 0, ids // (num_experts // ranks), ranks).flatten()
    return torch.zeros(ranks + 1, dtype=torch.long, device=ids.device).scatter_add_(0, rank, torch.ones_like(rank))[:-1]


def fullest(given: Inputs, ids: Tensor) -> int:
    """Rows of the fullest rank, if `ids` [P, K] were dispatched."""
    return int(rank_rows(ids, given.num_experts, given.layout.ranks).max())


def limit(given: Inputs, bound: float) -> int:
    """Rows that no rank may exceed."""
    return int(bound * int((given.ids >= 0).sum()) / given.layout.ranks)


def mildest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """About the largest strength in (low, high) that fits, for a strength that gives up less the larger it is."""
    if fits(high):
        return high
    for _ in range(EFFORT):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- the product's operators ---------------------------------------------------------------------------------------

Importance = Callable[[Inputs, Tensor], Tensor]  # (inputs, entropy weight [P]) -> [P, K] f32 >= 0


@dataclass
class WithPlan:
    """`sglang_macs.plan` on every source rank, its histograms summed as the group's exchange does.

    options: of `MacsConfig`; modality: [E] i8 by layer; importance: in place of the configuration's own (then the
    weights of re-routed slots are put right afterwards).
    """

    options: dict
    modality: dict[int, Tensor] = field(default_factory=dict)
    importance: Importance | None = None

    def __call__(self, given: Inputs, bound: float) -> Outcome:
        gamma = bound if self.config(1.0).scope == "rank" else self.fit(given, bound)
        start = _clock(given.ids.device)
        ids, weights = self.run(given, gamma)
        return Outcome(ids, weights, _clock(given.ids.device) - start)

    def fit(self, given: Inputs, bound: float) -> float:
        """The gamma of a bound per expert at which the fullest rank meets `bound`."""
        most = limit(given, bound)
        tokens = len(given.layout.tokens)
        whole = replace(given, layout=replace(given.layout, sizes=[tokens, *[0] * (given.layout.ranks - 1)]))

        def fits(inputs: Inputs, gamma: float) -> bool:
            return fullest(given, self.run(inputs, gamma)[0]) <= most

        # Searched with all tokens on one rank, which is cheap; on all the shares are rounded a little differently.
        gamma = mildest(lambda g: fits(whole, g), 0.02, 64.0)
        while not fits(given, gamma):
            gamma *= 0.98
        return gamma

    def config(self, gamma: float) -> MacsConfig:
        return MacsConfig.from_preset(**{"preset": "rank", **self.options, "gamma": gamma})

    def run(self, given: Inputs, gamma: float) -> tuple[Tensor, Tensor]:
        """New ids and weights [P, K] at this gamma."""
        config, layout = self.config(gamma), given.layout
        if self.importance is not None:
            config = replace(config, importance="gate")
        plan = Plan(config, given.num_experts, layout.ranks, self.modality.get(given.layer), given.router)
        plan._needs_entropy |= self.importance is not None
        ranks = [r for r, size in enumerate(layout.sizes) if size]

        def split(x: Tensor) -> tuple[Tensor, ...]:
            return x.split(layout.sizes)

        hidden, segment, ids, logits = map(split, (given.hidden, layout.segment, given.ids, given.logits))
        weight = {r: plan.weight(hidden[r], segment[r], layout.num_segments) for r in ranks}
        whole = torch.cat(list(weight.values()))
        gates = split(given.weights if self.importance is None else self.importance(given, whole))
        own = {r: plan.histogram(ids[r], gates[r], weight[r], segment[r]) for r in ranks}
        group = torch.stack(list(own.values())).sum(0, dtype=torch.int32)
        new_ids, new_weights = [], []
        for r in ranks:
            shift, cut = plan.threshold(own[r], group)
            to_reroute = None if config.reroute == "none" else logits[r]
            a, b, _ = plan.apply(ids[r], gates[r], weight[r], segment[r], to_reroute, shift, cut)
            new_ids.append(a)
            new_weights.append(b)
        chosen, weights = torch.cat(new_ids), torch.cat(new_weights)
        return chosen, weights if self.importance is None else _true_weights(given, chosen)


@dataclass
class ByLayer:
    """`inner` at a bound that is lower by a share `slope` in the first layer and higher by as much in the last: the
    mean over layers, which is what a forward pass waits for, stays the same.
    """

    inner: Callable[[Inputs, float], Outcome]
    slope: float
    layers: range

    def __call__(self, given: Inputs, bound: float) -> Outcome:
        place = 2 * self.layers.index(given.layer) / (len(self.layers) - 1) - 1
        return self.inner(given, bound * (1 + self.slope * place))


def _true_weights(given: Inputs, ids: Tensor) -> Tensor:
    """[P, K] f32: an original slot's own weight, a re-routed one's by its router probability (method.md 5.3)."""
    reference = given.logits.gather(1, given.ids[:, :1])
    chosen = given.logits.gather(1, ids.clamp(min=0))
    by_sigmoid = given.router.scoring == "sigmoid"
    ratio = chosen.sigmoid() / reference.sigmoid() if by_sigmoid else (chosen - reference).exp()
    return torch.where(ids == given.ids, given.weights, given.weights[:, :1] * ratio).masked_fill(ids < 0, 0)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# -- baselines that need no operator of ours -----------------------------------------------------------------------


def drop_random(given: Inputs, bound: float) -> Outcome:
    """Assignments of a rank over its bound go at random."""
    most, slots = limit(given, bound), given.ids.numel()
    rank = (given.ids // given.per_rank).flatten()
    order = (rank + torch.rand(slots, device=rank.device, dtype=torch.float64)).argsort()
    first = torch.searchsorted(rank[order].contiguous(), torch.arange(given.layout.ranks, device=rank.device))
    place = torch.empty_like(rank)
    place[order] = torch.arange(slots, device=rank.device) - first[rank[order]]
    keep = (place < most).view_as(given.ids)
    return Outcome(given.ids.masked_fill(~keep, -1), given.weights.masked_fill(~keep, 0))


def cut_visual(given: Inputs, bound: float) -> Outcome:
    """Visual tokens lose their weakest experts, all of them alike; a fraction of an expert: some tokens one more.

    Misses the bound where even one expert per visual token is too much.
    """
    top_k = given.ids.shape[1]
    slot = torch.arange(top_k, device=given.ids.device)
    luck = torch.rand(given.ids.shape[0], 1, device=given.ids.device)
    most = limit(given, bound)

    def cut(kept: float) -> Tensor:
        gone = given.visual[:, None] & (slot >= (kept + luck).floor())
        return given.ids.masked_fill(gone, -1)

    kept = mildest(lambda k: fullest(given, cut(k)) <= most, 1.0, float(top_k))
    ids = cut(kept)
    return Outcome(ids, given.weights.masked_fill(ids < 0, 0))


def keep_all(given: Inputs, bound: float) -> Outcome:
    return Outcome(given.ids, given.weights)


# -- other measures of importance ----------------------------------------------------------------------------------


def redundancy(given: Inputs, weight: Tensor) -> Tensor:
    """Gate, times how little a visual token resembles the one before it."""
    hidden = torch.nn.functional.normalize(given.hidden.float(), dim=1)
    alike = (hidden[1:] * hidden[:-1]).sum(1).clamp(0, 1)
    alike = torch.nn.functional.pad(alike, (1, 0))
    new = torch.where(given.visual, (1 - alike).clamp(min=0.02), 1.0)
    return given.weights * new[:, None]


def detail(given: Inputs, weight: Tensor) -> Tensor:
    """Gate, times how much there is to see in a visual token's pixels; known before the model runs."""
    return given.weights * given.layout.detail.clamp(min=0.02)[:, None]


def attention_received(given: Inputs, weight: Tensor) -> Tensor:
    """Gate, times the attention that the layer's later tokens pay to a visual token, over the most paid to any."""
    share = given.received / given.received[given.visual].max().clamp(min=1e-9)
    return given.weights * torch.where(given.visual, share.clamp(1e-3, 1.0), 1.0)[:, None]


def inverse_entropy(given: Inputs, weight: Tensor) -> Tensor:
    """Gate over entropy weight: the paper's ordering turned round."""
    return given.weights * torch.where(given.visual, 1 - weight, weight)[:, None]


@dataclass
class ByNorm:
    """Gate times the norm of what the expert really adds: what dropping the assignment loses. An oracle: it needs the
    expert's output before the dispatch. `norm_of` gives [P, K].
    """

    norm_of: Callable[[Inputs], Tensor]

    def __call__(self, given: Inputs, weight: Tensor) -> Tensor:
        lost = given.weights * self.norm_of(given)
        return lost / lost.max().clamp(min=1e-9)


@dataclass
class ByMeanNorm:
    """Gate times the expert's mean output norm by modality, from calibration: by layer [E, 2], (visual, text)."""

    norms: dict[int, Tensor]

    def __call__(self, given: Inputs, weight: Tensor) -> Tensor:
        norm = self.norms[given.layer].to(given.ids.device)[given.ids, (~given.visual).long()[:, None]]
        lost = given.weights * norm
        return lost / lost.max().clamp(min=1e-9)


# -- the list ------------------------------------------------------------------------------------------------------

CAI = {"preset": "cai"}
# The preset `rank`, by its importance; each with one part off or changed.
CHANGES = {
    "": ({}, ""),
    " -pressure": ({"alpha": 0.0}, "an overloaded expert loses no importance"),
    " -protection": ({"protect_text": False}, "text and visual by one order"),
    " -reroute": ({"reroute": "none"}, "drops all that is clipped"),
    " reroute=local": ({"reroute": "local"}, "only within the rank"),
    " exchange=local": ({"exchange": "local"}, "each source rank holds its own share"),
}
RANK_OPTIONS = {
    importance + change: ({"preset": "rank", "importance": importance, **options}, note)
    for importance in ("entropy_gate", "gate")
    for change, (options, note) in CHANGES.items()
}
RANK_OPTIONS["gate -entropy"] = ({"preset": "rank", "importance": "gate", "delta": 0.0}, "nor in R_v")
RANK_OPTIONS["entropy"] = ({"preset": "rank", "importance": "entropy"}, "entropy weight alone")
DEFAULT = MacsConfig.from_preset(preset="rank").importance  # the method that the others are compared with
EXPERT_OPTIONS = {
    "paper": ({"preset": "paper"}, "entropy-weighted load, re-routes within the rank"),
    "paper -reroute": ({"preset": "paper", "reroute": "none"}, "without re-routing"),
    "cai": (CAI, "capacity per expert, lowest gate first"),
    "cai expanded": ({**CAI, "reroute": "local"}, "overflow may go to other experts of the rank"),
    "cai image-first": ({**CAI, "reroute": "local", "protect_text": True}, "expanded, image tokens first"),
    "cai device": (
        {"preset": "cai", "scope": "rank"},
        "capacity per rank, lowest gate first",
    ),
}


def methods(modality: dict[int, Tensor]) -> list[Method]:
    """Every method of the comparison that needs no calibration beside the profile."""
    made = [Method("random", drop_random, "per rank, at random"), Method("visual top-k", cut_visual)]
    for name, (options, note) in {**EXPERT_OPTIONS, **RANK_OPTIONS}.items():
        made.append(Method(name, WithPlan(options, modality), note, options.get("exchange") != "local"))
    made.append(Method("gate x redundancy", WithPlan({}, modality, redundancy), "neighbouring visual tokens"))
    return made
