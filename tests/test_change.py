"""Options that change while ranks serve: before the same pass on all, whenever each is asked, and completely."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sglang_macs import control
from sglang_macs.config import MacsConfig
from sglang_macs.control import Settings
from sglang_macs.dispatch.layer_graph import LayerGraphs
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import set_state, worker
from sglang_macs.engine.control import Control
from sglang_macs.engine.launch import Launch
from sglang_macs.errors import MacsError
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.routing import Routing
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.ranks import run_ranks

LAUNCH = MacsConfig.from_preset("rank", gamma=1.2, min_tokens=8).on("cpu")


def a_control(applied: list, check=lambda settings: None) -> Control:
    return Control(Settings.at_launch(LAUNCH), check, lambda number, settings: applied.append((number, settings.now)))


def ask(of: Control, **options) -> bool:
    return of.receive(control.encode(options))


def test_a_request_waits_until_every_rank_has_it():
    applied: list = []
    rank = a_control(applied)
    rank.begin_pass(0)
    assert ask(rank, gamma=1.05) and ask(rank, preset="off")
    rank.begin_pass(0)  # another rank has none yet
    assert not applied and rank.settings.now == LAUNCH
    rank.begin_pass(1)
    assert [(number, now.gamma) for number, now in applied] == [(1, 1.05)]
    rank.begin_pass(2)
    rank.begin_pass(2)
    assert rank.settings.now.is_off and rank.state()["changes"] == [[1, 2], [2, 3]]


def test_a_refused_request_counts_and_changes_nothing():
    applied: list = []

    def check(settings: Settings) -> None:
        if settings.now.gamma == 1.5:
            raise MacsError("gamma", 1.5, "another")

    rank = a_control(applied, check)
    assert not ask(rank, gamma=1.5) and not ask(rank, buckets=4) and ask(rank, gamma=1.1)
    rank.begin_pass(3)
    assert [(number, now.gamma) for number, now in applied] == [(3, 1.1)]
    assert rank.state()["refused"].startswith("option: got macs_buckets=4")


def _asked_at_another_time(rank: int, world: int, delays: list[int], passes: int) -> list:
    """Each rank gets request i before its pass i + delay; ranks tell each other before each pass what they have."""
    applied: list = []
    mine, seen = a_control(applied), []
    requests = [{"gamma": 1.0 + 0.01 * i} if i % 3 else {"preset": "off" if i % 2 else "paper"} for i in range(1, 8)]
    for number in range(passes):
        while mine.received < min(number - delays[rank], len(requests)):
            ask(mine, **requests[mine.received])
        told = [torch.zeros(2, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(told, set_state._with(torch.tensor([number + rank]), mine.received))
        mine.begin_pass(set_state.received_by_all(torch.stack(told)))
        seen.append((mine.settings.now.preset, mine.settings.now.gamma))
    return [seen, mine.state()]


@pytest.mark.parametrize("delays", [[0, 0], [0, 3], [5, 1]])
def test_ranks_that_are_asked_at_different_times_change_before_the_same_pass(delays):
    first, second = run_ranks(2, _asked_at_another_time, delays, 16)
    assert first == second and first[1]["applied"] == 7
    assert len(set(map(tuple, first[0]))) > 4


def test_a_rank_that_is_not_there_holds_nobody_up():
    told = torch.stack([set_state._with(torch.zeros(9, dtype=torch.int64), n) for n in (3, set_state.EVERYONE_HAS)])
    assert set_state.received_by_all(told) == 3


# ---- What a process does with other options -------------------------------------------------------------------------


def a_worker(config: MacsConfig = LAUNCH, **plan) -> worker.Worker:
    process = worker.Worker(config)
    made = Plan(config, 8, 2, **plan)
    process.planners[0] = LayerPlanner(0, made, None, process.stats, acting=process.acting)
    process.rows_that_pay = process.acting.rows_that_pay = 8
    return process


def go(process: worker.Worker, **options) -> None:
    assert process.control.receive(control.encode(options)), process.control.refused
    process.control.begin_pass(process.control.received)


def tokens() -> RoutedTokens:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 8, generator=generator) + torch.tensor([3.0, 2, 1, 0, 0, 0, 0, 0])
    weights, ids = torch.softmax(logits, -1).topk(2)
    segment = (torch.arange(64) % 2 - 1).int()
    return RoutedTokens(torch.randn(64, 16, generator=generator), ids, weights, logits, segment, 1)


@pytest.mark.parametrize("preset", ["rank", "paper", "cai"])
def test_a_plan_under_changed_options_is_that_of_a_launch_with_them(preset):
    process = a_worker()
    for options in ({"preset": "off"}, {"preset": preset, "gamma": 1.0}):
        go(process, **options)
    want = Plan(MacsConfig.from_preset(preset, gamma=1.0, min_tokens=8).on("cpu"), 8, 2)
    got, plain = process.planners[0].plan(tokens()), want(tokens())
    assert process.planners[0].plan.config == want.config
    for part, same in zip(got, plain, strict=True):
        assert part is None or torch.equal(part, same)
    assert not torch.equal(got.topk_ids, tokens().topk_ids)


def test_a_process_forgets_what_belongs_to_the_old_options():
    process, compared = a_worker(), []
    process.layer_graphs = LayerGraphs(lambda line: None)
    process.bounded = SimpleNamespace(config=LAUNCH, needs_plan=lambda tokens: False)
    process.agreement = SimpleNamespace(again=compared.append)
    process.acting._gains[0] = "of gamma 1.2"
    go(process, gamma=1.1)
    assert not process.acting._gains and process.acting.rows_that_pay == 8
    assert process.layer_graphs.options == 1 and process.bounded.config.gamma == process.transports.config.gamma == 1.1
    assert process.stats.changes == 1 and "'gamma': 1.1" in compared[0]
    go(process, preset="paper")  # plans every layer
    assert process.acting.rows_that_pay == 0
    go(process, preset="rank")
    assert process.acting.rows_that_pay == 8 and process.config == LAUNCH


def test_a_change_begins_another_run_of_a_trace(tmp_path):
    from sglang_macs.observe.recorder import Place

    config = MacsConfig.from_preset("rank", trace=str(tmp_path)).on("cpu")
    process = a_worker(config)
    process.planners[0].recorder = process.recorder_at(Place(0))
    go(process, gamma=1.3)
    assert process.planners[0].recorder.config.gamma == 1.3 and len(list(tmp_path.iterdir())) == 2
    go(process, trace=False)
    assert process.planners[0].recorder is None and "trace" not in process.state()
    go(process, trace=True)
    assert len(list(tmp_path.iterdir())) == 3


def refused(process: worker.Worker, **options) -> str:
    assert not process.control.receive(control.encode(options))
    return process.control.refused


def test_what_a_launch_would_refuse_is_refused_and_off_never():
    process = a_worker(MacsConfig.from_preset("off").on("cpu"))
    flags = SimpleNamespace(tp_size=2, ep_size=2, device="cpu", enable_deterministic_inference=True)
    process.launch = Launch(flags, process.config, "Qwen3VLMoeForConditionalGeneration", 8, 2)
    assert "batch-invariant answers" in refused(process, on=True)
    go(process, preset="off")


def test_rerouting_that_cannot_follow_is_refused():
    process = a_worker(MacsConfig.from_preset("off").on("cpu"))
    process.cannot_reroute = "re-routing cannot follow it"
    assert "cannot follow it" in refused(process, preset="rank")
    go(process, preset="cai")  # which re-routes nothing


def test_a_larger_gamma_than_bounded_buffers_were_made_for_is_refused():
    process = a_worker(MacsConfig.from_preset("rank", gamma=1.2, dispatch="bounded"))
    process.bounded = SimpleNamespace(config=process.config)
    assert "at most the launch's 1.2" in refused(process, gamma=1.3)
    go(process, gamma=1.1)
    go(process, preset="off")
    go(process, on=True)
    go(process, gamma="inf")


def test_a_router_known_while_off_orders_candidates_once_it_is_on():
    routing = Routing("sigmoid", torch.zeros(8), None, None)
    process = a_worker(MacsConfig.from_preset("off").on("cpu"), routing=routing)
    assert not process.planners[0].plan.needs_selection
    go(process, on=True)
    assert process.planners[0].plan.needs_selection == routing.needs_selection


def test_sglangs_request_reaches_ours_and_others_stay_sglangs(monkeypatch):
    process, passed = a_worker(), []
    monkeypatch.setattr(worker, "current", lambda: process)
    output = SimpleNamespace(SetInternalStateReqOutput=lambda updated: updated)
    monkeypatch.setitem(__import__("sys").modules, "sglang.srt.managers.io_struct", output)

    def request(**server_args):
        return set_state._set_internal_state(
            lambda self, r: passed.append(r), None, SimpleNamespace(server_args=server_args)
        )

    request(pp_max_micro_batch_size=8)
    assert len(passed) == 1 and process.control.received == 0
    assert request(macs_gamma=1.1) is True and process.control.received == 1
    assert request(macs_gamma=1.1, pp_max_micro_batch_size=8) is False and process.control.received == 2
