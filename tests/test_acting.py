"""Layers are planned where that pays, and all ranks decide alike: one that decided by itself would hang the group."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import plan_cost
from sglang_macs.dispatch.acting import AVERAGED, LAG, LOOK_EVERY, Acting, rows_gained
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import scheduler
from sglang_macs.engine.agreement import Agreement
from sglang_macs.engine.worker import Worker
from sglang_macs.errors import MacsNotActive
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.routing import Routing
from tests.support.ranks import run_ranks

EXPERTS, RANKS, TOP_K, TOKENS = 8, 2, 2, 512
CONFIG = MacsConfig.from_preset("rank", gamma=1.1, verify=True)


# ---- What a plan gains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "bounds", "rows"),
    [
        ([10, 10, 10, 10], [22, 22], 0),  # balanced
        ([11, 11, 10, 8], [22, 22], 0),  # no rank above its bound
        ([20, 10, 5, 5], [22, 22], 8),  # 30 -> 22
        ([5, 5, 20, 10], [22, 22], 8),  # the other rank
        ([20, 10, 5, 5], [12, 12, 12, 12], 8),  # a bound an expert: 12 + 10 stay on the first rank
        ([20, 0, 10, 10], [12, 12, 12, 12], 0),  # the expert is cut, and its rank was as full as the other
        ([0, 0, 0, 0], [0, 0], 0),
    ],
)
def test_a_plan_gains_what_it_takes_off_the_most_loaded_rank(loads, bounds, rows):
    one = torch.tensor([loads]), torch.tensor([bounds]), torch.tensor([sum(loads)])
    assert rows_gained(*one, RANKS) == [rows]
    weighted = one[0] * 128, one[1] * 128, one[2]  # load effective: of visual rows half the units, not half the rows
    assert rows_gained(*weighted, RANKS) == [rows]


# ---- Which layers are left alone -----------------------------------------------------------------------------------


def routed(skew: float, tokens: int = TOKENS, seed: int = 0):
    """Hidden states, ids, weights, logits; skew: how far the first rank's experts are preferred."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=g)
    logits[:, : EXPERTS // RANKS] += skew
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    return torch.randn(tokens, 16, generator=g), ids, weights, logits


class AloneInGroup(LayerPlanner):
    """The group's other ranks route as this one does."""

    def all_reduce(self, tensor):
        tensor.mul_(RANKS)


class Layers:
    """The layers of one process, pass by pass."""

    def __init__(self, rows_that_pay: int, config: MacsConfig = CONFIG, layers: int = 2) -> None:
        self.acting, self.counters = Acting(), Stats()
        self.acting.rows_that_pay = rows_that_pay
        plan = Plan(config, EXPERTS, RANKS)
        self.planners = [AloneInGroup(i, plan, None, self.counters, acting=self.acting) for i in range(layers)]

    def serve(self, *skews: float, tokens: int = TOKENS, **about) -> list[int]:
        """One pass, each layer routed with its skew; returns the layers that were planned."""
        now = self.acting.decide(replace(batch.Batch(skip="", group_tokens=tokens * RANKS), **about))
        planned = []
        with batch.forward(now):
            for one, skew in zip(self.planners, skews, strict=True):
                hidden, ids, weights, logits = routed(skew, tokens)
                done = one(hidden, ids, weights, logits)
                own = one.recount(ids, done)
                one.prove(done, own, own * RANKS)
                if done.result is None:
                    assert done.topk_ids is ids and done.topk_weights is weights
                else:
                    planned.append(one.layer_id)
        self.acting.end_pass()
        return planned


def test_balanced_layers_are_left_alone_and_skewed_ones_planned():
    layers = Layers(rows_that_pay=50)
    passes = [layers.serve(0.0, 1.0) for _ in range(LOOK_EVERY + LAG)]
    look = LOOK_EVERY  # of layer 0: a pass whose number and layer make a multiple
    assert [0 in planned for planned in passes] == [n < LAG or n == look for n in range(LOOK_EVERY + LAG)]
    assert all(1 in planned for planned in passes)
    got = layers.counters.snapshot()
    left = sum(0 not in planned for planned in passes)
    assert got["skipped"] == {"no_gain": left} and got["planned"] == got["dispatches"] - left
    assert got["checks"]["bound"] == got["planned"] and got["violations"]["bound"] == 0
    assert got["layers"]["0"]["dispatches"] == len(passes), "what is left alone is counted all the same"
    gained = got["expected_gain"]["planned"] / (len(passes) - LAG)
    saved = [got["layers"]["1"][f"rows_{stage}"][0] / len(passes) for stage in ("before", "after")]
    assert gained == pytest.approx(saved[0] - saved[1], rel=0.02), "what is expected is what was gained"
    assert got["expected_gain"]["no_gain"] < 50 * left


def test_a_layer_whose_routing_changes_is_found_when_it_is_looked_at_again():
    """At once, whatever its plans before the gap have gained."""
    layers = Layers(rows_that_pay=200, layers=1)
    passes = [bool(layers.serve(1.0 if n >= 5 else 0.0)) for n in range(LOOK_EVERY + 6)]
    back = [bool(layers.serve(0.0)) for _ in range(AVERAGED + LAG)]
    assert passes[LAG:LOOK_EVERY] == [False] * (LOOK_EVERY - LAG)
    assert passes[LOOK_EVERY:] == [True] + [False] * (LAG - 1) + [True] * (6 - LAG)
    assert back[:LAG] == [True] * LAG and not back[-1], "and left alone when its plans have gained too little"


@pytest.mark.parametrize(("share", "planned"), [(0.4, 12), (0.6, 0)])
def test_turns_of_pictures_and_text_count_as_what_they_gain_together(share, planned):
    """Half of what pictures alone gain, whatever was in the last pass."""
    pictures = Layers(rows_that_pay=1, layers=1)
    for _ in range(LAG + 1):
        pictures.serve(1.0)
    rows = pictures.counters.expected_gain["planned"]
    layers = Layers(rows_that_pay=int(share * rows), layers=1)
    passes = [bool(layers.serve(1.0 if n % 2 else 0.0)) for n in range(LAG + AVERAGED + 12)]
    assert rows > 100 and passes[-12:].count(True) == planned


def test_the_same_layer_pays_in_large_batches_alone():
    layers = Layers(rows_that_pay=100, layers=1)
    for _ in range(LAG):
        layers.serve(1.0)
    assert [bool(layers.serve(1.0, tokens=tokens)) for tokens in (TOKENS, 64, TOKENS, 64)] == [True, False] * 2


def test_looks_are_spread_over_the_passes():
    layers = Layers(rows_that_pay=50, layers=LOOK_EVERY)
    for _ in range(LAG):
        layers.serve(*[0.0] * LOOK_EVERY)
    assert [len(layers.serve(*[0.0] * LOOK_EVERY)) for _ in range(4)] == [1] * 4


def test_no_layer_is_left_alone_where_a_bound_is_needed_or_nothing_is_asked():
    needed = Layers(rows_that_pay=50, layers=1)
    now = batch.Batch(skip="", group_tokens=TOKENS * RANKS)
    for _ in range(LAG):
        needed.serve(0.0)
    assert needed.acting.decide(now).no_gain and not needed.acting.decide(now, every_layer=True).no_gain
    always = Layers(rows_that_pay=0, layers=1)
    assert all(always.serve(0.0) for _ in range(LAG + 2)) and not always.acting._planned


def test_halves_of_a_batch_count_together():
    """Two-batch overlap dispatches a layer twice a pass: one half is balanced, the other not."""
    layers = Layers(rows_that_pay=50, layers=1)
    (planner,) = layers.planners
    for _ in range(LAG + 1):
        halves = ((0, TOKENS), (TOKENS, 2 * TOKENS))
        now = batch.Batch(skip="", group_tokens=2 * TOKENS * RANKS, halves=halves)
        now = layers.acting.decide(now)
        with batch.forward(now):
            for half, skew in enumerate((0.0, 1.0)):
                hidden, ids, weights, logits = routed(skew)
                planner(hidden, ids, weights, logits, half)
        layers.acting.end_pass()
    alone = Layers(rows_that_pay=50, layers=1)
    for _ in range(LAG):
        alone.serve(1.0)
    half = alone.acting.decide(batch.Batch(skip="", group_tokens=TOKENS * RANKS)).gain[0]
    assert now.gain == {0: pytest.approx(half, abs=1)} and not now.no_gain
    assert layers.counters.expected_gain["planned"] == now.gain[0], "once a batch"


# ---- When loads count ----------------------------------------------------------------------------------------------


def test_a_pass_goes_by_loads_of_two_passes_before_whenever_they_arrive():
    """The newest loads are there, and not used: pass 2 knows nothing of pass 1. Those before are waited for."""
    layers, waited = Layers(rows_that_pay=50, layers=1), []
    decisions = []
    for n, skew in enumerate((0.0, 1.0, 0.0, 1.0, 0.0)):
        decisions.append(bool(layers.serve(skew)))
        layers.acting._exchanged = type(layers.acting._exchanged)(
            replace(one, arrived=SimpleNamespace(synchronize=lambda number=one.number: waited.append(number)))
            for one in layers.acting._exchanged
        )
        assert waited == [number for number in range(n - LAG + 1) if number != 2], "of no later pass"
    assert decisions == [True, True, False, True, True]


# ---- All ranks alike -----------------------------------------------------------------------------------------------


def _serve_unequal(rank: int, world: int, passes: int) -> list:
    """What this rank decided in each pass: ranks of unequal and changing size, one idle at times, other routing in
    every layer, and rows that are decoded.
    """
    config = MacsConfig.from_preset("rank", gamma=1.05)
    acting, counters, layers, decided = Acting(), Stats(), 5, []
    acting.rows_that_pay = 40
    plans = [Plan(config, 12, world) for _ in range(layers)]
    planners = [LayerPlanner(i, plan, dist.group.WORLD, counters, acting=acting) for i, plan in enumerate(plans)]
    for n in range(passes):
        tokens = [(37 * (n + 1) * (r + 1)) % 400 if (n + r) % 4 else 0 for r in range(world)]
        g = torch.Generator().manual_seed(100 * n + rank)
        now = batch.Batch(skip="", group_tokens=sum(tokens), leaves_alone=n % 5 == 0)
        now = acting.decide(now)
        decided.append((sorted(now.no_gain), dict(now.gain)))
        with batch.forward(now):
            for i, planner in enumerate(planners):
                logits = torch.randn(tokens[rank], 12, generator=g)
                logits[:, :4] += (0.0, 0.1, 0.3, 0.6, 1.2)[i] * (1 + n % 3)
                weights, ids = torch.softmax(logits, -1).topk(3)
                planner(torch.randn(tokens[rank], 16, generator=g), ids, weights, logits)
        acting.end_pass()
    return [decided, counters.snapshot()]


def test_unequal_ranks_decide_alike_in_every_pass():
    passes = 2 * LOOK_EVERY
    ranks = run_ranks(3, _serve_unequal, passes)
    assert all(decided == ranks[0][0] for decided, _ in ranks)
    left = Counter(layer for no_gain, _ in ranks[0][0] for layer in no_gain)
    assert 0 < left[3] < left[0], "some are left alone, and the skewed ones in small batches only"
    for _, counted in ranks:
        assert counted["skipped"] == {"no_gain": left.total()}
        assert counted["planned"] == 5 * passes - left.total()
        assert counted["expected_gain"] == ranks[0][1]["expected_gain"]


def _disagree(rank: int, world: int, no_gain: list[list[int]]) -> str:
    try:
        decided = batch.Batch(skip="", group_tokens=9, no_gain=frozenset(no_gain[rank]))
        Agreement(dist.group.WORLD, "--tp-size=2").check(decided, 5)
    except MacsNotActive as error:
        return str(error)
    return ""


def test_ranks_that_would_plan_other_layers_are_found():
    assert run_ranks(2, _disagree, [[3, 1], [1, 3]]) == [""] * 2
    wrong = "the ranks do not agree which layers are planned; pass --macs-act always, and report --tp-size=2"
    assert run_ranks(2, _disagree, [[1], [1, 2]]) == [wrong] * 2


def _agree_on_rows(rank: int, world: int) -> list[int]:
    plan_seconds, row_seconds = plan_cost._plan_seconds, plan_cost.row_seconds
    sizes = plan_cost.ExpertSizes(64, 32, 3)
    planner = LayerPlanner(0, Plan(CONFIG, 12, world), dist.group.WORLD, Stats())
    timed = plan_cost.rows_that_pay(planner, sizes, torch.device("cpu"), dist.group.WORLD)
    plan_cost._plan_seconds = lambda *_: [30e-6, 500e-6][rank]
    plan_cost.row_seconds = lambda *_: 1e-6
    made_up = plan_cost.rows_that_pay(planner, sizes, torch.device("cpu"), dist.group.WORLD)
    plan_cost._plan_seconds, plan_cost.row_seconds = plan_seconds, row_seconds
    return [timed, made_up]


def test_ranks_of_unequal_speed_agree_on_the_slowest():
    (timed, made_up), other = run_ranks(2, _agree_on_rows)
    assert [timed, made_up] == other
    assert timed >= 1 and made_up == 512, "500, up to a half octave"


def test_nearly_equal_measurements_come_to_one_number():
    assert {plan_cost._rounded(rows) for rows in (370, 400, 500, 512)} == {512}
    assert [plan_cost._rounded(rows) for rows in (0.0, 1, 1.2, 1.5, 2.1, 700)] == [1, 1, 2, 2, 3, 725]


# ---- Options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ({}, True),
        ({"act": "always"}, False),
        ({"gamma": math.inf}, False),  # it plans to be counted: calibration, imbalance
        ({"exchange": "local"}, False),  # ranks do not know the same loads
        ({"preset": "paper"}, False),  # as published
        ({"preset": "cai"}, False),
        ({"preset": "paper", "act": "auto"}, True),
        ({"preset": "off"}, False),
    ],
)
def test_where_layers_may_be_left_alone(options, may):
    assert MacsConfig.from_preset(**options).may_leave_layers == may


