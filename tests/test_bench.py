"""benchmarks/bench_plan.py runs, and times only versions that decide alike. Speed is `make bench`'s business."""

import json
import re

import pytest
import torch

from benchmarks import bench_plan
from sglang_macs import ops
from sglang_macs.config import MacsConfig

CONFIG = MacsConfig.from_preset("rank", gamma=1.05, reroute="none")


def test_it_writes_both_rows_beside_torch(monkeypatch, capsys):
    monkeypatch.setattr(bench_plan.sys, "argv", ["bench_plan.py", "--json", "--repeats", "1"])
    assert not bench_plan.main()
    rows = {row["op"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows.keys() == {"score", "plan"}
    assert rows["score"]["case"] == {"T": 8192, "H": 2048, "E": 128, "K": 8, "R": 8, "dtype": "bf16"}
    for op, row in rows.items():
        assert row["against"] == f"torch_{op}" and row["ratio"] == row["median_us"] / row["against_us"] > 0


def test_what_is_compared_agrees_with_torch():
    x = bench_plan.inputs(seed=1, tokens=256)
    bench_plan.check_equal(CONFIG, x)
    entropy = bench_plan.torch_score(x["hidden"], x["segment"])
    torch.testing.assert_close(ops.entropy_score(x["hidden"], x["segment"]), entropy, rtol=1e-4, atol=1e-4)


def test_an_importance_is_timed_beside_the_gate(monkeypatch, capsys):
    name = "tests.test_bench:first_slot"
    monkeypatch.setattr(bench_plan.sys, "argv", ["bench_plan.py", "--importance", name, "--repeats", "1"])
    assert not bench_plan.main()
    assert re.fullmatch(
        r"2048 tokens, .* by the gate .* ms, .*, by tests.test_bench:first_slot .* in it\)\n", capsys.readouterr().out
    )


def first_slot(tokens):
    return tokens.topk_weights[:, 0]


def test_versions_that_differ_end_the_run(monkeypatch):
    x = bench_plan.inputs(seed=1, tokens=256)
    monkeypatch.setattr(bench_plan, "torch_clip", lambda config, x, weight: x["ids"] >= 0)  # keeps everything
    with pytest.raises(SystemExit, match="the versions differ in"):
        bench_plan.check_equal(CONFIG, x)
