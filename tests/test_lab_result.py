"""The quality study in the form that all result files share, and what the committed one has to say."""

import json
import sys
from pathlib import Path

from lab import lab_result
from sglang_macs.config import MacsConfig

ROOT = Path(__file__).resolve().parent.parent


def test_a_header_names_no_folder_of_whoever_ran_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--reduced", "--out", "here/q.json", "--seeds", "2"])
    assert lab_result.header("cpu")["command"] == "python3 -m lab.evaluate --reduced --seeds 2"


def test_the_reduced_study_takes_less_than_20_minutes_and_agrees():
    """The divergence of the default is below that of every other rule, as in the full one."""
    result = json.loads((ROOT / "docs" / "results" / "quality_reduced.json").read_text())
    assert result["device"] == "cpu" and result["seconds"] < 1200
    kl = {row["method"]: row["kl"] for row in result["main"]["rows"] if row["bound"] == 1.05}
    for other in ("cai", "cai device", "cai image-first", "visual top-k", "entropy_gate", "paper", "random"):
        assert kl[MacsConfig.from_preset("rank").importance] < kl[other]


def test_copies_of_experts_lose_less_at_equal_rows_of_the_fullest_rank():
    """From the mean up, in what is clipped and in the divergence of the answers."""
    result = json.loads((ROOT / "docs" / "results" / "quality_replicas.json").read_text())
    rows = result["replicas"]["rows"]
    for bound in (1.0, 1.05):
        of = {row["method"]: row for row in rows if row["bound"] == bound}
        assert all(row["max_rank_rows_after"]["worst"] <= bound + 1e-3 for row in of.values())
        for figure in (lambda row: row["share"]["clipped"], lambda row: row["kl"]):
            linear, placed, copies = (figure(of[name]) for name in ("gate", "gate, placed", "gate, 16 copies"))
            assert copies < placed < linear


def test_the_small_study_of_documents_holds_all_methods_to_the_same_rows():
    """On 8, 16 and 32 ranks, behind a router with biases and groups; what leaves each token an expert may miss
    the bound: a visual cut, and skipping where ranks have one expert each.
    """
    result = json.loads((ROOT / "docs" / "results" / "quality_documents_small_reduced.json").read_text())
    assert result["device"] == "cpu" and result["seconds"] < 1200 and result["architecture"]["groups"] > 1
    for part in ("main", "stress", "ep16", "ep32"):
        rows = [row for row in result[part]["rows"] if row["bound"] is not None]
        assert {"gate", "cai", "paper", "skipping", "skipping, one threshold", "gate x redundancy"} <= {
            row["method"] for row in rows
        }
        for row in rows:
            misses = ("visual top-k", "skipping, one threshold", *(["skipping"] if part == "ep32" else []))
            if row["bound"] >= 1.0 and row["method"] not in misses:
                assert row["max_rank_rows_after"]["worst"] <= row["bound"] + 1e-3, (part, row["method"])
    assert len(result["entropy"]["kl"]["entropy"]) == 5


def test_the_committed_study_bears_the_default_out():
    result = json.loads((ROOT / "docs" / "results" / "quality.json").read_text())
    assert {"gpu", "commit", "command", "date"} <= result.keys()
    default = MacsConfig.from_preset("rank").importance
    rows = {row["method"]: row for row in result["main"]["rows"] if row["bound"] == 1.05}
    assert rows[default]["kept"][0] >= 0.997
    kl = {method: row["kl"] for method, row in rows.items()}
    assert kl[default] <= 0.5 * kl["cai"]
    assert all(kl[default] < kl[other] for other in ("cai device", "cai image-first", "visual top-k", "paper"))
