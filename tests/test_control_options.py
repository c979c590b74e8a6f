"""What a request to change options at run time says, and the configuration that comes of it."""

import json
import math

import pytest

from sglang_macs import control
from sglang_macs.config import PRESETS, MacsConfig
from sglang_macs.control import Settings
from sglang_macs.errors import MacsError

LAUNCH = MacsConfig.from_preset("rank", gamma=1.2, min_tokens=64).on("cpu")


def settings(**launch) -> Settings:
    return Settings.at_launch(MacsConfig.from_preset(**launch).on("cpu"))


def after(start: Settings, *requests: dict) -> Settings:
    for options in requests:
        start = start.changed(control.decode(control.encode(options)))
    return start


def test_a_request_is_numbers_alone_and_reads_back():
    options = {"preset": "cai", "gamma": 1.05, "verify": True, "min_tokens": 7, "trace": False}
    request = json.loads(json.dumps(control.encode(options)))
    assert all(isinstance(value, int | float) for value in request.values())
    assert control.decode(request) == options
    assert control.decode({"macs_gamma": 1.05, "macs_verify_every": 8.0}) == {"gamma": 1.05, "verify_every": 8}
    assert control.decode({"macs_gamma=inf": 1}) == {"gamma": math.inf}


@pytest.mark.parametrize(
    "request_", [{"macs_buckets": 64}, {"macs_profile=/x": 1}, {"gamma": 1.1}, {"macs_gamma": -1}, {"macs_trace=x": 1},
                 {"macs_verify_every": 1.5}, {"macs_on": 0}, {"macs_preset=best": 1}, {"macs_min_tokens=x": 1},
                 {"macs_min_tokens=None": 1}, {"macs_importance=": 1}]
)  # fmt: skip
def test_what_cannot_change_or_be_read_is_refused_in_one_line(request_):
    with pytest.raises(MacsError) as caught:
        control.decode(request_)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_options_change_one_by_one_and_the_others_stay():
    now = after(Settings.at_launch(LAUNCH), {"gamma": 1.05}, {"importance": "entropy"}).now
    assert (now.gamma, now.importance, now.min_tokens, now.preset) == (1.05, "entropy", 64, "rank")


def test_off_and_on_come_back_to_what_was_in_force():
    start = after(Settings.at_launch(LAUNCH), {"gamma": 1.05})
    off = after(start, {"preset": "off"})
    assert off.now.is_off and off.now.changes_nothing
    assert after(off, {"on": True}).now == start.now
    assert after(off, {"preset": "off"}, {"on": True}).now == start.now
    assert after(off, {"on": True, "gamma": 1.3}).now.gamma == 1.3


def test_what_changes_while_off_holds_when_it_is_on_again():
    off = after(Settings.at_launch(LAUNCH), {"preset": "off"}, {"min_tokens": 5})
    assert off.now.is_off and off.now.min_tokens == 5
    assert after(off, {"on": True}).now.min_tokens == 5
    with pytest.raises(MacsError, match="gamma"):
        after(off, {"gamma": 1.1})
    with pytest.raises(MacsError, match="on"):
        after(off, {"preset": "off", "on": True})


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"off", "rank"}))
def test_a_preset_brings_its_options_and_that_of_the_launch_the_launchs(preset):
    start = settings(preset="rank", gamma=1.2, alpha=2.0, buckets=64)
    other = after(start, {"preset": preset})
    assert {name: getattr(other.now, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert (other.now.gamma, other.now.buckets) == (PRESETS[preset].get("gamma", 1.2), 64)
    assert after(other, {"preset": "rank"}).now == start.launch


def test_a_server_launched_off_can_be_turned_on():
    start = settings(preset="off")
    assert after(start, {"on": True}).now == MacsConfig.from_preset("rank").on("cpu")
    assert after(start, {"preset": "rank", "gamma": 1.05}).now.gamma == 1.05


def test_a_trace_needs_the_launchs_folder_and_a_function_a_launch():
    with pytest.raises(MacsError, match="--macs-trace FOLDER"):
        after(Settings.at_launch(LAUNCH), {"trace": True})
    traced = settings(preset="rank", trace="/tmp/x")
    assert traced.traced and not after(traced, {"trace": False}).traced
    assert after(traced, {"trace": False}, {"trace": True}).traced
    with pytest.raises(MacsError, match="launch"):
        after(traced, {"importance": "os:getcwd"})


def test_a_change_is_told_in_words():
    start = Settings.at_launch(LAUNCH)
    assert control.difference(start, after(start, {"gamma": 1.05})) == "gamma 1.2 -> 1.05"
    assert control.difference(start, start) == "nothing"
