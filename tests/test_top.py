"""`sglang-macs top` draws what the counters say."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_macs import __version__, cli
from sglang_macs.cli import top
from sglang_macs.config import MacsConfig
from sglang_macs.observe import stats
from tests.support.info_server import answering, body

CONFIG = MacsConfig.from_preset("rank", gamma=1.25)


def state(rank: int) -> dict:
    """Counters of two dispatches on two ranks: 30 and 10 rows routed, 25 and 15 dispatched, in each."""
    counted = stats.Stats(dispatches=5, planned=2, plan_seconds=0.004, visual_share_sum=1.5)
    counted.skipped["decode"] = 3
    counted.outcome = torch.tensor([[50, 20], [10, 0], [6, 0]])
    rows, cut = torch.tensor([[30, 10], [25, 15]]), torch.tensor([[1, 0, 0, 25], [-1, 0, 0, 25]])
    for _ in range(2):
        counted.add_recount(stats.Recount(CONFIG, 0, 2, rows, rows, cut))
    return {"version": __version__, "rank": rank, "config": CONFIG.to_json(), **counted.snapshot()}


def test_a_frame_holds_the_figures():
    text = top.frame([state(0), state(1)], "since then")
    assert "gamma 1.25, 1 layers, since then" in text
    assert "dispatches 10 of 2 ranks   planned 4   left alone: decode 6" in text
    assert "R_v 0.75   plan 2.00 ms" in text
    assert "1.500 -> 1.250; a bound cut in 100%" in text
    rank0 = next(line for line in text.splitlines() if line.startswith("rank 0"))
    assert rank0.count("█") > 28 and rank0.split()[-3] == "1.50" and rank0.split()[-1] == "1.25"
    visual = next(line for line in text.splitlines() if line.startswith("visual ") and "R_v" not in line)
    assert visual.split() == ["visual", "120", "20", "(16.7%)", "12", "8"]  # both ranks
    assert "checked 4, violated 0" in text and "must be 0" not in text
    assert "server has" not in text and "counters of" not in text


def test_a_frame_tells_the_gain_expected_where_layers_may_be_left_alone():
    shown = {"acting": {"rows_that_pay": 8}, "expected_gain": {"planned": 60, "no_gain": 9}}
    one = state(0) | shown | {"skipped": {"no_gain": 3}}
    text = top.frame([one, one], "")
    assert "planned 4   left alone: no_gain 6" in text
    assert "most loaded rank: 30 a plan, 3 where left alone; a plan pays from 8 on" in text
    assert "expected gain" not in top.frame([state(0) | {"acting": {"rows_that_pay": 0}}], "")
    assert top.since(one, one)["acting"] == shown["acting"]


def test_violations_stand_out():
    bad = state(0)
    bad["violations"]["bound"] = 1
    assert "violated 1; plans without a mask 0 <-- must be 0" in top.frame([bad], "")


def test_a_difference_counts_only_what_came_since():
    before, now = state(0), state(0)
    now = copy.deepcopy(before)
    now["planned"] += 7
    now["layers"]["0"]["rows_after"][1] += 3
    now["layers"]["1"] = copy.deepcopy(before["layers"]["0"])  # a layer that was not there before
    got = top.since(now, before)
    assert got["planned"] == 7 and got["dispatches"] == 0 and got["config"] == CONFIG.to_json()
    assert got["layers"]["0"]["rows_after"] == [0, 3] and got["layers"]["1"]["rows_after"] == [50, 30]
    top.frame([got], "")  # nothing divides by zero where nothing happened


def test_the_command_prints_one_frame(capsys):
    with answering(body([state(0), state(1)])) as url:
        assert cli.main(["top", url, "--once"]) == 0
    assert "1.500 -> 1.250" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "says"), [(b"<html>", "expected an SGLang server"), (b'{"internal_states": [{}]}', "without MACS")]
)
def test_other_servers_end_in_one_line(capsys, answer, says):
    with answering(answer) as url:
        assert cli.main(["top", url, "--once"]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_no_server_ends_in_one_line(capsys):
    assert cli.main(["top", "http://127.0.0.1:9", "--once"]) == 2
    assert "Is the server up" in capsys.readouterr().err


# ---- Servers of other versions, ranks that come and go ---------------------------------------------------------------


def test_a_rank_without_rows_says_so():
    bare = {**state(0), "layers": {}}
    assert "rows of each rank: none counted yet" in top.frame([bare], "")


def test_ranks_that_do_not_answer_are_named():
    assert "counters of 1 of 2 ranks" in top.frame([state(0)], "")


def test_stages_of_a_pipeline_are_put_together():
    first, second = state(0), state(0)
    second["layers"] = {"1": second["layers"]["0"]}
    assert "2 layers" in top.frame([first, second], "") and "1.500 -> 1.250" in top.frame([first, second], "")


def test_another_version_is_named_and_what_it_has_is_shown():
    other = {"version": "9.1", "rank": 0, "dispatches": 7, "new": {"a": ["b"]}}
    text = top.frame([other], "since then")
    assert f"the server has sglang-macs 9.1, this is {__version__}" in text and "dispatches 7 of 1 rank " in text
    assert "assignments" not in text and "claims" not in text  # not there: not shown as 0
    assert "sglang-macs unknown" in top.frame([{}], "")


def test_nothing_that_a_server_sends_steers_the_terminal():
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\r\n"
    bad = state(0)
    bad["version"] = evil
    bad["config"] = dict.fromkeys(bad["config"], evil)
    bad["skipped"] = {evil: 3}
    bad["layers"][evil] = bad["layers"]["0"]
    assert all(line.isprintable() for line in top.frame([bad], "").split("\n"))


def names(value: object) -> list[tuple]:
    """The paths to everything in nested tables and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in pairs for path in ((key,), *((key, *rest) for rest in names(inner)))]


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_state_of_another_server_ends_in_an_error(data):
    """One value of a state replaced by something else, or taken away, in one of two frames."""
    good, odd = state(0), state(1)
    *where, last = data.draw(st.sampled_from(names(odd)))
    table = odd
    for key in where:
        table = table[key]
    if data.draw(st.booleans()):
        table[last] = data.draw(ODD)
    else:
        del table[last]
    for states in ([odd], [odd, good], [good, odd]):
        assert top.frame(states, "since then")
    for now, before in (([odd], [state(1)]), ([state(1)], [odd]), ([good, odd], [good, state(1)])):
        assert top.next_frame(now, before, 2)


def test_a_frame_is_of_the_interval_until_a_rank_comes_goes_or_restarts():
    old, new = [state(0), state(1)], [state(0), state(1)]
    new[1]["dispatches"] += 2
    assert "last 2 s" in top.next_frame(new, old, 2) and "dispatches 2 of 2 ranks" in top.next_frame(new, old, 2)
    assert "last 2 s" in top.next_frame(new[::-1], old, 2)  # by rank, not by place
    fresh = [state(0), {**state(1), "dispatches": 1}]
    for states in (old[:1], [*old, state(2)], fresh):
        text = top.next_frame(states, old, 2)
        assert top.SINCE_START in text and "last 2 s" not in text
