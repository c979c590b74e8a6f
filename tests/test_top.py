"""`sglang-macs top` draws what the counters say."""

import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from sglang_macs import cli, stats, top
from sglang_macs.config import MacsConfig

CONFIG = MacsConfig.from_preset("rank", gamma=1.25)


def state(rank: int) -> dict:
    """Counters of two dispatches on two ranks: 30 and 10 rows routed, 25 and 15 dispatched, in each."""
    counted = stats.Stats(dispatches=5, planned=2, plan_seconds=0.004, visual_share_sum=1.5)
    counted.skipped["decode"] = 3
    counted.fate = torch.tensor([[50, 20], [10, 0], [6, 0]])
    rows, cut = torch.tensor([[30, 10], [25, 15]]), torch.tensor([[1, 0, 0, 25], [-1, 0, 0, 25]])
    for _ in range(2):
        counted.add_recount(stats.Recount(CONFIG, 0, 2, rows, rows, cut))
    return {"version": "0", "rank": rank, "config": CONFIG.to_json(), **counted.snapshot()}


def test_a_frame_holds_the_figures():
    text = top.frame([state(0), state(1)], "since then")
    assert "gamma 1.25, 1 layers, since then" in text
    assert "planned 2   left alone: decode 3" in text
    assert "R_v 0.75   plan 2.00 ms" in text
    assert "1.500 -> 1.250; a bound cut in 100%" in text
    rank0 = next(line for line in text.splitlines() if line.startswith("rank 0"))
    assert rank0.count("█") > 28 and rank0.split()[-3] == "1.50" and rank0.split()[-1] == "1.25"
    visual = next(line for line in text.splitlines() if line.startswith("visual ") and "R_v" not in line)
    assert visual.split() == ["visual", "120", "20", "(16.7%)", "12", "8"]  # both ranks
    assert "checked 4, violated 0" in text and "must be 0" not in text


def test_violations_stand_out():
    bad = state(0)
    bad["violations"]["bound"] = 1
    assert "violated 1; plans without a mask 0 <-- must be 0" in top.frame([bad], "")


def test_a_difference_counts_only_what_came_since():
    before, now = state(0), state(0)
    now = copy.deepcopy(before)
    now["planned"] += 7
    now["layers"]["0"]["rows_after"][1] += 3
    now["layers"]["1"] = copy.deepcopy(before["layers"]["0"])  # a layer that was not there before
    got = top.since(now, before)
    assert got["planned"] == 7 and got["dispatches"] == 0 and got["config"] == CONFIG.to_json()
    assert got["layers"]["0"]["rows_after"] == [0, 3] and got["layers"]["1"]["rows_after"] == [50, 30]
    top.frame([got], "")  # nothing divides by zero where nothing happened


@contextmanager
def answering(body: bytes):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_command_prints_one_frame(capsys):
    with answering(json.dumps({"internal_states": [{"macs": state(0)}, {"macs": state(1)}]}).encode()) as url:
        assert cli.main(["top", url, "--once"]) == 0
    assert "1.500 -> 1.250" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "says"), [(b"<html>", "expected an SGLang server"), (b'{"internal_states": [{}]}', "without MACS")]
)
def test_other_servers_end_in_one_line(capsys, body, says):
    with answering(body) as url:
        assert cli.main(["top", url, "--once"]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_no_server_ends_in_one_line(capsys):
    assert cli.main(["top", "http://127.0.0.1:9", "--once"]) == 2
    assert "Is the server up" in capsys.readouterr().err
