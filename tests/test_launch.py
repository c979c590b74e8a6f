"""Launches that must not become a server: each ends with one line and a non-zero exit, and says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_macs import profile
from sglang_macs.cpu_compat import environment
from sglang_macs.profile import Profile

pytestmark = pytest.mark.server
HERE = Path(__file__).resolve().parent
EP2 = ["--device", "cpu", "--tp", "2", "--ep-size", "2"]
MACS = ["--moe-a2a-backend", "macs"]


def env(**extra: str) -> dict[str, str]:
    return {**os.environ, **environment(ranks=2), "HF_HUB_OFFLINE": "1", **extra}


# name -> (arguments after the model, what the line must contain)
REFUSED = {
    "gamma 0": ([*MACS, "--macs-gamma", "0"], "--macs-gamma: got 0.0, expected"),
    "gamma nan": ([*MACS, "--macs-gamma", "nan"], "--macs-gamma: got nan, expected"),
    "gamma -1": ([*MACS, "--macs-gamma", "-1"], "--macs-gamma: got -1.0, expected"),
    "rho 2": ([*MACS, "--macs-rho", "2"], "--macs-rho: got 2.0, expected"),
    "preset": ([*MACS, "--macs-preset", "fast"], "--macs-preset: got 'fast', expected"),
    "profile missing": ([*MACS, "--macs-profile", "/nowhere/p.json"], "--macs-profile: got /nowhere/p.json"),
    "profile truncated": ([*MACS, "--macs-profile", "TRUNCATED"], "truncated"),
    "profile foreign": ([*MACS, "--macs-profile", "FOREIGN"], "expected one of Qwen3VLMoeForConditionalGeneration"),
    "backend": (["--enable-macs", "--moe-a2a-backend", "mooncake"], "--moe-a2a-backend: got 'mooncake', expected"),
    "no backend": (["--enable-macs"], "--moe-a2a-backend: got 'none', expected"),
    "no --enable-macs": (["--macs-gamma", "1.0"], "--macs-gamma: got no --enable-macs"),
    "one rank": ([*MACS, "--tp", "1", "--ep-size", "1"], "expert parallelism: got one rank"),
    "dense model": ([*MACS, "--model-path", "DENSE"], "which has no experts"),
    "llama 4": ([*MACS, "--model-path", "LLAMA4"], "Llama4ForConditionalGeneration"),
    "eplb": ([*MACS, "--ep-num-redundant-experts", "2"], "replicated experts"),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory, vl_model) -> dict[str, dict]:
    """Every refused launch and some that are taken, in one process."""
    folder = tmp_path_factory.mktemp("launch")
    foreign, truncated = folder / "foreign.json", folder / "truncated.json"
    profile.save(Profile("SomeOtherModel", 4, {0: [0, 0, 0, 0]}), str(foreign))
    truncated.write_text(foreign.read_text()[:-30])
    words = {"FOREIGN": str(foreign), "TRUNCATED": str(truncated)}
    for name, changes in {
        "DENSE": {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"},
        "LLAMA4": {"architectures": ["Llama4ForConditionalGeneration"]},
    }.items():
        words[name] = str(changed_model(folder / name, Path(vl_model), changes))
    cases = {name: arguments for name, (arguments, _) in REFUSED.items()}
    cases |= {"taken": MACS, "alias": ["--enable-macs", "--moe-a2a-backend", "deepep"], "stock": []}
    argv = [["--model-path", str(vl_model), *EP2, *(words.get(a, a) for a in case)] for case in cases.values()]
    done = subprocess.run(
        [sys.executable, str(HERE / "launch_cases.py")],
        input=json.dumps(argv),
        env=env(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def changed_model(target: Path, source: Path, changes: dict) -> Path:
    """A checkpoint folder without weights whose config differs from `source`'s."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (target / file.name).write_text(file.read_text())
    config = json.loads((source / "config.json").read_text()) | changes
    if target.name == "DENSE":
        for key in [k for k in config["text_config"] if "expert" in k]:
            del config["text_config"][key]
        config["text_config"]["model_type"] = "qwen3_vl_text"
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line_and_exit_code_2(launches, name):
    result = launches[name]
    lines = [line for line in result["error"].splitlines() if line.startswith("sglang-macs:")]
    assert result["code"] == 2, result
    assert len(lines) == 1 and REFUSED[name][1] in lines[0], lines


def test_what_is_fine_is_taken(launches):
    for name in ("taken", "alias"):
        assert launches[name]["code"] is None, launches[name]["error"]
        assert launches[name]["backend"] == "customized"
        assert json.loads(launches[name]["config"])["preset"] == "rank"


def test_without_macs_nothing_changes(launches):
    assert launches["stock"] == {"code": None, "error": launches["stock"]["error"], "backend": "none", "config": None}


def launch_server(model, *arguments: str, **extra_env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *EP2, *arguments]
    return subprocess.run(
        [*command, "--host", "127.0.0.1", "--port", "19871", "--max-total-tokens", "2048"],
        env=env(**extra_env),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_real_command_ends_with_code_2(vl_model):
    done = launch_server(vl_model, *MACS, "--macs-gamma", "0")
    assert done.returncode == 2
    assert "sglang-macs: --macs-gamma: got 0.0, expected a number above 0" in done.stderr
    assert "Traceback" not in done.stderr


UNHOOKED = """
import argparse
from sglang_macs import plugin
parser = argparse.ArgumentParser()
parser.add_argument("--moe-a2a-backend", choices=["none", "deepep"])
plugin._add_cli_args(None, parser)
parser.parse_args(["--enable-macs", "--moe-a2a-backend", "deepep"])
"""


def test_the_switch_alone_without_the_other_hooks_ends_the_launch():
    """Flags that parse, but hooks that nobody applied: SGLang would serve on, without MACS."""
    done = subprocess.run([sys.executable, "-c", UNHOOKED], env=env(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sglang-macs: hook on sglang.srt.server_args.ServerArgs.add_cli_args did not take" in done.stderr


BREAK = """
import importlib.abc, importlib.util, sys

class Breaker(importlib.abc.MetaPathFinder):
    '''Takes a method out of SGLang as a new release might.'''
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            owner = getattr(module, {owner!r})
            setattr(owner, {method!r} + "_renamed", owner.__dict__[{method!r}])
            delattr(owner, {method!r})
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Breaker())
"""
TARGETS = {
    "scheduler": ("sglang.srt.model_executor.model_runner", "ModelRunner", "forward"),
    "launcher": ("sglang.srt.entrypoints.engine", "Engine", "_launch_scheduler_processes"),
}


@pytest.mark.parametrize("side", TARGETS)
def test_a_hook_target_that_is_gone_ends_the_launch(tmp_path, vl_model, side):
    module, owner, method = TARGETS[side]
    (tmp_path / "sitecustomize.py").write_text(BREAK.format(module=module, owner=owner, method=method))
    path = os.pathsep.join([environment(ranks=2)["PYTHONPATH"].split(os.pathsep)[0], str(tmp_path)])
    done = launch_server(vl_model, *MACS, PYTHONPATH=path)
    output = done.stdout + done.stderr
    assert done.returncode not in (0, None)
    assert f"sglang-macs: hook target {module}.{owner}.{method} is gone" in output, output[-3000:]
    assert "Uvicorn running" not in output
