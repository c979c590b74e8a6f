"""The quality study in the form that all result files share, and what the committed one has to say."""

import json
import sys
from pathlib import Path

import lab_result

from sglang_macs.config import MacsConfig

ROOT = Path(__file__).resolve().parent.parent


def measured(method: str, bound: float | None, read: float, kept: float) -> dict:
    accuracy = {"read": [read, read - 0.1, read + 0.1], "add": [0.0, 0.0, 0.0]}
    return {
        "method": method,
        "bound": bound,
        "accuracy": accuracy,
        "kept": [kept, kept - 0.01, kept + 0.01],
        "share": {"clipped": 0.2},
    }


def test_rows_are_relative_to_the_unclipped_model_and_leave_out_what_it_has_not_learned():
    rows = [measured("unclipped", None, 0.8, 1.0), measured("gate", 1.05, 0.4, 0.9)]
    found = lab_result.rows({"seeds": [0, 1, 2], "main": {"rows": rows, "mastered": ["read"]}})
    common = {"policy": "gate", "bound": 1.05, "clipped": 0.2, "seeds": 3}
    assert found == [
        {**common, "task": "mean", "relative_accuracy": 0.9, "ci95": [0.89, 0.91]},
        {**common, "task": "read", "relative_accuracy": 0.5, "ci95": [0.375, 0.625]},
    ]


def test_a_header_names_no_folder_of_whoever_ran_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--reduced", "--out", "here/q.json", "--seeds", "2"])
    assert lab_result.header("cpu")["command"] == "python3 scripts/lab/evaluate.py --reduced --seeds 2"


def test_the_reduced_study_takes_less_than_20_minutes_and_agrees():
    """The divergence of the default is below that of every other rule, as in the full one."""
    result = json.loads((ROOT / "docs" / "results" / "quality_reduced.json").read_text())
    assert result["device"] == "cpu" and result["seconds"] < 1200
    kl = {row["method"]: row["kl"] for row in result["main"]["rows"] if row["bound"] == 1.05}
    for other in ("cai", "cai device", "cai image-first", "visual top-k", "entropy_gate", "paper", "random"):
        assert kl[MacsConfig.from_preset("rank").importance] < kl[other]


def test_the_committed_study_bears_the_default_out():
    result = json.loads((ROOT / "docs" / "results" / "quality.json").read_text())
    assert {"gpu", "commit", "command", "date"} <= result.keys()
    mean = {row["policy"]: row for row in result["rows"] if row["bound"] == 1.05 and row["task"] == "mean"}
    default = MacsConfig.from_preset("rank").importance
    assert mean[default]["relative_accuracy"] >= 0.997
    kl = {row["method"]: row["kl"] for row in result["main"]["rows"] if row["bound"] == 1.05}
    assert kl[default] <= 0.5 * kl["cai"]
    assert all(kl[default] < kl[other] for other in ("cai device", "cai image-first", "visual top-k", "paper"))
