"""A plan as it is called: in one operator or several, from threads, twice, with batches that are wrong or too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reference import cases, oracle
from sglang_macs.comm.peer_all_reduce import PeerAllReduce
from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan, PlanResult, check_batch_size
from tests.support.plans import PRESETS, Outcome, configs, is_identity, make_plan, run, same_bits


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
