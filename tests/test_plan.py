"""What a plan promises, through the product: properties over any group of ranks, and what must not change a bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reference import cases, oracle
from reference.replica_cases import oracle_input
from sglang_macs.comm.peer_all_reduce import PeerAllReduce
from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan, PlanResult, check_batch_size

PRESETS = ("paper", "rank", "cai")


@dataclass(frozen=True)
class Outcome:
    """One rank's plan, beside the batch it was made for."""

    batch: cases.Batch
    weight: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    shift: torch.Tensor
    cut: torch.Tensor

    @property
    def assigned(self) -> torch.Tensor:
        """Slots [T, K] that held an assignment."""
        return self.batch.topk_ids >= 0

    @property
    def kept(self) -> torch.Tensor:
        """Slots [T, K] whose original stays; a re-route never goes where an original was."""
        return self.assigned & (self.ids == self.batch.topk_ids)

    @property
    def moved(self) -> torch.Tensor:
        """Slots [T, K] that hold a re-route."""
        return self.assigned & (self.ids >= 0) & ~self.kept

    @property
    def visual(self) -> torch.Tensor:
        """Slots [T, K] of visual tokens."""
        return (self.batch.segment >= 0)[:, None].expand_as(self.ids)


def make_plan(group: cases.Group, config: MacsConfig) -> Plan:
    """The product's plan for this group."""
    return Plan(config, group.num_experts, group.num_ranks, group.modality, group.routing)


def run(group: cases.Group, config: MacsConfig, weights: list[torch.Tensor] | None = None) -> list[Outcome]:
    """The plan of every rank of the group, stage by stage in one process."""
    plan = make_plan(group, config)
    if weights is None:
        weights = [plan.weight(b.hidden_states, b.segment, b.num_segments) for b in group.batches]
    inputs = [(b.topk_ids, b.topk_weights, w, b.segment) for b, w in zip(group.batches, weights, strict=True)]
    own = [plan.histogram(*i) for i in inputs]
    total = torch.stack(own).sum(0, dtype=torch.int32)
    outcomes = []
    for b, w, i, histogram in zip(group.batches, weights, inputs, own, strict=True):
        cut = plan.threshold(histogram, histogram if config.exchange == "local" else total)
        outcomes.append(Outcome(b, w, *plan.apply(*i, b.router_logits, *cut), *cut))
    return outcomes


def configs(**fixed: Any) -> st.SearchStrategy[MacsConfig]:
    """A preset as it is, or with everything turned over by hand."""
    by_hand = st.builds(lambda options: MacsConfig.from_preset("rank", **(options | fixed)), cases.switches())
    preset = st.builds(
        lambda name, gamma: MacsConfig.from_preset(name, **({"gamma": gamma} | fixed)),
        st.sampled_from(PRESETS),
        st.sampled_from([1.05, 1.0, 1.2, 0.9, 0.5]),
    )
    return st.one_of(preset, by_hand)


