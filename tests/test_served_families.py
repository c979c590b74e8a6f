"""Which models are served, and that what is named as evidence is there."""

import json
from importlib import util
from pathlib import Path

import pytest

from benchmarks.gpu.gpu_launches import LAUNCHES
from sglang_macs.engine import families
from sglang_macs.engine.families import SERVED, does_not_fit, untested

ROOT = Path(__file__).resolve().parent.parent


def recorded() -> dict[str, list[dict]]:
    """By launch, the runs of every result of benchmarks/gpu/serve_check.py in docs/results."""
    found: dict[str, list[dict]] = {}
    for file in sorted((ROOT / "docs" / "results").glob("serve_*.json")):
        by_launch: dict[str, dict] = {}
        for row in json.loads(file.read_text())["rows"]:
            by_launch.setdefault(row["case"].get("launch", ""), {})[row["case"]["gamma"]] = row
        for launch, runs in by_launch.items():
            found.setdefault(launch, []).append(runs)
    return found


def is_faultless(runs: dict[str, dict]) -> bool:
    """Equal tokens without a bound, every bound kept and something clipped at 1.0."""
    if set(runs) != {"off", "inf", "1.0"} or any("error" in run for run in runs.values()):
        return False
    states = [state for run in ("inf", "1.0") for state in runs[run]["states"]]
    kept = all(
        state["planned"] and not state["misaligned"] and not any(state["violations"].values()) for state in states
    )
    clipped = sum(state["own"]["clipped_visual"] + state["own"]["clipped_text"] for state in runs["1.0"]["states"])
    return kept and clipped > 0 and runs["off"]["tokens"] == runs["inf"]["tokens"]


@pytest.mark.parametrize("architecture", SERVED)
def test_a_family_on_gpus_names_launches_of_its_own_that_are_recorded_without_a_fault(architecture):
    kinds = {LAUNCHES[launch].kind for launch in SERVED[architecture].gpu}
    assert len(kinds) <= 1
    for launch in SERVED[architecture].gpu:
        assert any(is_faultless(runs) for runs in recorded()[launch]), launch


def test_families_on_cpus_name_tests_that_are_there():
    assert all((ROOT / served.cpu).is_file() for served in SERVED.values() if served.cpu)


def test_sglang_has_every_architecture_by_that_name():
    models = Path(util.find_spec("sglang").origin).parent / "srt" / "models"
    classes = "".join(file.read_text() for file in models.rglob("*.py"))
    assert [name for name in SERVED if f"class {name}(" not in classes] == []
    assert [prefix for prefix in families.REFUSED if f"class {prefix}" not in classes] == []


def test_a_language_model_inside_counts_where_the_class_goes_by_it():
    assert "GptOssForCausalLM: SGLang has not" in does_not_fit("InternVLChatModel", "GptOssForCausalLM")
    assert untested("InternVLChatModel", "Qwen3MoeForCausalLM", "cpu") == ""
    assert untested("InternVLChatModel", "DeepseekV2ForCausalLM", "cpu") == "DeepseekV2ForCausalLM"
    # A name in a text configuration that the class does not look at.
    assert does_not_fit("Glm4vMoeForConditionalGeneration", "Llama4ForCausalLM") == ""
    assert untested("Glm4vMoeForConditionalGeneration", "Glm4MoeForCausalLM", "cpu") == ""


def test_a_device_on_which_nobody_served_a_family_is_named(monkeypatch):
    monkeypatch.setitem(SERVED, "A", families.Served("a", "tests/test_a.py"))
    monkeypatch.setitem(SERVED, "B", families.Served("b", "", gpu=("a launch",)))
    assert [untested(name, "", device) for name in "AB" for device in ("cpu", "cuda")] == [
        "",
        "A on a GPU",
        "B on a CPU",
        "",
    ]
