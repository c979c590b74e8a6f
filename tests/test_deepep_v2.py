"""DeepEP V2 under the plan: SGLang's own implementation over a buffer among threads, and which launches are taken."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch import bounded_v2
from sglang_macs.dispatch.bounded import Sizes
from sglang_macs.engine import compat, dispatch_choice
from sglang_macs.engine.launch import Launch
from sglang_macs.errors import MacsError

ROOT = Path(__file__).resolve().parent.parent
needs_v2 = pytest.mark.skipif(not compat.has_v2(version("sglang")), reason="a V2 that is refused")
TOKENS = (0, 5, 70)  # of tests/support/v2_program.py


@cache
def found() -> dict:
    """What the program says, by way; in a process of its own, since what is registered with SGLang stays."""
    env = {**os.environ, **environment(1)}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(ROOT)])
    command = [sys.executable, str(ROOT / "tests" / "support" / "v2_program.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0])


@needs_v2
def test_unequal_ranks_get_their_rows_without_a_count() -> None:
    """One rank idle, tokens of no expert at all: outputs are right, and only planned rows arrive."""
    result = found()["bounded"]
    assert result["received"] == result["planned"]
    for rank, tokens in zip(result["ranks"], TOKENS, strict=True):
        assert (rank["calls"], rank["bounded"], rank["rows"]) == ([False], 1, result["bound"])
        assert rank["shape"] == [tokens, 256] and rank["error"] < 0.01  # NaN, had a row been read that nobody wrote


@needs_v2
def test_what_has_no_bound_is_counted_as_sglang_does() -> None:
    """With its row of zeros for the idle rank, which comes behind the plan: one for each of the first experts."""
    result = found()["counted"]
    assert result["received"] == [result["planned"][0] + 3, *result["planned"][1:]]
    for rank, tokens in zip(result["ranks"], TOKENS, strict=True):
        assert (rank["calls"], rank["bounded"], rank["shape"]) == ([True], 0, [tokens, 256])
        assert rank["error"] < 0.01


@needs_v2
def test_decode_stays_sglangs_own() -> None:
    result = found()["decode"]
    assert all(rank["masked"] and not rank["bounded"] and rank["rows"] > result["bound"] for rank in result["ranks"])
    assert result["received"] == result["planned"]


def test_the_worst_case_decides_whether_prefills_are_counted() -> None:
    """Two ranks of a 30B model fit, sixteen with 8,192 tokens each take 4 GB a layer."""
    assert bounded_v2.capacity(Sizes(16, 128, 8, 2048), 8192) == 1048576 + 8 * 127
    planner = SimpleNamespace(attn_tp=(0, 1))
    for sizes, tokens, too_large in ((Sizes(2, 128, 8, 2048), 16384, False), (Sizes(16, 128, 8, 2048), 8192, True)):
        impl = SimpleNamespace(num_max_dispatch_tokens_per_rank=tokens, dispatch=None, _get_buffer=None)
        shared = SimpleNamespace(join=lambda *given: None)
        one = bounded_v2.BoundedV2(impl, shared, planner, sizes, lambda: True, tuple)
        assert one._is_too_large() == too_large


# ---- Launches --------------------------------------------------------------------------------------------------------


def launch(quantization: str | None = None, options: dict | None = None, **flags) -> Launch:
    plain = {"tp_size": 2, "ep_size": 2, "device": "cuda", "moe_a2a_backend": "deepep_v2", "deepep_mode": "auto"}
    config = MacsConfig.from_preset("rank", **(options or {}))
    flags = SimpleNamespace(**{**plain, **flags})
    return Launch(flags, config, "Qwen3VLMoeForConditionalGeneration", 16, quantization=quantization)


def test_what_a_server_has_run_is_taken() -> None:
    compat.check(launch())
    compat.check(launch(deepep_v2_mode="direct", dp_size=2, enable_dp_attention=True))


@pytest.mark.parametrize(
    ("given", "why"), [({"deepep_v2_mode": "hybrid"}, "in hybrid mode"), ({"quantization": "fp8"}, "with FP8 blocks")]
)
def test_what_no_server_has_run_is_for_those_who_ask_for_it(monkeypatch, given, why) -> None:
    with pytest.raises(MacsError, match=rf"{why}, which no server has run.*MACS_EXPERIMENTAL=v2 tries"):
        compat.check(launch(**given))
    monkeypatch.setenv("MACS_EXPERIMENTAL", "v2")
    compat.check(launch(**given))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"device": "cpu"}, "on the CPU"),
        ({"nnodes": 2}, "between hosts"),
        ({"quantization": "mxfp8"}, "with mxfp8 experts"),
        ({"options": {"decode": True}}, "with --macs-decode true"),
        ({"options": {"dispatch": "fused"}}, "with --macs-dispatch fused"),
        ({"speculative_algorithm": "EAGLE"}, "with speculative decoding"),
    ],
    ids=str,
)
def test_everything_else_is_refused_in_one_line(given, why) -> None:
    rule = next(rule for rule in compat.RULES if rule.what == "--moe-a2a-backend deepep_v2")
    assert rule.refuses(launch(**given)) == why
    assert not rule.refuses(launch(**{**given, "moe_a2a_backend": "deepep"}))


def test_auto_is_the_bounded_dispatch_under_v2() -> None:
    assert dispatch_choice.resolved(launch(options={"dispatch": "auto"}))[0].dispatch == "bounded"
    deterministic = launch(options={"dispatch": "auto"}, enable_deterministic_inference=True)
    assert dispatch_choice.resolved(deterministic)[0].dispatch == "deepep"


@pytest.mark.parametrize("release", ["0.5.21", "0.5.22", "0.5.22.post1"])
def test_v2_of_an_earlier_release_is_refused_by_name(monkeypatch, release) -> None:
    """Asked for or not."""
    monkeypatch.setattr(compat, "version", lambda name: release)
    monkeypatch.setenv("MACS_EXPERIMENTAL", "v2")
    with pytest.raises(MacsError, match=rf"deepep_v2 of sglang {release}, expected V2 of sglang 0.5.23 or later"):
        compat.check_a2a("deepep_v2")
    compat.check_a2a("macs")


@pytest.mark.parametrize("release", ["0.5.23", "0.5.23.post1", "0.5.210", "0.6.0"])
def test_v2_of_a_later_release_is_taken(monkeypatch, release) -> None:
    monkeypatch.setattr(compat, "version", lambda name: release)
    compat.check_a2a("deepep_v2")