def bound_of(ids: torch.Tensor, cut: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Number of the bound that each expert counts towards; -1 for an empty slot."""
    return torch.where(ids >= 0, ids * len(cut) // num_experts, -1)


def units_of(o: Outcome, config: MacsConfig) -> torch.Tensor:
    """Units [T, K] that an assignment of each token counts."""
    per_token = [oracle.fixed(w) if config.load == "effective" else 1 for w in o.weight.tolist()]
    return torch.tensor(per_token, dtype=torch.int64)[:, None].expand_as(o.ids)


def units_per_bound(outcomes: list[Outcome], config: MacsConfig, num_experts: int) -> list[int]:
    """What every bound receives from the whole group after the plan."""
    units = torch.zeros(len(outcomes[0].cut), dtype=torch.int64)
    for o in outcomes:
        there = o.ids >= 0
        units.index_add_(0, bound_of(o.ids, o.cut, num_experts)[there], units_of(o, config)[there])
    return units.tolist()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit; floats compare as the integers they are stored as."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) if a.dtype == torch.float32 else torch.equal(a, b)


def is_identity(o: Outcome) -> bool:
    """Whether the plan changed nothing at all."""
    return same_bits(o.ids, o.batch.topk_ids) and same_bits(o.weights, o.batch.topk_weights)


def test_the_properties_below_are_not_vacuous() -> None:
    """Of the groups and settings drawn, a fair part cuts, moves, drops, and gives up text."""
    seen = {"cut": 0, "moved": 0, "dropped": 0, "text": 0, "pressed": 0, "several ranks": 0}

    @cases.PROPERTY
    @given(cases.groups(), configs())
    def look(group: cases.Group, config: MacsConfig) -> None:
        outcomes = run(group, config)
        seen["several ranks"] += len(outcomes) > 1
        seen["cut"] += any((o.cut[:, 0] >= 0).any() for o in outcomes)
        seen["moved"] += any(o.moved.any() for o in outcomes)
        seen["dropped"] += any((o.assigned & (o.ids < 0)).any() for o in outcomes)
        seen["text"] += any((o.assigned & ~o.visual & ~o.kept).any() for o in outcomes)
        seen["pressed"] += any((o.shift > 0).any() for o in outcomes)

    look()
    assert min(seen.values()) >= 6, seen


@cases.PROPERTY
@given(cases.groups(), configs())
def test_no_bound_is_exceeded_over_the_group(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    bounds = outcomes[0].cut[:, 3].tolist()
    rows = sum(int(o.assigned.sum()) for o in outcomes)
    if config.scope == "rank":
        unit = 256 if config.load == "effective" else 1
        assert bounds == [math.floor(config.gamma * rows / group.num_ranks * unit)] * group.num_ranks
    for units, bound in zip(units_per_bound(outcomes, config, group.num_experts), bounds, strict=True):
        assert units <= bound


@cases.PROPERTY
@given(cases.groups(), configs(exchange="local"))
def test_local_shares_keep_the_group_s_bound(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    shares = torch.stack([o.cut[:, 3] for o in outcomes]).sum(0).tolist()
    rows = sum(int(o.assigned.sum()) for o in outcomes)
    unit = 256 if config.load == "effective" else 1
    units = units_per_bound(outcomes, config, group.num_experts)
    assert all(u <= share for u, share in zip(units, shares, strict=True))
    linear = config.scope == "rank" or (config.rho == 0 and config.c_min == 0)
    if linear:  # otherwise each rank's own modality mix and floor make the shares, and their sum is the bound
        assert max(units) <= config.gamma * rows / len(units) * unit * (1 + 1e-12)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_every_slot_is_kept_moved_or_dropped(group: cases.Group, config: MacsConfig) -> None:
    for o in run(group, config):
        assert same_bits(o.weights[o.kept], o.batch.topk_weights[o.kept])
        lost = o.assigned & ~o.kept & ~o.moved
        assert (o.ids[lost] == -1).all()
        assert (o.weights[lost].view(torch.int32) == 0).all()
        assert (o.ids[~o.assigned] == -1).all()
        assert ((o.ids >= -1) & (o.ids < group.num_experts)).all()
        for token in o.ids.tolist():
            chosen = [j for j in token if j >= 0]
            assert len(chosen) == len(set(chosen))


@cases.PROPERTY
@given(cases.groups(), configs())
def test_counts_say_what_happened(group: cases.Group, config: MacsConfig) -> None:
    for o in run(group, config):
        want = torch.zeros_like(o.counts)
        for row, where, ids in (
            (0, o.kept, o.batch.topk_ids),
            (1, o.assigned & ~o.kept, o.batch.topk_ids),
            (2, o.moved, o.ids),
        ):
            for expert, visual in zip(ids[where].tolist(), o.visual[where].tolist(), strict=True):
                want[row, expert, 1 - int(visual)] += 1
        assert torch.equal(o.counts, want)


@cases.PROPERTY
@given(cases.groups(), configs(protect_text=True))
def test_text_stays_while_a_visual_original_does(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    for n in range(len(outcomes[0].cut)):
        on_bound = [bound_of(o.batch.topk_ids, o.cut, group.num_experts) == n for o in outcomes]
        pairs = list(zip(outcomes, on_bound, strict=True))
        if any((on & ~o.visual & ~o.kept).any() for o, on in pairs):
            assert not any((on & o.visual & o.kept).any() for o, on in pairs)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_reroutes_go_where_room_was(group: cases.Group, config: MacsConfig) -> None:
    per_rank = group.num_experts // group.num_ranks
    for o in run(group, config):
        target = bound_of(o.ids, o.cut, group.num_experts)[o.moved]
        assert (o.cut[target, 0] == -1).all()
        received = torch.zeros(len(o.cut), dtype=torch.int64).index_add_(0, target, units_of(o, config)[o.moved])
        assert (received <= o.cut[:, 2]).all()
        assert config.reroute != "none" or not o.moved.any()
        if config.reroute == "local":
            assert torch.equal(o.ids[o.moved] // per_rank, o.batch.topk_ids[o.moved] // per_rank)


@cases.PROPERTY
@given(cases.groups(), configs(reroute="global"))
def test_a_rerouted_weight_is_the_expert_s_own_probability(group: cases.Group, config: MacsConfig) -> None:
    """Scaled as the token's top-k weights were: renormalised or not, any scoring, without the bias of the choice."""
    for o in run(group, config):
        scores = cases.scores(o.batch.router_logits, group.scoring)
        chosen = scores.gather(1, o.batch.topk_ids.clamp(min=0)) * o.assigned
        scale = o.batch.topk_weights.double().sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True)
        want = (scores * scale).gather(1, o.ids.clamp(min=0))
        torch.testing.assert_close(o.weights[o.moved].double(), want[o.moved], rtol=1e-5, atol=0)


