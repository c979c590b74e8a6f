"""Loads that a study takes from a server, a trace or SGLang's own recorder: they are what was counted there."""

import json
import os

import numpy as np
import pytest
import torch

from sglang_macs import cli
from sglang_macs.cli import simulate_from
from sglang_macs.config import MacsConfig
from sglang_macs.errors import MacsError
from sglang_macs.observe.server_info import Server
from sglang_macs.observe.stats import Recount, Stats
from sglang_macs.simulate import loads
from tests.support import traces
from tests.support.info_server import answering, body

EXPERTS, RANKS = 8, 2
OBSERVE = MacsConfig.from_preset("observe")


def observed(batches: list[list[int]]) -> dict:
    """What /server_info has of a server that observes: two layers, rows of the group by expert."""
    counters = Stats(observed_passes=len(batches), observed_share=len(batches) / 3)
    for rows in batches:
        for layer in (3, 4):
            both = torch.tensor(rows if layer == 3 else rows[::-1]).expand(2, -1)
            counters.add_recount(Recount(OBSERVE, layer, RANKS, both, both, None))
    place = {"ep_size": RANKS, "answering": list(range(RANKS))}
    return json.loads(json.dumps(counters.snapshot())) | {"config": OBSERVE.to_json(), "ranks": place, "top_k": 2}


def at_infinite_gamma() -> list[dict]:
    state = observed([[1] * EXPERTS]) | {"config": MacsConfig.from_preset(gamma=float("inf")).to_json(), "demand": {}}
    rows = [[10 * i, i] for i in range(EXPERTS)]
    return [state | {"expert_rows": {"3": rows, "4": rows}}, state | {"expert_rows": {"3": rows}}]


def test_an_observing_server_s_loads_are_its_rows_by_expert():
    batches = [[9, 9, 9, 9, 1, 1, 1, 1], [1, 1, 1, 1, 9, 9, 9, 9]]  # even in sum, 1.8 of the mean one by one
    with answering(body([observed(batches)])) as url:
        found = simulate_from.of_server(Server(url))
    assert found.top_k == 2 and found.rows.shape == (2, 1, 2, EXPERTS)
    assert np.allclose(found.rows[0, 0].sum(axis=0), 10)
    assert np.allclose(found.rows[0, 0, 0], 5)  # R_v of 1/3 with visual tokens at half weight: half of the tokens
    even = simulate_from._of_states([observed([[5] * EXPERTS])], "").noise
    assert even == 0 and found.noise > 0.5


def test_at_infinite_gamma_modalities_are_told_apart():
    found = simulate_from._of_states(at_infinite_gamma(), "")
    assert found.rows[0, 0].tolist() == [[20 * i for i in range(EXPERTS)], [2 * i for i in range(EXPERTS)]]
    assert found.rows[1, 0, 1].tolist() == list(range(EXPERTS))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"demand": {}}, "by rank alone.*set http.*--gamma inf"),
        ({"layers": {}}, "without a measured"),
        ({"demand": {"3": "many"}}, "counters of MACS"),
        ({"demand": {"3": [-1] * 8, "4": [1] * 8}}, "rows beyond"),
        ({"top_k": None}, "counters of MACS"),
        ({"top_k": 99}, "top-99 of 8"),
        ({"ranks": {"ep_size": 4, "answering": [0]}}, "1 of 4 ranks"),
    ],
    ids=str,
)
def test_a_server_without_loads_is_refused_in_one_line(change, got):
    with answering(body([observed([[1, 2, 3, 4, 5, 6, 7, 8]]) | change])) as url, pytest.raises(MacsError, match=got):
        simulate_from.of_server(Server(url))


def test_a_trace_s_passes_are_batches(tmp_path):
    plans = traces.record(tmp_path, passes=3, gamma=1.0)
    found = simulate_from.of_trace(str(tmp_path))
    assert found.rows.shape[1] == 3 and found.noise == 0
    for batch, layers in enumerate(plans):
        for layer, of_ranks in enumerate(layers):
            counts = sum(plan.counts[:2].sum(dim=0) for plan in of_ranks)  # kept and clipped, [E, 2]
            assert found.rows[layer, batch].tolist() == counts.t().tolist()


def dumped(path, counts: torch.Tensor) -> str:
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)
    return str(path)


def test_sglang_s_dump_is_its_passes(tmp_path):
    counts = torch.randint(1, 50, (4, 3, EXPERTS), dtype=torch.int32)
    counts[:, 1] = 0  # a layer without experts
    counts[2] = 0  # of the buffer, a pass that did not run
    found = simulate_from.of_dump(dumped(tmp_path / "a.pt", counts), 0.25, 4)
    assert found.rows.shape == (2, 3, 2, EXPERTS) and found.top_k == 4
    assert np.allclose(found.rows[1, 2].sum(axis=0), counts[3, 2]) and np.allclose(
        found.rows[1, 2, 0] * 3, found.rows[1, 2, 1]
    )


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", ["pickle", "text", "other", "flat", "gone"])
def test_a_file_that_is_no_dump_is_refused_in_one_line_and_nothing_in_it_is_run(tmp_path, content):
    path, ran = tmp_path / "a.pt", tmp_path / "ran"
    if content == "pickle":
        torch.save({"logical_count": _Runs(str(ran))}, path)
    elif content == "text":
        path.write_text("no dump")
    elif content == "other":
        torch.save([1], path)
    elif content == "flat":
        dumped(path, torch.ones(3, 4))
    with pytest.raises(MacsError, match="expert distribution recorder") as caught:
        simulate_from.of_dump(str(path), 0.5, 2)
    assert not ran.exists() and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def test_the_spread_between_batches_is_found_again():
    rng = np.random.default_rng(1)
    rows = rng.integers(50, 100, (6, 64)).astype(float)
    for spread in (0.2, 0.6):
        batches = rows * rng.gamma(1 / spread**2, spread**2, (400, *rows.shape))
        uneven = loads.max_over_mean(batches, 8).mean(axis=0)
        assert loads.noise_of(rows, 8, uneven) == pytest.approx(spread, abs=0.06)


def test_the_command_studies_them(tmp_path, capsys):
    counts = torch.randint(1, 50, (4, 48, 128), dtype=torch.int32)
    arguments = ["simulate", "--ep", "8", "--presets", "rank", "--gamma", "1.1", "--batches", "4", "--json"]
    assert cli.main([*arguments, "--from", dumped(tmp_path / "a.pt", counts)]) == 0
    first = json.loads(capsys.readouterr().out)
    with answering(body([observed([list(range(128))]) | {"top_k": 8}])) as url:
        assert cli.main([*arguments, "--from", url]) == 0
    assert "a.pt, 4 passes" in json.dumps(first) and url in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--from", "x.pt", "--loads", "y.json"])
    assert cli.main([*arguments, "--from", str(tmp_path / "nothing")]) == 2
