"""The comparison of two servers: its statistics on numbers, its plumbing on one real server compared with itself."""

import argparse
import math
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import bench_forks, check_serving
from benchmarks.check_serving import Interval, interval, verdict
from benchmarks.serving import Server
from sglang_macs.cpu_compat import environment

SCHEDULER_WITHOUT_MACS = """
from sglang_macs.engine import hooks, scheduler_process
scheduler_process.here = True  # as in run_scheduler_process
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
print("hooks:", hooks.registered, [h for h in HookRegistry._hooks] if hasattr(HookRegistry, "_hooks") else "?")
"""


def test_the_interval_holds_the_true_median_in_95_of_100_cases():
    held = 0
    for seed in range(400):
        draw = random.Random(seed)
        found = interval([draw.lognormvariate(0.0, 0.2) * (3 if draw.random() < 0.02 else 1) for _ in range(60)])
        held += found.low <= math.exp(0.2 * 0.0251) <= found.high  # outliers move the median by 2 % of its ranks
    assert 0.93 <= held / 400 <= 0.99


def test_few_pairs_say_nothing():
    assert interval([1.0] * 5).high == math.inf
    six = interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    assert (six.low, six.high) == (1.0, 1.5) and six.median == pytest.approx(1.25)


@pytest.mark.parametrize(("low", "high", "expected"), [(0.99, 1.005, 0), (1.02, 1.1, 1), (0.99, 1.03, 2)])
def test_one_percent_is_shown_refuted_or_open(low, high, expected):
    assert verdict(Interval(1.0, low, high, 100), 0.01) == expected


def test_a_slow_down_of_two_percent_is_found_among_noise_of_ten():
    def ratios(slower: float, seed: int) -> list[float]:
        draw = random.Random(seed)
        return [slower * draw.lognormvariate(0, 0.1) for _ in range(2000)]

    assert [verdict(interval(ratios(1.03, s)), 0.01) for s in range(10)].count(1) == 10
    assert [verdict(interval(ratios(1.00, s)), 0.01) for s in range(10)].count(1) == 0


def test_kinds_differ_only_in_what_they_compare():
    (absent, absent_env), (installed, installed_env) = check_serving.KINDS["absent"], check_serving.KINDS["installed"]
    assert absent == installed and absent_env and not installed_env
    assert check_serving.KINDS["off"][0][:-1] == check_serving.KINDS["inf"][0][:-3]


def test_without_macs_a_scheduler_process_has_no_hook_at_all():
    """So the installed plugin cannot cost anything there: every function is SGLang's own."""
    env = {**os.environ, **environment(ranks=1)}
    env.pop("SGLANG_MACS_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-c", SCHEDULER_WITHOUT_MACS], env=env, capture_output=True, text=True, check=True
    )
    assert "hooks: [] []" in done.stdout


def test_requests_are_made_once_for_all_servers(tmp_path, monkeypatch):
    made = []
    serving = types.ModuleType("sglang.benchmark.serving")
    serving.get_dataset = lambda args, tokenizer: made.append(args.seed) or [args.seed, len(made)]
    monkeypatch.setitem(sys.modules, "sglang.benchmark", types.SimpleNamespace(serving=serving))
    bench_forks.keep_requests(tmp_path)
    ask = [argparse.Namespace(seed=seed, base_url=url, output_file=url) for seed in (1, 2) for url in "ab"]
    assert [serving.get_dataset(args, None) for args in ask] == [[1, 1], [1, 1], [2, 2], [2, 2]]


def test_repeated_requests_are_the_same_in_every_run_and_no_prefix_is_dropped():
    def arguments(seed: int, **options) -> list[str]:
        return check_serving.bench_arguments("u", "m", check_serving.Workload(**options), Path("o"), seed)

    assert arguments(3, repeated=True) == arguments(4, repeated=True) and "--flush-cache" in arguments(3)
    assert arguments(3) != arguments(4) and "--flush-cache" not in arguments(3, repeated=True)


@pytest.mark.nightly
@pytest.mark.server
def test_one_server_against_itself(vl_model, server_log, capsys):
    """SGLang as it is, with the plugin installed and not asked for: requests and bench_serving both get through."""
    args, env = check_serving.KINDS["installed"]
    with Server(vl_model, args, env=env, log=server_log) as server:
        same = ["--urls", server.url, server.url, "--model", str(vl_model)]
        assert check_serving.main([*same, "--pairs", "6"]) == 0
        assert "over 6 pairs" in capsys.readouterr().out
        assert check_serving.main([*same, "--measure", "bench", "--rounds", "1", "--prompts", "2"]) == 0
        printed = capsys.readouterr().out
    assert all(metric in printed for metric in check_serving.METRICS)
    assert not [word for word in args if "macs" in word]
