"""Launches that must not become a server: each ends with one line and a non-zero exit, and says what to do."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import HOST, reserve_port
from sglang_macs import config
from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.plan import profile
from sglang_macs.plan.profile import Profile
from tests.support import model_configs
from tests.support.broken_sglang import BREAK

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
    "importance missing": (
        [*MACS, "--macs-importance", "nowhere_at_all:score"],
        "got no module nowhere_at_all, expected",
    ),
    "importance unknown": (
        [*MACS, "--macs-importance", "norm"],
        "--macs-importance: got 'norm', expected one of entropy",
    ),
    "profile missing": ([*MACS, "--macs-profile", "/nowhere/p.json"], "--macs-profile: got /nowhere/p.json"),
    "profile truncated": ([*MACS, "--macs-profile", "TRUNCATED"], "truncated"),
    "profile foreign": ([*MACS, "--macs-profile", "FOREIGN"], "expected one of Qwen3VLMoeForConditionalGeneration"),
    "backend": (["--enable-macs", "--moe-a2a-backend", "mooncake"], "--moe-a2a-backend: got 'mooncake', expected"),
    "no backend": (["--enable-macs"], "--moe-a2a-backend: got 'none', expected"),
    "no --enable-macs": (["--macs-gamma", "1.0"], "--macs-gamma: got no --enable-macs"),
    "one rank": ([*MACS, "--tp", "1", "--ep-size", "1"], "expert parallelism: got one rank"),
    "dense model": ([*MACS, "--model-path", "DENSE"], "which has no experts"),
    "llama 4": ([*MACS, "--model-path", "LLAMA4"], "Llama4ForConditionalGeneration"),
    "replicas, scope expert": (
        [*MACS, "--macs-preset", "paper", "--ep-num-redundant-experts", "2"],
        "--macs-replicas: got --macs-scope expert",
    ),
    "profile without a layer": ([*MACS, "--macs-profile", "SHORT"], "--macs-profile: got no layer 2"),
    "ray": ([*MACS, "--use-ray"], "--use-ray: got Ray actors"),
    "grpc": ([*MACS, "--smg-grpc-mode"], "--smg-grpc-mode: got a gRPC server"),
    "routed experts": ([*MACS, "--enable-return-routed-experts"], "--enable-return-routed-experts: got experts noted"),
    "dispatch algorithm": ([*MACS, "--ep-dispatch-algorithm", "fake"], "--ep-dispatch-algorithm: got fake"),
    "two batches on CPU": ([*MACS, "--enable-two-batch-overlap"], "--enable-two-batch-overlap on the CPU"),
    "one batch on CPU": ([*MACS, "--enable-single-batch-overlap"], "--enable-single-batch-overlap on the CPU"),
    "chunk": ([*MACS, "--chunked-prefill-size", "8388608"], "got 8388608 tokens a prefill batch (1 x 8388608)"),
    "chunk of paper": ([*MACS, "--macs-preset", "paper", "--chunked-prefill-size", "2097152"], "got 2097152 tokens"),
}
TAKEN = {
    "taken": MACS,
    "importance": [*MACS, "--macs-importance", "json:dumps"],  # any module that is there
    "replicas": [*MACS, "--ep-num-redundant-experts", "2", "--ep-dispatch-algorithm", "static"],
    "alias": ["--enable-macs", "--moe-a2a-backend", "deepep"],
    "chunk of 2M": [*MACS, "--chunked-prefill-size", "2097152"],
    "routed experts, off": [*MACS, "--macs-preset", "off", "--enable-return-routed-experts"],
}
# One value for every field of MacsConfig, none of them the default; then those that files and keywords write in ways
# of their own. Each is given on the command line, in a --config file and to Engine(...).
EVERY_FIELD = {"preset": "paper", "gamma": 1.05, "scope": "expert", "load": "effective", "importance": "entropy_gate"}
EVERY_FIELD |= {"reroute": "none", "reroute_rounds": 2, "exchange": "local", "delta": 0.5, "rho": 0.25, "alpha": 2.0}
EVERY_FIELD |= {"c_min": 3.0, "entropy_scope": "image", "protect_text": False, "min_tokens": 7, "decode": True}
EVERY_FIELD |= {"buckets": 64, "profile": "PROFILE", "verify": True, "trace": "/t", "trace_limit_mb": 8.0}
EVERY_FIELD |= {"dispatch": "auto", "all_reduce": "auto", "verify_every": 5, "act": "auto", "act_rows": 9}
EVERY_FIELD |= {"layer_graphs": False, "replicas": "keep", "exempt": False}
EVERY_FIELD |= {"cache": "exact"}
OPTIONS = {"every field": EVERY_FIELD, "infinity": {"gamma": float("inf")}, "off": {"preset": "off"}, "none": {}}
FILES = {  # name -> (lines of a --config file, what the record carries; None: no MACS)
    "file, enable-macs": ("enable-macs: true\nmoe-a2a-backend: deepep\nmacs-gamma: 1.25", {"gamma": 1.25}),
    "file, enable-macs false": ("enable-macs: false", None),
    "file, inf": ("moe-a2a-backend: macs\nmacs-gamma: inf", {"gamma": "inf"}),
    "file, .inf": ("moe-a2a-backend: macs\nmacs-gamma: .inf", {"gamma": "inf"}),
    "file, off": ("moe-a2a-backend: macs\nmacs-preset: off", {"preset": "off", "gamma": "inf"}),
    "file, null": ("moe-a2a-backend: macs\nmacs-profile: null", {"profile": None}),
    "file, false": ("moe-a2a-backend: macs\nmacs-protect-text: false", {"protect_text": False}),
}
ENGINE = {"device": "cpu", "tp_size": 2, "ep_size": 2}
ENGINES = {  # name -> (keyword arguments, what the exception must contain)
    "engine, no enable_macs": ({"macs_gamma": 1.0}, "--macs-gamma: got no --enable-macs"),
    "engine, misspelt": ({"moe_a2a_backend": "macs", "macs_gama": 1.0}, "MACS option: got gama"),
    "engine, not a number": ({"moe_a2a_backend": "macs", "macs_gamma": "wide"}, "--macs-gamma: got 'wide'"),
    "engine, range": ({"moe_a2a_backend": "macs", "macs_gamma": 0}, "--macs-gamma: got 0.0"),
    "engine, backend": ({"enable_macs": True, "moe_a2a_backend": "mooncake"}, "--moe-a2a-backend: got 'mooncake'"),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory, vl_model) -> dict[str, dict]:
    """Every refused launch and every one that is taken, in one process."""
    folder = tmp_path_factory.mktemp("launch")
    words = words_of(folder, Path(vl_model))
    model = ["--model-path", str(vl_model)]
    cases = {name: [*model, *EP2, *arguments] for name, (arguments, _) in REFUSED.items()}
    cases |= {name: [*model, *EP2, *arguments] for name, arguments in TAKEN.items()}
    cases |= {"stock": [*model, *EP2]}
    engine = {"model_path": str(vl_model), **ENGINE}
    for name, options in OPTIONS.items():
        flags = [text for field, value in options.items() for text in (config.flag(field), str(value))]
        cases[f"{name}, command line"] = [*model, *EP2, *MACS, *flags]
        lines = "".join(f"{config.flag(field)[2:]}: {json.dumps(value)}\n" for field, value in options.items())
        file = written(folder / f"{name}.yaml", "moe-a2a-backend: macs\n" + lines.replace("Infinity", ".inf"))
        cases[f"{name}, file"] = [*model, *EP2, "--config", file]
        keywords = {f"macs_{field}": value for field, value in options.items()}
        cases[f"{name}, engine"] = {**engine, "enable_macs": True, "moe_a2a_backend": "deepep", **keywords}
    for name, (lines, _) in FILES.items():
        cases[name] = [*model, *EP2, "--config", written(folder / f"{name}.yaml", lines)]
    cases |= {name: {**engine, **keywords} for name, (keywords, _) in ENGINES.items()}
    cases |= {"engine, stock": engine}
    refused = {name: values for name, (values, _) in model_configs.REFUSED.items()}
    for name, values in (model_configs.MODELS | model_configs.UNTESTED | refused).items():
        path = with_config(folder / name, Path(vl_model), values)
        cases[name] = ["--model-path", path, *EP2, *MACS]
        cases[f"{name}, no re-routing"] = [*cases[name], "--macs-reroute", "none"]
    replaced = [
        [words.get(x, x) for x in case] if isinstance(case, list) else {k: words.get(x, x) for k, x in case.items()}
        for case in cases.values()
    ]
    text = json.dumps(replaced).replace('"PROFILE"', json.dumps(words["PROFILE"]))
    done = subprocess.run(
        [sys.executable, str(HERE / "support" / "launch_cases.py")],
        input=text,
        env=env(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True)), "words": words}


def written(path: Path, text: str) -> str:
    path.write_text(text.replace("PROFILE", str(path.parent / "profile.json")))
    return str(path)


def words_of(folder: Path, model: Path) -> dict[str, str]:
    """What the upper-case words in the cases stand for."""
    words = {name: str(folder / f"{name.lower()}.json") for name in ("FOREIGN", "TRUNCATED", "SHORT", "PROFILE")}
    profile.save(Profile("SomeOtherModel", 4, {0: [0, 0, 0, 0]}), words["FOREIGN"])
    Path(words["TRUNCATED"]).write_text(Path(words["FOREIGN"]).read_text()[:-30])
    for name, layers in (("SHORT", 2), ("PROFILE", 3)):
        modality = {layer: [0] * 16 for layer in range(layers)}
        profile.save(Profile("Qwen3VLMoeForConditionalGeneration", 16, modality), words[name])
    for name, changes in {
        "DENSE": {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"},
        "LLAMA4": {"architectures": ["Llama4ForConditionalGeneration"]},
    }.items():
        words[name] = str(changed_model(folder / name, model, changes))
    return words


def with_config(target: Path, source: Path, values: dict) -> str:
    """A checkpoint folder of `source`'s tokenizer and these values as its config.json."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (target / file.name).write_text(file.read_text())
    (target / "config.json").write_text(json.dumps(values))
    return str(target)


