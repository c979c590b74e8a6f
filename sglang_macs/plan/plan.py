"""The plan of one MoE layer: score -> exchange -> threshold -> apply (docs/design/method.md)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..choices import NUM_SUMS, WEIGHT_ONE
from ..comm.peer_all_reduce import PeerAllReduce
from ..config import MacsConfig
from ..errors import MacsError
from ..ops import policy
from . import importance
from .places import Places
from .routing import Routing
from .tokens import RoutedTokens

AllReduce = Callable[[Tensor], object]


class PlanResult(NamedTuple):
    """What one plan decided on this rank.

    topk_ids [T, K], topk_weights [T, K]: what to dispatch. own, group: the histograms. cut [NB, 4] i32: level, quota,
    room, bound per bound. counts [3, E, 2] i32: kept, clipped, re-routed in, by (expert, visual | text).
    With places, ids are physical and all else is by logical expert; counts have a fourth row, kept at another replica,
    and rank_rows [2, R] i32 are the group's rows of each rank, as routed and as balanced.

    New memory in every plan, of every backend, which nobody writes to afterwards: counters and trace keep parts of it.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    weight: Tensor
    own: Tensor
    group: Tensor
    cut: Tensor
    counts: Tensor
    rank_rows: Tensor | None = None

    def copy(self) -> "PlanResult":
        """With new memory for what is kept beyond the layer, in one launch: group, cut, counts and rank_rows."""
        names = ("group", "cut", "counts") if self.rank_rows is None else ("group", "cut", "counts", "rank_rows")
        kept = [getattr(self, name) for name in names]
        parts = torch.cat([x.reshape(-1) for x in kept]).split([x.numel() for x in kept])
        return self._replace(**{name: part.view(x.shape) for name, part, x in zip(names, parts, kept, strict=True)})

    def with_rows(self, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> "PlanResult":
        """With the given `rows` [T] bool as they were routed: they were hidden from the plan (id -1)."""
        rows = rows.unsqueeze(1)
        ids = torch.where(rows, topk_ids, self.topk_ids)
        return self._replace(topk_ids=ids, topk_weights=torch.where(rows, topk_weights, self.topk_weights))


class Plan:
    """One layer's plan; holds no state between batches.

    Args:
        config: the options.
        num_experts, num_ranks: E and R; E % R == 0, or with places P % R == 0.
        modality: [E] i8 from the profile, or None: every expert is shared.
        routing: how the router chooses and weighs experts; None: by softmax over its logits.
        places: where experts lie, of replicas to choose from; None: linearly, one each. Raises MacsError for options
            that replicas do not go with.
        own_importance: in place of the function that the config names, if it names one.
    """

    def __init__(
        self,
        config: MacsConfig,
        num_experts: int,
        num_ranks: int,
        modality: Tensor | None = None,
        routing: Routing | None = None,
        places: Places | None = None,
        own_importance: importance.Importance | None = None,
    ) -> None:
        if places is None and (num_ranks < 1 or num_experts % num_ranks):
            raise MacsError("expert parallelism", f"{num_experts} experts on {num_ranks} ranks", "a whole number each")
        self.num_experts = num_experts
        self.num_ranks = num_ranks
        self.places = places
        self.routing = routing or Routing()
        self._has_profile = modality is not None
        self.modality = torch.zeros(num_experts, dtype=torch.int8) if modality is None else modality
        self._given_importance = own_importance
        self.configure(config)

    def configure(self, config: MacsConfig) -> None:
        """Plans by these options from now on. On all ranks alike. Raises MacsError for those that replicas do not go
        with.
        """
        own = self._given_importance
        if own is None and config.has_own_importance:
            own = importance.load(config.importance)
        if self.places is not None and (why := config.no_replicas or (own and "an importance of one's own")):
            raise MacsError("replicas", str(why), "--macs-scope rank, --macs-load rows, --macs-exchange group")
        self.config, self._importance = config, own
        self._needs_entropy = config.needs_entropy(self._has_profile)
        self.follow(self.routing)

    def follow(self, routing: Routing) -> None:
        """Re-routes as this router would. On all ranks alike."""
        self.routing = routing
        own = "gate" if self._importance is not None else self.config.importance  # takes its scores for gates
        self.policy = self._policy(self.config, own)
        self._by_order = self._policy(replace(self.config, alpha=0.0), "gate")

    def _policy(self, config: MacsConfig, importance: str) -> Tensor:
        return policy.of_config(
            config,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            scoring=self.routing.scoring,
            needs_entropy=self._needs_entropy,
            importance=importance,
            c_min=config.c_min / self.num_ranks if config.exchange == "local" else config.c_min,
        )

    @property
    def needs_selection(self) -> bool:
        """Whether candidates are ordered by something else than their logits."""
        return self.config.reroutes and self.routing.needs_selection

    @property
    def histogram_size(self) -> int:
        """Numbers that the exchange sums."""
        return self.cells + (self.places.exchange_size if self.places else 0)

    @property
    def num_physical(self) -> int:
        """P: what ids count, in and out."""
        return self.places.num_physical if self.places else self.num_experts

    @property
    def made_in_front(self) -> bool:
        """Whether no dispatch can decide it by itself: replicas, or candidates in another order than their logits'."""
        return self.places is not None or self.needs_selection

    @property
    def cells(self) -> int:
        """Numbers of a histogram, with which begins what is exchanged."""
        return self.num_experts * 2 * self.config.buckets + NUM_SUMS

    def weight(self, hidden_states: Tensor, segment: Tensor, num_segments: int) -> Tensor:
        """[T] f32 entropy weights; hidden_states [T, H] are not read if nothing depends on them."""
        if self._needs_entropy and num_segments > 0:
            entropy = ops.entropy_score(hidden_states, segment)
            return ops.entropy_weight(entropy, segment, num_segments, self.config.delta)
        return torch.full(segment.shape, 0.5, dtype=torch.float32, device=segment.device).masked_fill_(segment < 0, 1.0)

    def histogram(self, topk_ids: Tensor, topk_weights: Tensor, weight: Tensor, segment: Tensor) -> Tensor:
        """This rank's integer histogram, [histogram_size] i32."""
        places = self.places.table(topk_ids.device) if self.places else None
        return ops.load_histogram(topk_ids, topk_weights, weight, segment, self.policy, places)

    def threshold(self, own: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """(shift [E], cut [NB, 4]) i32 from this rank's and the group's histograms."""
        if self.config.exchange == "local":
            group = own
        return ops.clip_threshold(own, group, self._modality_on(own.device), self.policy)

    def _modality_on(self, device: torch.device) -> Tensor:
        if self.modality.device != device:  # once: a copy to a GPU makes the host wait
            self.modality = self.modality.to(device)
        return self.modality

    def fused_options(self, device: torch.device) -> dict[str, Any]:
        """What `ops.fused_dispatch` needs to decide as this plan does."""
        return {"modality": self._modality_on(device), "policy": self.policy}

    def apply(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weight: Tensor,
        segment: Tensor,
        router_logits: Tensor | None,
        shift: Tensor,
        cut: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(topk_ids, topk_weights, counts [3, E, 2]) after clipping, re-routing and dropping."""
        batch, selection = (topk_ids, topk_weights, weight, segment), self._selection(router_logits)
        return ops.clip_apply(*batch, router_logits, shift, cut, self.policy, selection=selection)

    def _selection(self, router_logits: Tensor | None) -> Tensor | None:
        """What candidates are ordered by in place of their logits; None where that is needless."""
        needless = router_logits is None or not self.config.reroutes
        return None if needless else self.routing.selection(router_logits)

    def __call__(
        self, tokens: RoutedTokens, all_reduce: AllReduce | None = None, taken: Tensor | None = None
    ) -> PlanResult:
        """Plans one dispatch. Collective where `exchange=group`: every rank of the EP group calls it, T = 0 included.

        Args:
            tokens: of this rank.
            all_reduce: sums an i32 tensor over the EP group in place; None = this rank is the group. With a
                `PeerAllReduce` the whole plan is one operator call, else two around it.
            taken: [T] bool, text rows that stay whatever the bounds: others make room for them. On all ranks or none.
                The result is that of the others. Not with places.
        """
        if self.config.exchange == "local":
            all_reduce = None
        if taken is not None or self._importance is not None or not ops.is_whole(tokens.topk_ids):
            return self._by_operators(tokens, all_reduce, taken)
        modality = self._modality_on(tokens.topk_ids.device)
        places = self.places.table(tokens.topk_ids.device) if self.places else None
        selection = self._selection(tokens.router_logits)
        if all_reduce is None or isinstance(all_reduce, PeerAllReduce):
            peers = ops.ALONE if all_reduce is None else all_reduce.peers
            return self._result(*ops.plan(*tokens, modality, self.policy, peers, places, selection))
        hidden_states, topk_ids, topk_weights, router_logits, segment, num_segments = tokens
        routing = topk_ids, topk_weights
        weight, own, group, workspace = ops.score_histogram(
            hidden_states, *routing, segment, num_segments, self.policy, True, places
        )
        all_reduce(group)
        ids, weights, cut, counts, rank_rows = ops.threshold_apply(
            own, group, modality, *routing, weight, segment, router_logits, workspace, self.policy, places, selection
        )
        return self._result(ids, weights, weight, own, group, cut, counts, rank_rows)

    def _result(self, *parts: Tensor | None) -> PlanResult:
        """With the histograms alone of what was exchanged."""
        result = PlanResult(*parts)
        if self.places is None:
            return result
        return result._replace(own=result.own[: self.cells], group=result.group[: self.cells])

    def _by_operators(
        self, tokens: RoutedTokens, all_reduce: AllReduce | None, taken: Tensor | None = None
    ) -> PlanResult:
        """As `__call__`, by the operators one after the other."""
        if taken is not None:
            return self._around(tokens, all_reduce, taken)
        hidden_states, topk_ids, topk_weights, router_logits, segment, num_segments = tokens
        weight = self.weight(hidden_states, segment, num_segments)
        order = topk_weights if self._importance is None else importance.scores(self._importance, tokens)
        own = self.histogram(topk_ids, order, weight, segment)
        group = self._summed(own, all_reduce)
        logits = self._logits(router_logits)
        batch = topk_ids, order, weight, segment
        if self.places is not None:
            return self._with_replicas(*batch, logits, own, group)
        shift, cut = self.threshold(own, group)
        ids, weights, counts = self.apply(*batch, logits, shift, cut)
        if self._importance is not None:
            weights = importance.gates(tokens._replace(router_logits=logits), ids, self.routing.scoring)
        return PlanResult(ids, weights, weight, own, group, cut, counts)

    def _around(self, tokens: RoutedTokens, all_reduce: AllReduce | None, taken: Tensor) -> PlanResult:
        """The plan of the others, which leaves room for the rows `taken`. In the histograms these stand alone on the
        highest level: no other is as important, and there is no pressure that would move them down. From the clip they
        are hidden.
        """
        assert self.places is None
        weight = self.weight(tokens.hidden_states, tokens.segment, tokens.num_segments)
        order = self._importances(tokens, weight).clamp(max=importance.below_highest(self.config.buckets))
        counted, rows = order.masked_fill(taken.unsqueeze(1), torch.inf), (weight, tokens.segment)
        own = ops.load_histogram(tokens.topk_ids, counted, *rows, self._by_order, None)
        group = self._summed(own, all_reduce)
        summed = own if self.config.exchange == "local" else group
        shift, cut = ops.clip_threshold(own, summed, self._modality_on(own.device), self._by_order)
        logits = self._logits(tokens.router_logits)
        others = tokens._replace(topk_ids=tokens.topk_ids.masked_fill(taken.unsqueeze(1), -1), router_logits=logits)
        given = others.topk_ids, order, *rows, logits, shift, cut, self._by_order
        ids, _, counts = ops.clip_apply(*given, selection=self._selection(logits))
        weights = importance.gates(others, ids, self.routing.scoring)
        return PlanResult(ids, weights, weight, own, group, cut, counts)

    def _importances(self, tokens: RoutedTokens, weight: Tensor) -> Tensor:
        """[T, K] f32 of the assignments, what the options or a function say."""
        if self._importance is not None:
            return importance.scores(self._importance, tokens)
        if self.config.importance == "gate":
            return tokens.topk_weights
        of_token = weight.unsqueeze(1).expand(tokens.topk_ids.shape)
        return of_token if self.config.importance == "entropy" else of_token * tokens.topk_weights

    def _logits(self, router_logits: Tensor | None) -> Tensor | None:
        return None if self.config.reroute == "none" or router_logits is None else router_logits.float()

    @staticmethod
    def _summed(own: Tensor, all_reduce: AllReduce | None) -> Tensor:
        if all_reduce is None:
            return own
        group = own.clone()
        all_reduce(group)
        return group

    def _with_replicas(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weight: Tensor,
        segment: Tensor,
        logits: Tensor | None,
        own: Tensor,
        group: Tensor,
    ) -> PlanResult:
        assert self.places is not None
        batch, places = (topk_ids, topk_weights, weight, segment), self.places.table(topk_ids.device)
        given = self.policy, places
        shift, quota, load, limits = ops.replica_balance(own, group, self._modality_on(own.device), *given)
        chosen, cut = ops.replica_choose(*batch, group, shift, quota, limits, *given)
        ids, weights, counts = ops.clip_apply(*batch, logits, shift, cut, *given, chosen, self._selection(logits))
        rank_rows = torch.stack([group[self.cells : self.cells + self.num_ranks], load])
        return self._result(ids, weights, weight, own, group, cut, counts, rank_rows)


def most_tokens(top_k: int, load: str, replicas: bool = False) -> int:
    """Tokens of the EP group whose histograms hold in i32: `units` an assignment, and 256 a token for R_v's sums.

    replicas: whether there are any; their shares are 256ths of a row, too.
    """
    units = WEIGHT_ONE if load == "effective" or replicas else 1
    return (2**31 - 1) // max(WEIGHT_ONE, units * top_k)


def check_batch_size(group_tokens: int, top_k: int, load: str = "rows", replicas: bool = False) -> None:
    """Raises MacsError if i32 histograms could overflow over `group_tokens` tokens of the EP group."""
    most = most_tokens(top_k, load, replicas)
    if group_tokens > most:
        raise MacsError("prefill batch", f"{group_tokens} tokens", f"at most {most}", "Lower --chunked-prefill-size.")
