"""What `simulate` says of a run of benchmarks/e2e/prefill.py."""

import json

import numpy as np
import pytest

from benchmarks.e2e import predicted
from benchmarks.e2e.servers import VARIANTS, Variant
from sglang_macs.simulate.loads import max_over_mean
from sglang_macs.simulate.machines import MACHINES

LAYERS, EXPERTS = 24, 128


def variant(name: str, dispatch: str = "bounded") -> Variant:
    return next(v for v in VARIANTS if (v.name, v.dispatch) == (name, dispatch))


def loads(rows: np.ndarray, ranks: int) -> np.ndarray:
    return rows.reshape(len(rows), ranks, -1).sum(-1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("skew", [1.0, 1.27])
def test_rows_are_routed_as_the_benchmark_routes_them(ranks, skew):
    rows = predicted.routed(LAYERS, skew, ranks, 1 << 20)
    of_rank = loads(rows, ranks)
    np.testing.assert_allclose(rows.sum(1), 1 << 20)
    np.testing.assert_allclose((of_rank.max(1) / of_rank.mean(1)).mean(), skew, rtol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("name", "largest"), [("rank-1.05", 1.05), ("rank-1.1", 1.1), ("replicas", 1.02), ("off", 9)])
def test_what_arrives_is_what_the_variant_leaves(ranks, name, largest):
    """With 32 copies, of each rank's first experts on as many other ranks, all ranks come near the mean load."""
    rows = predicted.routed(LAYERS, 1.27, ranks, 1 << 20)
    arrived, planned = predicted.of_variant(rows, variant(name), ranks)
    assert planned == (name != "off") and arrived.shape[1] == EXPERTS + variant(name).redundant
    np.testing.assert_allclose(arrived.sum(1), rows.sum(1))
    assert max_over_mean(arrived, ranks).max() <= largest + 1e-6


def test_measured_and_simulated_stand_side_by_side():
    case = {"tokens": 8192, "skew": 1.27, "dispatch": "bounded", "layers": LAYERS, "dtype": "bf16", "ranks": 2}
    named = {"off": 100.0, "balanced": 93.0, "rank-1.05": 96.0}
    result = {"rows": [{"case": {**case, "variant": name}, "pass_ms": ms} for name, ms in named.items()]}
    found = {case["variant"]: pair for case, *pair in predicted.compared(result, MACHINES["h200"])}
    assert set(found) == {"balanced", "rank-1.05"}, "off is what they are measured by"
    assert found["balanced"][0] == pytest.approx(0.93) and found["balanced"][1] < found["rank-1.05"][1] < 1


def test_a_file_without_off_has_nothing_to_compare(tmp_path, monkeypatch, capsys):
    (tmp_path / "e2e.json").write_text(json.dumps({"rows": []}))
    monkeypatch.setattr("sys.argv", ["predicted", str(tmp_path / "e2e.json")])
    assert predicted.main() == 1 and capsys.readouterr().out.count("\n") == 2