def test_what_pays_is_known_on_a_cpu_and_measured_on_a_gpu_unless_given():
    config, given = MacsConfig.from_preset(), MacsConfig.from_preset(act_rows=5)
    assert (config.on("cpu").act_rows, config.on("cuda").act_rows) == (8, None)
    assert {given.on(device).act_rows for device in ("cpu", "cuda")} == {5}


@pytest.mark.parametrize(
    ("options", "fuses", "rows"),
    [({}, False, 8), ({"act_rows": 3}, False, 3), ({"act": "always"}, False, 0), ({}, True, 0)],
)
def test_a_server_acts_on_the_number_it_was_given_unless_its_dispatch_plans_by_itself(options, fuses, rows, capsys):
    process = Worker(MacsConfig.from_preset(**options).on("cpu"))
    process.transports.plans = fuses
    process.rows_that_pay = scheduler._rows_that_pay(process, SimpleNamespace(moe_ep_rank=0), None)
    assert process.rows_to_act_on == rows
    assert (f"from {rows} rows on" in capsys.readouterr().err) == (rows > 0)


def test_a_plan_that_stands_before_the_fused_dispatch_has_to_pay():
    process = Worker(MacsConfig.from_preset().on("cpu"))
    process.transports.plans = True
    routing = Routing("sigmoid", torch.zeros(4))
    places = Places(4, 6, 2, 0, [0, 1, 2, 3, 0, 1])
    for options in ({"routing": routing}, {"places": places}):
        process.planners = {i: SimpleNamespace(plan=Plan(process.config, 4, 2, **options)) for i in range(2)}
        assert scheduler._rows_that_pay(process, SimpleNamespace(moe_ep_rank=1), None) == 8


def test_batches_that_are_not_planned_do_not_count_as_passes():
    process = Worker(MacsConfig.from_preset("rank", gamma=1.1).on("cpu"))
    process.acting.rows_that_pay = 50
    for skip in ("", "decode", "small", "outside", ""):
        process.decide(batch.Batch(skip=skip, group_tokens=8))
    assert process.acting._passes == 2
