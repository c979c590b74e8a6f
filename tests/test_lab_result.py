"""The quality study in the form that all result files share, and what the committed one has to say."""

import json
import sys
from pathlib import Path

import lab_result

from sglang_macs.config import MacsConfig

ROOT = Path(__file__).resolve().parent.parent


def test_a_header_names_no_folder_of_whoever_ran_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--reduced", "--out", "here/q.json", "--seeds", "2"])
    assert lab_result.header("cpu")["command"] == "python3 lab/evaluate.py --reduced --seeds 2"


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
    default = MacsConfig.from_preset("rank").importance
    rows = {row["method"]: row for row in result["main"]["rows"] if row["bound"] == 1.05}
    assert rows[default]["kept"][0] >= 0.997
    kl = {method: row["kl"] for method, row in rows.items()}
    assert kl[default] <= 0.5 * kl["cai"]
    assert all(kl[default] < kl[other] for other in ("cai device", "cai image-first", "visual top-k", "paper"))
