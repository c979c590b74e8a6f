"""What can carry a launch's batches: dispatches that are refused, and what `auto` comes to. No SGLang needed."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sglang_macs.config import MacsConfig
from sglang_macs.engine import compat, dispatch_choice
from sglang_macs.engine.launch import EXPERIMENTAL_ENV, Launch
from sglang_macs.errors import MacsError
from tests.support.launches import launch

LOW_LATENCY = {"device": "cuda", "deepep_mode": "low_latency"}


def fused_launch(options: dict[str, object], flags: dict[str, object]) -> Launch:
    config = MacsConfig.from_preset(**{"dispatch": "fused", **options})
    return replace(launch(**{**LOW_LATENCY, **flags}), config=config)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"device": "cpu"}),
        ({}, {"deepep_mode": "normal"}),
        ({}, {"enable_single_batch_overlap": True}),
        ({"exchange": "local"}, {}),
    ],
    ids=str,
)
def test_the_fused_dispatch_is_refused_where_it_would_carry_nothing(options, flags):
    with pytest.raises(MacsError, match="--macs-dispatch deepep"):
        compat.check(fused_launch(options, flags))


@pytest.mark.parametrize("options", [{}, {"decode": True}], ids=str)
@pytest.mark.parametrize("mode", ["auto", "low_latency"])
def test_the_fused_dispatch_is_taken_where_there_are_low_latency_batches(options, mode):
    compat.check(fused_launch(options, {"deepep_mode": mode}))


@pytest.mark.parametrize("backend", ["full", "breakable", "disabled"])
def test_decode_is_planned_only_without_cuda_graphs(backend):
    """A graph is captured before there is a batch: its replays would be served unplanned, and nobody would know."""
    graphs = {"cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend=backend))}
    compat.check(fused_launch({}, graphs))
    compat.check(fused_launch({"preset": "off", "decode": True, "dispatch": "deepep"}, graphs))
    if backend == "disabled":
        return compat.check(fused_launch({"decode": True}, graphs))
    with pytest.raises(MacsError, match=r"--macs-decode: got true, and decode replays.*--disable-cuda-graph"):
        compat.check(fused_launch({"decode": True}, graphs))


NORMAL = {"device": "cuda", "deepep_mode": "normal", "moe_runner_backend": "deep_gemm", "quantization": None}


def normal_launch(flags: dict[str, object], dispatch: str) -> Launch:
    config = MacsConfig.from_preset(dispatch=dispatch, gamma=math.inf)  # else determinism is refused already
    return replace(launch(**{**NORMAL, **flags}), config=config, quantization=flags.get("quantization"))


NOT_BOUNDED = pytest.mark.parametrize(
    "flags",
    [
        {"device": "cpu"},
        {"deepep_mode": "low_latency"},
        {"moe_runner_backend": "triton"},
        {"quantization": "w4afp8"},
        {"enable_two_batch_overlap": True},
        {"enable_single_batch_overlap": True},
        {"expert_distribution_recorder_mode": "stat_approx"},
        {"expert_distribution_recorder_mode": "per_token"},
        {"speculative_algorithm": "EAGLE"},
        {"enable_deterministic_inference": True},
    ],
    ids=str,
)


@NOT_BOUNDED
def test_the_bounded_dispatch_is_refused_where_it_cannot_carry(flags):
    with pytest.raises(MacsError, match=r"got bounded .*--macs-dispatch deepep"):
        compat.check(normal_launch(flags, "bounded"))


@NOT_BOUNDED
def test_auto_leaves_it_out_there_and_says_why(flags):
    launch = normal_launch(flags, "auto")
    compat.check(replace(launch, config=launch.config.on(launch.flag("device"))))
    config, why = dispatch_choice.resolved(launch)
    assert config.dispatch in ("auto_fused", "deepep") and why


NOT_SHOWN = ({"enable_two_batch_overlap": True}, {"enable_single_batch_overlap": True}, {"speculative_algorithm": "X"})


@pytest.mark.parametrize("flags", [*NOT_SHOWN, {"deepep_mode": "auto"}], ids=str)
@pytest.mark.parametrize("dispatch", ["auto", "auto_fused"])
def test_auto_takes_what_a_server_has_shown(monkeypatch, flags, dispatch):
    """What is asked for by its name is taken nevertheless."""
    launch = normal_launch(flags, dispatch)
    config, why = dispatch_choice.resolved(launch)
    alone = flags not in NOT_SHOWN
    assert (config.dispatch, config.all_reduce) == (("auto_fused", "auto") if alone else ("deepep", "group"))
    assert ("no server has shown" in why) == (config != launch.config)
    asked = replace(launch, config=replace(launch.config, dispatch="fused", all_reduce="peer"))
    assert dispatch_choice.resolved(asked) == (asked.config, "")
    monkeypatch.setenv(EXPERIMENTAL_ENV, "auto")
    assert "no server has shown" not in dispatch_choice.resolved(launch)[1]


BOUNDED = pytest.mark.parametrize(
    "flags",
    [
        {},
        {"deepep_mode": "auto"},
        {"quantization": "fp8"},
        {"expert_distribution_recorder_mode": "stat"},  # of what was routed: before the dispatch, and so before graphs
        {"expert_distribution_recorder_mode": "per_pass"},
    ],
    ids=str,
)


@BOUNDED
def test_the_bounded_dispatch_is_taken_in_normal_mode(monkeypatch, flags):
    monkeypatch.setenv(EXPERIMENTAL_ENV, "auto")
    for dispatch in ("bounded", "auto"):
        launch = normal_launch(flags, dispatch)
        compat.check(launch)
        assert dispatch_choice.resolved(launch) == (launch.config, "")


def test_auto_carries_experts_with_copies_as_any_others():
    launch = normal_launch({"ep_num_redundant_experts": 2, "enable_eplb": True}, "auto")
    assert dispatch_choice.resolved(launch) == (launch.config, "")


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", {}, ("auto", "auto")),
        ("cuda", {"preset": "off"}, ("deepep", "auto")),
        ("cuda", {"preset": "off", "dispatch": "bounded"}, ("bounded", "auto")),
        ("cpu", {}, ("deepep", "group")),
    ],
    ids=str,
)
def test_auto_is_for_gpus_with_macs_on(device, options, expected):
    """With MACS off a server is what others are compared with."""
    config = MacsConfig.from_preset(**options).on(device)
    assert (config.dispatch, config.all_reduce) == expected