@cases.PROPERTY
@given(cases.groups(), st.sampled_from(["expert", "rank"]), st.sampled_from([*PRESETS, "off"]))
def test_infinite_gamma_is_the_identity(group: cases.Group, scope: str, preset: str) -> None:
    for o in run(group, MacsConfig.from_preset(preset, gamma=math.inf, scope=scope)):
        assert is_identity(o)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_where_nothing_is_cut_the_output_is_the_input(group: cases.Group, config: MacsConfig) -> None:
    for o in run(group, replace(config, gamma=float(group.num_experts), rho=0.0)):
        assert (o.cut[:, 0] == -1).all()
        assert is_identity(o)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_the_group_s_plan_is_the_oracle_s(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    ranks = [oracle_input(group, b, o.weight) for b, o in zip(group.batches, outcomes, strict=True)]
    sizes = {"num_experts": group.num_experts, "num_ranks": group.num_ranks, "modality": group.modality.tolist()}
    wanted = oracle.plan(ranks, config, scoring=group.scoring, **sizes)
    for o, want in zip(outcomes, wanted, strict=True):
        assert o.shift.tolist() == want.shift
        assert o.cut.tolist() == want.cut
        assert o.ids.tolist() == want.topk_ids
        assert o.counts.tolist() == want.counts
        expected = torch.tensor(want.topk_weights, dtype=torch.float32).view(o.weights.shape)
        torch.testing.assert_close(o.weights, expected, rtol=1e-5, atol=0)


@cases.PROPERTY
@given(cases.groups(st.sampled_from([2, 8])), configs())
def test_ranks_with_the_exchange_keep_what_one_rank_would(group: cases.Group, config: MacsConfig) -> None:
    """The same originals above the cut and none below it; at the cut, in rows, at most R - 1 fewer per bound.

    Where assignments weigh up to 256 units, each rank may also stop short of its quota by a part of one.
    """
    outcomes = run(group, config)
    joined = cases.concat(group.batches)
    alone = run(replace(group, batches=[joined]), config, [torch.cat([o.weight for o in outcomes])])[0]
    assert torch.equal(alone.shift, outcomes[0].shift)
    assert torch.equal(alone.cut[:, [0, 3]], outcomes[0].cut[:, [0, 3]])
    kept = torch.cat([o.kept for o in outcomes])
    units, slack = units_of(alone, config), 255 if config.load == "effective" else 0
    level, bound = levels_of(alone, config), bound_of(joined.topk_ids, alone.cut, group.num_experts)
    for n, at in enumerate(alone.cut[:, 0].tolist()):
        there = bound == n
        assert torch.equal(kept[there & (level != at)], alone.kept[there & (level != at)])
        at_cut = there & (level == at)
        fewer = int(units[at_cut & alone.kept].sum() - units[at_cut & kept].sum())
        assert -slack <= fewer <= group.num_ranks - 1 + group.num_ranks * slack


def levels_of(o: Outcome, config: MacsConfig) -> torch.Tensor:
    """Level [T, K] of every assignment, by the oracle; -1 for an empty slot."""
    level = torch.full_like(o.ids, -1)
    inputs = (t.tolist() for t in (o.batch.topk_ids, o.batch.topk_weights, o.weight, o.batch.segment))
    for a in oracle.assignments(*inputs, config.buckets, config.load, config.importance):
        shift = int(o.shift[a.expert])
        level[a.token, a.slot] = oracle.level_of(a.bucket, a.text, shift, config.buckets, config.protect_text)
    return level


@cases.PROPERTY
@given(cases.groups(st.sampled_from([2, 8])), st.sampled_from(["paper", "rank"]))
def test_whole_segments_weigh_the_same_on_any_rank(group: cases.Group, preset: str) -> None:
    """Bit for bit, or R ranks could not agree with one."""
    plan = make_plan(group, MacsConfig.from_preset(preset))
    joined = cases.concat(group.batches)
    alone = plan.weight(joined.hidden_states, joined.segment, joined.num_segments)
    apart = [plan.weight(b.hidden_states, b.segment, b.num_segments) for b in group.batches]
    assert same_bits(alone, torch.cat(apart))


@cases.PROPERTY
@given(cases.groups(), configs())
def test_one_call_is_all_stages(group: cases.Group, config: MacsConfig) -> None:
    """And the reduction it asks for is one sum of the histogram over the group."""
    plan = make_plan(group, config)
    staged = run(group, config)
    own = [plan.histogram(o.batch.topk_ids, o.batch.topk_weights, o.weight, o.batch.segment) for o in staged]
    total, calls = torch.stack(own).sum(0, dtype=torch.int32), []

    def all_reduce(tensor: torch.Tensor) -> None:
        calls.append(tensor.clone())
        tensor.copy_(total)

    for o, histogram in zip(staged, own, strict=True):
        b = o.batch
        calls.clear()
        result = plan(b.routed, all_reduce)
        assert len(calls) == (0 if config.exchange == "local" else 1)
        assert all(torch.equal(c, histogram) for c in calls)
        for got, want in (
            (result.topk_ids, o.ids), (result.topk_weights, o.weights), (result.counts, o.counts),
            (result.cut, o.cut), (result.weight, o.weight),
        ):  # fmt: skip
            assert same_bits(got, want)


@pytest.mark.parametrize("preset", PRESETS)
def test_inputs_are_left_alone(preset: str) -> None:
    group = cases.named("imbalanced")
    before = {k: v.clone() for k, v in vars(group.batches[0]).items() if isinstance(v, torch.Tensor)}
    (o,) = run(group, MacsConfig.from_preset(preset, gamma=0.7))
    assert not is_identity(o)
    assert all(same_bits(vars(group.batches[0])[k], v) for k, v in before.items() if k != "hidden_states")
    assert torch.equal(group.batches[0].hidden_states, before["hidden_states"])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_repeats_and_threads_do_not_change_a_bit(preset: str, ties: bool, threads: Callable[[int], None]) -> None:
    gen = cases.generator(5)
    shape = {"num_tokens": 6000, "num_experts": 64, "top_k": 8, "num_ranks": 8, "imbalance": 1.6, "hidden_size": 64}
    one = cases.batch(gen, ties=ties, num_images=7, **shape)
    group = cases.Group([one], 64, 8, torch.ones(64, dtype=torch.int8))
    config = MacsConfig.from_preset(preset, gamma=0.9, protect_text=False)
    first = run(group, config)[0]
    assert not is_identity(first)
    for i in range(20):
        threads((1, 2, 4)[i % 3])
        again = run(group, config)[0]
        for field in ("weight", "ids", "weights", "counts", "shift", "cut"):
            assert same_bits(getattr(again, field), getattr(first, field))


@pytest.mark.parametrize(("top_k", "load", "units"), [(1, "rows", 256), (8, "rows", 256), (8, "effective", 2048)])
def test_a_batch_beyond_i32_is_refused(top_k: int, load: str, units: int) -> None:
    """W sums 256ths over tokens whatever the load; an expert's bucket sums 256ths over assignments under effective."""
    most = (2**31 - 1) // units
    check_batch_size(most, top_k, load)
    with pytest.raises(ValueError, match=str(most)):
        check_batch_size(most + 1, top_k, load)


@pytest.mark.parametrize(("load", "units"), [("rows", 256), ("effective", 2048)])
def test_what_one_token_adds_to_the_histogram_is_what_the_limit_counts(load: str, units: int) -> None:
    """A text token whose assignments all fall into one bucket of one expert: no cell grows faster than assumed."""
    plan = Plan(MacsConfig.from_preset("rank", load=load), 16, 2)
    ids, gates = torch.zeros((3, 8), dtype=torch.int32), torch.ones((3, 8))
    text = torch.full((3,), -1, dtype=torch.int32)
    histogram = plan.histogram(ids, gates, torch.ones(3), text)
    assert int(histogram.max()) == 3 * units


@pytest.mark.parametrize(("experts", "ranks"), [(10, 4), (8, 0), (4, 8)])
def test_experts_that_do_not_divide_are_refused(experts: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Plan(MacsConfig.from_preset("rank"), experts, ranks)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_default_dtype_does_not_matter(preset: str) -> None:
    """A server may run with torch's default dtype set to the model's."""
    group, config = cases.named("imbalanced"), MacsConfig.from_preset(preset, gamma=0.9)
    (want,) = run(group, config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        (got,) = run(group, config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(got.weight, want.weight)
    assert same_bits(got.ids, want.ids)


def test_a_profile_given_as_a_tensor_moves_the_capacity() -> None:
    """R_v comes from the entropy weights however the modality reached the plan."""
    group = cases.named("imbalanced")
    config = MacsConfig.from_preset("cai", rho=1.0, delta=2.0)
    (o,) = run(group, config)
    entropy = oracle.entropy_score(o.batch.hidden_states.tolist(), o.batch.segment.tolist())
    want = oracle.entropy_weight(entropy, o.batch.segment.tolist(), o.batch.num_segments, 2.0)
    torch.testing.assert_close(o.weight, torch.tensor(want), rtol=1e-4, atol=1e-6)


class Calls(TorchDispatchMode):
    """Names of the operators that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.name().removeprefix("sglang_macs::"))
        return func(*args, **(kwargs or {}))


LOGITS = (torch.float32, torch.bfloat16, torch.float16)


@cases.PROPERTY
@given(cases.groups(), st.one_of(configs(), configs(exchange="local")), st.sampled_from(LOGITS))
def test_whole_plans_give_the_operators_bits(group: cases.Group, config: MacsConfig, logits: torch.dtype) -> None:
    """In two calls around an all-reduce, in one alone, and by operators; logits as the router has them."""
    batches = [replace(b, router_logits=b.router_logits.to(logits)) for b in group.batches]
    exact = replace(group, batches=[replace(b, router_logits=b.router_logits.float()) for b in batches])
    plan, together = make_plan(group, config), run(exact, config)
    apart = [run(replace(exact, batches=[b]), config)[0] for b in exact.batches]
    own = [plan.histogram(o.batch.topk_ids, o.batch.topk_weights, o.weight, o.batch.segment) for o in together]
    total = own[0] if config.exchange == "local" else torch.stack(own).sum(0, dtype=torch.int32)

    def all_reduce(group: torch.Tensor) -> None:
        group.copy_(total)

    for b, histogram, in_group, alone in zip(batches, own, together, apart, strict=True):
        exchanged = None if config.exchange == "local" else all_reduce
        summed = histogram if exchanged is None else total
        assert_result(plan(b.routed, all_reduce), in_group, histogram, summed)
        assert_result(plan._by_operators(b.routed, exchanged), in_group, histogram, summed)
        assert_result(plan(b.routed), alone, histogram, histogram)


def assert_result(got: PlanResult, want: Outcome, own: torch.Tensor, group: torch.Tensor) -> None:
    expected = PlanResult(want.ids, want.weights, want.weight, own, group, want.cut, want.counts)
    assert got.rank_rows is expected.rank_rows is None
    for name, mine, theirs in zip(got._fields[:-1], got, expected, strict=False):
        assert same_bits(mine, theirs), name


def test_a_plan_is_one_operator_or_two_around_an_all_reduce() -> None:
    """Beside them, nothing is called: on a GPU every call costs the host as much as a kernel does."""
    group = cases.named("imbalanced")
    b, plan = group.batches[0], make_plan(group, MacsConfig())
    tokens = b.routed._replace(router_logits=b.router_logits.bfloat16())
    plan(tokens)
    with Calls() as alone:
        plan(tokens)
    with Calls() as exchanged:
        plan(tokens, all_reduce=lambda tensor: exchanged.names.append("all_reduce"))
    assert alone.names == ["plan"]
    assert exchanged.names == ["score_histogram", "all_reduce", "threshold_apply"]


ROUTERS = {"biased": ["selection_score", "plan"], "grouped": ["selection_score", "plan"], "sqrtsoftplus": ["plan"]}


@pytest.mark.parametrize(("name", "calls"), ROUTERS.items(), ids=ROUTERS)
def test_a_selection_is_made_only_where_it_orders_candidates(name: str, calls: list[str]) -> None:
    group = cases.named(name)
    for config in (MacsConfig(), MacsConfig.from_preset(reroute="none"), MacsConfig.from_preset(gamma=math.inf)):
        plan = make_plan(group, config)
        with Calls() as made:
            plan(group.batches[0].routed)
        assert made.names == (calls if config == MacsConfig() else ["plan"])


def test_a_bias_that_is_loaded_later_counts() -> None:
    group = cases.named("biased")
    b, bias, plan = group.batches[0], group.routing.correction_bias, make_plan(group, MacsConfig.from_preset(gamma=1.0))
    before = plan(b.routed).topk_ids
    bias.copy_(bias.flip(0))
    assert not torch.equal(plan(b.routed).topk_ids, before)


def test_an_exchange_over_peers_is_part_of_the_one_call() -> None:
    """On a CPU it is refused there: the call came with this rank's region."""
    group = cases.named("imbalanced")
    b, plan = group.batches[0], make_plan(group, MacsConfig())
    region = torch.zeros(PeerAllReduce.region_bytes(4, plan.histogram_size), dtype=torch.uint8)
    peers = PeerAllReduce(PeerMemory(0, region, [0] * 4), plan.histogram_size)
    with Calls() as calls, pytest.raises(ValueError, match="region: got"):
        plan(b.routed, all_reduce=peers)
    assert calls.names == ["plan"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("hidden_states", lambda t: t[:-1]),
        ("topk_ids", lambda t: t.float()),
        ("topk_ids", lambda t: t + 16),
        ("topk_weights", lambda t: t[:, 1:]),
        ("router_logits", lambda t: t.double()),
        ("router_logits", lambda t: t[:, 1:]),
        ("segment", lambda t: t.long()),
        ("num_segments", lambda n: 1),
    ],
)
def test_a_batch_that_is_wrong_is_refused(field: str, change: Callable[[Any], Any]) -> None:
    group = cases.named("imbalanced")
    b, plan = group.batches[0], make_plan(group, MacsConfig.from_preset("rank", importance="entropy"))
    with pytest.raises(ValueError, match=field) as error:
        plan(b.routed._replace(**{field: change(getattr(b.routed, field))}))
    assert ": got " in str(error.value) and "expected" in str(error.value)