def changed_model(target: Path, source: Path, changes: dict) -> Path:
    """A checkpoint folder without weights whose config differs from `source`'s."""
    values = json.loads((source / "config.json").read_text()) | changes
    if target.name == "DENSE":
        for key in [k for k in values["text_config"] if "expert" in k]:
            del values["text_config"][key]
        values["text_config"]["model_type"] = "qwen3_vl_text"
    with_config(target, source, values)
    return target


def our_lines(result: dict) -> list[str]:
    return [line for line in result["error"].splitlines() if line.startswith("sglang-macs:")]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line_and_exit_code_2(launches, name):
    result = launches[name]
    assert result["code"] == 2, result
    assert len(our_lines(result)) == 1 and REFUSED[name][1] in our_lines(result)[0], our_lines(result)


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_fine_is_taken(launches, name):
    result = launches[name]
    assert result["code"] is None, result["error"]
    assert result["backend"] == "customized"
    assert result["config"]["preset"] == ("off" if name.endswith("off") else "rank")


@pytest.mark.parametrize("name", ["stock", "engine, stock"])
def test_without_macs_nothing_changes(launches, name):
    result = launches[name]
    assert (result["code"], result["raised"], result["backend"], result["config"]) == (None, None, "none", None)


@pytest.mark.parametrize("way", ["command line", "file", "engine"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_the_same_on_the_command_line_in_a_file_and_in_an_engine(launches, name, way):
    wanted = MacsConfig.from_preset(**OPTIONS[name]).on("cpu").to_json()
    if name == "every field":
        assert OPTIONS[name].keys() == {f.name for f in dataclasses.fields(MacsConfig)}
        wanted["profile"] = launches["words"]["PROFILE"]
    result = launches[f"{name}, {way}"]
    assert result["config"] == wanted, result["error"][-500:] or result["raised"]
    assert result["backend"] == "customized"
    assert result["environment"] == (None if way == "engine" else wanted), "an engine leaves nothing behind"


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_may_write_values_as_yaml_does(launches, name):
    result, wanted = launches[name], FILES[name][1]
    assert (result["code"], result["raised"]) == (None, None), result["error"][-500:]
    carried = result["config"]
    assert (carried and {k: carried[k] for k in wanted}) == wanted


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_refused_by_an_exception_of_one_line(launches, name):
    raised = launches[name]["raised"]
    assert raised is not None and raised.startswith(f"MacsError: {ENGINES[name][1]}") and "\n" not in raised


@pytest.mark.parametrize("name", model_configs.MODELS)
def test_a_model_family_is_taken_with_and_without_re_routing(launches, name):
    for result in (launches[name], launches[f"{name}, no re-routing"]):
        assert (result["code"], result["raised"], result["backend"]) == (None, None, "customized"), result


@pytest.mark.parametrize("name", model_configs.UNTESTED)
def test_a_model_that_no_test_has_served_is_refused_and_named(launches, name):
    for result in (launches[name], launches[f"{name}, no re-routing"]):
        (line,) = our_lines(result)
        assert (
            result["code"] == 2 and f"model: got {model_configs.UNTESTED[name]['architectures'][0]}, expected" in line
        )


@pytest.mark.parametrize("name", model_configs.REFUSED)
def test_a_model_whose_layers_a_dispatch_does_not_fit_is_refused(launches, name):
    for result in (launches[name], launches[f"{name}, no re-routing"]):
        (line,) = our_lines(result)
        assert result["code"] == 2 and model_configs.REFUSED[name][1] in line


def launch_server(model, *arguments: str, **extra_env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *EP2, *arguments]
    port, reservation = reserve_port()
    with reservation:
        return subprocess.run(
            [*command, "--host", HOST, "--port", str(port), "--max-total-tokens", "2048"],
            env=env(**extra_env),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )


def test_the_real_command_ends_with_code_2(vl_model):
    done = launch_server(vl_model, *MACS, "--macs-gamma", "0")
    assert done.returncode == 2
    assert "sglang-macs: --macs-gamma: got 0.0, expected a number above 0" in done.stderr
    assert "Traceback" not in done.stderr


UNHOOKED = """
import argparse
from sglang_macs.engine import launcher
parser = argparse.ArgumentParser()
parser.add_argument("--moe-a2a-backend", choices=["none", "deepep"])
launcher._add_cli_args(None, parser)
parser.parse_args(["--enable-macs", "--moe-a2a-backend", "deepep"])
"""


def test_the_switch_alone_without_the_other_hooks_ends_the_launch():
    """Flags that parse, but hooks that nobody applied: SGLang would serve on, without MACS."""
    done = subprocess.run([sys.executable, "-c", UNHOOKED], env=env(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sglang-macs: hook on sglang.srt.server_args.ServerArgs.add_cli_args did not take" in done.stderr


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
