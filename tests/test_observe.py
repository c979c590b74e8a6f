"""--macs-preset observe: what it counts beside a pass is what the proof counts in it, and what is made of that."""

import math

import pytest
import torch
import torch.distributed as dist

from sglang_macs import cli
from sglang_macs.choices import GAMMAS
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.planner import LayerPlanner, Planned
from sglang_macs.observe import stats
from sglang_macs.observe.beside import Observed
from sglang_macs.observe.stats import Stats
from sglang_macs.observe.verdict import verdict
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from tests.support.info_server import answering, body
from tests.support.ranks import run_ranks

EXPERTS, TOP_K = 8, 2


def routed(rank: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T, K] that favour the first experts, a padded row among them, and the segment [T]."""
    generator = torch.Generator().manual_seed(100 * rank + seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator) + torch.linspace(2, 0, EXPERTS)
    ids = logits.topk(TOP_K).indices
    ids[:1] = -1
    return ids, (torch.arange(tokens) % 3 - 1).clamp(max=0).int()


def _serve(rank: int, world: int, preset: str, tokens: list[int]) -> dict:
    """Four passes of two layers, the second of which is not measured."""
    config, counters = MacsConfig.from_preset(preset), Stats()
    observed = Observed(counters)
    planners = [
        LayerPlanner(i, Plan(config, EXPERTS, world), dist.group.WORLD, counters, observed=observed) for i in (0, 3)
    ]
    for number in range(4):
        measured = number != 1
        if measured and config.observes:
            observed.begin_pass()
        with batch.forward(batch.Batch(skip="off", group_tokens=sum(tokens), measured=measured)):
            for planner in planners:
                ids, segment = routed(rank, tokens[rank], 10 * number + planner.layer_id)
                planner.measure(ids, Planned(ids, torch.ones(ids.shape), segment))
        observed.end_pass()
    dist.barrier()
    while observed._under_way:
        observed.collect()
    return counters.snapshot()


@pytest.mark.parametrize("tokens", [[40, 23], [40, 0]])
def test_what_is_counted_beside_a_pass_is_what_the_proof_counts_in_it(tokens):
    observed, proved = run_ranks(2, _serve, "observe", tokens), run_ranks(2, _serve, "off", tokens)
    for mine, proof in zip(observed, proved, strict=True):
        assert mine["layers"] == proof["layers"] and mine["layers"]["3"]["dispatches"] == 3
        assert mine["observed_passes"] == 3 and mine["observed_seconds"] > 0
        segments = [routed(rank, count, 0) for rank, count in enumerate(tokens)]
        visual = sum(int((segment[1:] == 0).sum()) for _, segment in segments)
        text = sum(int((segment[1:] == -1).sum()) for _, segment in segments)
        assert mine["observed_share"] == pytest.approx(3 * visual / 2 / (visual / 2 + text))
    assert observed[0]["layers"] == observed[1]["layers"]


def test_rows_above_a_bound():
    rows = torch.tensor([[30, 10], [20, 20], [0, 0]])
    assert stats.excess(rows).tolist() == [[max(0.0, 30 - gamma * 20) for gamma in GAMMAS], [0.0] * 5, [0.0] * 5]


def test_the_preset_plans_nothing_and_looks_now_and_then():
    config = MacsConfig.from_preset("observe")
    assert config.is_off and config.observes and config.gamma == math.inf and config.changes_nothing
    assert config.verify_every > 0 and not config.verify
    assert not MacsConfig.from_preset("off").observes


# ---- The verdict ----------------------------------------------------------------------------------------------------


def counted(rows: list[int], dispatches: int = 4, **known) -> dict:
    """A server's state: every dispatch of two layers had these rows."""
    mean, most = sum(rows) / len(rows), max(rows)
    layer = {
        "dispatches": dispatches,
        "rows_before": [n * dispatches for n in rows],
        "max_over_mean_before": dispatches * most / max(mean, 1),
        "excess": [dispatches * max(0.0, most - gamma * mean) for gamma in GAMMAS],
    }
    state = {"version": "0", "rank": 0, "config": {"preset": "observe"}, "layers": {"0": layer, "1": dict(layer)}}
    return state | known


def test_a_verdict_in_time_where_a_row_and_a_pass_are_known():
    """Two layers, 200 rows above the mean each: 400 us of a pass of 10 ms. A plan costs what 20 rows do."""
    known = {"observe": {"row_us": 1.0, "plan_rows": 20}, "observed_passes": 2, "observed_seconds": 0.02}
    line = verdict([counted([1200, 800], **known)])
    assert line.startswith("most loaded rank over mean 1.20: worth it, at gamma 1.1 1.6% of a prefill pass")
    assert "(at 1 3.6%, perfect balance 4.0%)" in line
    slow = known | {"observed_seconds": 0.2}
    line = verdict([counted([1200, 800], **slow)])
    assert "not worth it; perfect balance would save 0.4% of a prefill pass" in line


def test_a_verdict_in_rows_where_time_is_not_known():
    line = verdict([counted([1200, 800])])
    assert "worth it, at gamma 1.1 8.3% of the experts' time" in line
    assert "not worth it" in verdict([counted([1000, 1000])])


@pytest.mark.parametrize("state", [{}, {"layers": {}}, {"layers": 3}, {"layers": {"0": {"dispatches": 2}}},
                                   {"layers": {"0": {"dispatches": 0}}}, counted([0, 0])])  # fmt: skip
def test_counters_of_any_shape_give_a_line(state):
    assert verdict([state]).startswith(("imbalance: ", "most loaded"))
    assert verdict([]).startswith("imbalance: ")


def test_top_and_doctor_show_it(capsys):
    with answering(body([counted([1200, 800], dispatches_=3)])) as url:
        assert cli.main(["top", url, "--once"]) == 0
        assert "worth it, at gamma 1.1" in capsys.readouterr().out
        assert cli.main(["doctor", url]) == 0
        out = capsys.readouterr().out
    assert "worth it, at gamma 1.1" in out and "preset observe" in out


def test_doctor_fails_for_a_server_whose_claims_did_not_hold(capsys):
    with answering(body([counted([1200, 800], checks={"bound": 9}, violations={"bound": 1}, misaligned=0)])) as url:
        assert cli.main(["doctor", url]) == 1
    assert "9 claims checked, 1 violated" in capsys.readouterr().out
