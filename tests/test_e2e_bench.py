"""The end-to-end prefill benchmark: its statistics, traces, routings and variants; and a smoke run over CPU servers."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.e2e import groups, plot, prefill, servers, standstill
from benchmarks.e2e.rounds import Run, Workload, picture_tokens
from benchmarks.e2e.routing_site import e2e_routing
from benchmarks.e2e.servers import STOCK, Variant, chosen_variants, grouped
from benchmarks.serving import ServerError
from sglang_macs.cpu_compat import allow_torchvision
from tests.support.waiting import wait_for
from tools import server_tables

ROOT = Path(__file__).resolve().parent.parent

CASE = {"tokens": 8192, "variant": "rank-1.05"}


# ---- Routing -------------------------------------------------------------------------------------------------------

EXPERTS, TOP_K, TOKENS = 128, 8, 2048


def routed(routing, layer: int, num_ranks: int, rank: int = 0) -> torch.Tensor:
    """Ids [T, K] of a router whose logits the plugin has replaced."""
    table = e2e_routing.Routings([routing], rank, num_ranks)
    logits = table.logits(layer, torch.zeros(TOKENS, EXPERTS, dtype=torch.bfloat16), TOP_K)
    assert logits.shape == (TOKENS, EXPERTS) and logits.dtype == torch.bfloat16
    return logits.float().topk(TOP_K).indices


def rows_of_ranks(ids: torch.Tensor, num_ranks: int) -> torch.Tensor:
    return torch.bincount(ids.flatten(), minlength=EXPERTS).view(num_ranks, -1).sum(1)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_routing_has_the_spread_asked_for_and_hot_ranks_alternate(num_ranks):
    asked = servers.published_spread(24, 1.27)
    for layer in (0, 1, 15):
        rows = rows_of_ranks(routed(asked, layer, num_ranks), num_ranks)
        assert rows.sum() == TOKENS * TOP_K and rows.argmax() == layer % num_ranks
        assert rows.max() / rows.float().mean() == pytest.approx(asked[layer], abs=0.005)


def test_spread_is_that_published_and_has_the_mean_asked_for():
    for layers in (3, 24, 48):
        spread = servers.published_spread(layers, 1.27)
        assert len(spread) == layers and sum(spread) / layers == pytest.approx(1.27)
    published = json.loads(servers.LOADS.read_text())["rank_max_over_mean_ep8"]["per_layer_mean"]
    assert servers.published_spread(48, sum(published) / 48) == pytest.approx(published)
    assert servers.routings(3, [1.27, 1.0])[2] == [1.0] * 3


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_balance_is_perfect(num_ranks):
    ids = routed("balanced", 1, num_ranks)
    assert torch.bincount(ids.flatten()).tolist() == [TOKENS * TOP_K // EXPERTS] * EXPERTS
    assert (ids.sort(1).values.diff(dim=1) > 0).all()  # no expert twice
    of_token = (ids // (EXPERTS // num_ranks)).sort(1).values  # every token alone is balanced
    assert (of_token == of_token[0]).all()


def test_uniform_routing_favours_nobody():
    rows = rows_of_ranks(routed([1.0], 0, 8), 8)
    assert rows.max() / rows.float().mean() < 1.05


def test_routings_differ_by_rank_and_are_made_once():
    table, other = (e2e_routing.Routings([[1.2], "balanced"], rank, 2) for rank in (0, 1))
    like = torch.zeros(100, EXPERTS)
    first = table.logits(0, like, TOP_K)
    assert table.logits(0, like[:50], TOP_K).data_ptr() == first.data_ptr()
    assert not torch.equal(first, other.logits(0, like, TOP_K))
    table.chosen = 1
    assert not torch.equal(first, table.logits(0, like, TOP_K))
    assert table.logits(0, like[:0], TOP_K).shape == (0, EXPERTS)
    assert table.logits(0, torch.zeros(1000, EXPERTS), TOP_K).shape == (1000, EXPERTS)


# ---- Variants, prompts, model --------------------------------------------------------------------------------------


def test_stock_is_served_without_the_plugin(tmp_path):
    launch = servers.Launch("cuda", 2, 24, "bf16", 16384, 64, ["balanced"], attention="triton")
    plugins = {v.name: launch.environment(v, tmp_path)["SGLANG_PLUGINS"] for v in chosen_variants(None, None, "cuda")}
    assert plugins["stock"] == "e2e_routing" and plugins["rank-1.05"] == "macs,e2e_routing"
    flags = " ".join(launch.arguments())
    assert "--chunked-prefill-size 32768" in flags and "--max-prefill-tokens 16384" in flags
    assert "macs" not in " ".join([flags, *STOCK])


def test_copies_of_experts_are_placed_where_a_variant_has_them(tmp_path):
    launch = servers.Launch("cuda", 2, 24, "bf16", 16384, 64, ["balanced"], attention="triton")
    for variant in chosen_variants(["replicas", "inf"], None, "cuda"):
        arguments = launch.server(variant, tmp_path, tmp_path / variant.name).args
        if variant.name == "replicas":
            location = json.loads(arguments[arguments.index("--init-expert-location") + 1])
            assert [len(layer) for layer in location["physical_to_logical_map"]] == [128 + 32] * 24
        assert ("--init-expert-location" in arguments) == (variant.name == "replicas")


def test_plugin_needs_nothing_of_this_project():
    program = "import sys; import e2e_routing; assert not [m for m in sys.modules if m.startswith('sglang')]"
    subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks" / "e2e" / "routing_site", env={"PATH": ""}, check=True
    )


def test_every_group_has_stock_and_only_so_many_servers():
    names = [("stock", STOCK), ("balanced", STOCK), ("a", ("1",)), ("b", ("2",)), ("c", ("3",)), ("d", ("3",))]
    variants = [Variant(name, "deepep", flags) for name, flags in names]
    groups = [[v.name for v in group] for group in grouped(variants, 3)]
    assert groups == [["stock", "balanced", "a", "b"], ["stock", "balanced", "c", "d"]]
    assert [[v.name for v in group] for group in grouped(variants[:2], 3)] == [["stock", "balanced"]]


def test_variants_of_one_dispatch():
    chosen = chosen_variants(["rank-1.05"], ["deepep"], "cuda")
    assert [(v.name, v.dispatch) for v in chosen] == [(n, "deepep") for n in ("stock", "balanced", "rank-1.05")]
    assert {v.dispatch for v in chosen_variants(None, None, "cpu")} == {"gloo"}


@pytest.mark.parametrize("tokens", [512, 2048, 4096, 8192, 16384])
def test_a_round_fills_its_passes(tokens):
    workload = Workload.of(tokens, 2048, 2, False)
    assert workload.prompts * workload.prompt == tokens * workload.passes * 2
    assert workload.prompt <= 2048 and 4 <= workload.passes <= 16


def test_text_prompts_have_the_length_asked_for():
    body = Workload.of(512, 128, 2, False, passes=2).body()
    assert {len(ids) for ids in body["input_ids"]} == {128} and len(body["input_ids"]) == 16


@pytest.mark.parametrize("prompt", [64, 512, 2048])
def test_picture_prompts_have_the_length_asked_for(prompt):
    allow_torchvision()
    from transformers import AutoProcessor

    model = servers.build_model(3, "bf16", real=False)
    rows, columns = picture_tokens(prompt)
    body = Workload.of(prompt, prompt, 1, True, passes=1).body()
    image = Image.open(io.BytesIO(base64.b64decode(body["image_data"][0].partition(",")[2])))
    ids = AutoProcessor.from_pretrained(model)(text=body["text"][0], images=[image])["input_ids"][0]
    assert len(ids) == prompt and rows * columns >= 0.8 * prompt


def test_model_has_the_real_dimensions_and_no_weights():
    model = servers.build_model(24, "fp8", real=True)
    config = json.loads((model / "config.json").read_text())
    text = config["text_config"]
    assert (text["num_hidden_layers"], text["num_local_experts"], text["hidden_size"]) == (24, 128, 2048)
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert not list(model.glob("*.safetensors"))


# ---- Measuring, without servers ------------------------------------------------------------------------------------


class FakeClient:
    """In the place of a server: every round takes `seconds`, the `slow`-th of them ten times as long; None fails; or
    it no longer answers in the fourth.
    """

    def __init__(self, seconds: float | None, slow: int | None = None, hangs: bool = False) -> None:
        self.hangs = hangs
        self.seconds, self.slow, self.rounds, self.chosen, self.stopped = seconds, slow, 0, [], False
        self.paused, self.others = False, []
        self.server = SimpleNamespace(stop=self.stop, pause=self.pause, resume=self.resume, process=None)

    def stop(self) -> None:
        self.stopped = True

    def pause(self) -> None:
        assert not self.stopped
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def choose(self, routing: int, tokens: int) -> None:
        self.chosen.append((routing, tokens))

    def counters(self) -> tuple[float, int]:
        assert not self.paused
        return self.rounds * 4e-4, self.rounds * 8  # 50 us a plan

    def run(self, body: dict, patience_s: float) -> Run:
        assert not self.paused and all(other.paused or other.stopped for other in self.others)
        if self.seconds is None:
            raise ServerError("died")
        if self.rounds == 3 and self.hangs:
            assert patience_s < 100, "a server that stands still shall not cost the others their time"
            raise ServerError("no answer")
        self.rounds += 1
        took = self.seconds * (10 if self.rounds == self.slow else 1)
        passes = [[(i * took / 2, 64) for i in range(2)] for _ in range(2)]
        log = "Compiling a kernel\n" if self.rounds == self.slow else ""
        return Run(took, took / 2, passes, 0.0, took, log)


def options_of(out: Path):
    flags = "--device cpu --layers 3 --tokens 64 128 --prompt-tokens 32 --passes 2 --rounds 8"
    return prefill.parse(["--out", str(out), "--cache", str(out.parent / "cache"), *flags.split()])


def measured_group(tmp_path: Path, clients: dict, variants: list[Variant]) -> dict:
    """The result file of one group over fake servers."""
    report = prefill.Report(options_of(tmp_path / "out.json"))
    launch = prefill.launch_of(report.options, {})
    group = prefill.Group(variants, clients, launch, report)
    for client in clients.values():
        client.others = [other for other in clients.values() if other is not client]
    for tokens in report.options.tokens:
        group.measure(prefill.Cell(tokens, 1.0), 0.0, float("inf"))
    return json.loads(report.options.out.read_text())


FAKES = [Variant("stock", "gloo", ("s",)), Variant("balanced", "gloo", ("s",), balanced=True)]
FAKES += [Variant("rank-1.05", "gloo", ("r",)), Variant("inf", "gloo", ("i",))]


def test_rounds_become_rows_and_outliers_are_explained(tmp_path):
    clients = {("s",): FakeClient(1.0), ("r",): FakeClient(0.8, slow=4), ("i",): FakeClient(1.01)}
    found = measured_group(tmp_path, clients, FAKES)
    assert {(row["case"]["variant"], row["case"]["tokens"]) for row in found["rows"]} == {
        (variant.name, tokens) for variant in FAKES for tokens in (64, 128)
    }
    row = next(row for row in found["rows"] if row["case"]["variant"] == "rank-1.05")
    assert row["ratio"] == row["ttft_ratio"] == pytest.approx(0.8) and row["ci95"] == pytest.approx([0.8, 0.8])
    assert row["rounds"] == 6 and row["host_us_per_layer"] == pytest.approx(50) and row["full"] == 7
    (outlier,) = found["outliers"]
    assert outlier["case"] == row["case"] and outlier["round"] == 2 and outlier["seconds"] == pytest.approx(8)
    assert outlier["found"] == ["the log: Compiling a kernel"]
    # Perfect balance is routing 0; uniform is the second of the two skews, after it.
    assert set(clients["s",].chosen) == {(0, 64), (2, 64), (0, 128), (2, 128)}


def test_a_server_that_fails_is_left_out_and_stock_is_not(tmp_path):
    clients = {("s",): FakeClient(1.0), ("r",): FakeClient(None), ("i",): FakeClient(1.01)}
    found = measured_group(tmp_path, clients, FAKES)
    assert {row["case"]["variant"] for row in found["rows"]} == {"stock", "balanced", "inf"}
    assert clients["r",].stopped and not clients["s",].stopped
    with pytest.raises(ServerError):
        measured_group(tmp_path, {("s",): FakeClient(None)}, FAKES)


def test_a_server_that_stands_still_is_ended_and_the_others_go_on(tmp_path):
    clients = {("s",): FakeClient(1.0), ("r",): FakeClient(0.8, hangs=True), ("i",): FakeClient(1.01)}
    found = measured_group(tmp_path, clients, FAKES)
    assert clients["r",].stopped and {row["case"]["variant"] for row in found["rows"]} == {"stock", "balanced", "inf"}
    assert [(lost["variant"], lost["error"]) for lost in found["lost"]] == [("rank-1.05", "no answer")]


RANK = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1)
def waits_for_its_peer():
    print("up", flush=True)
    time.sleep(600)
waits_for_its_peer()
"""
LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1], name]) for name in ("sglang::scheduler", "detokenizer")]
ranks[0].wait()
"""


def test_ranks_of_a_server_that_stands_still_say_where(tmp_path):
    log = tmp_path / "server.log"
    command = [sys.executable, "-c", LAUNCHER, RANK]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as launcher:
        server = SimpleNamespace(process=launcher, log=log)
        try:
            wait_for(lambda: log.read_text().count("up") == 2)
            assert len(standstill.schedulers(launcher.pid)) == 1
            assert standstill.look(server).count("in waits_for_its_peer") == 1
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert standstill.look(server) == ""


def test_page_and_picture_show_a_result(tmp_path, monkeypatch):
    clients = {("s",): FakeClient(1.0), ("r",): FakeClient(0.8), ("i",): FakeClient(1.01)}
    found = measured_group(tmp_path, clients, FAKES)
    found["rows"][-1] |= {"ci95": [0.9, 1.1], "share_of_ideal": 0.5, "share_of_ideal_ci95": None, "busy": 0.67}
    cells = [cell(found["rows"][-1]) for cell in server_tables.E2E.values()]
    assert cells[:4] == ["128", "1", "inf", "gloo"] and cells[4] == "1.010 [0.900, 1.100]"
    assert cells[6:] == ["50%", "", "67%", "50", "7"]
    (tmp_path / "found.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "found.json"), str(tmp_path / "found.png")])
    plot.main()
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert set(plot.lines(found["rows"], 1.0)) == {(v.name, "gloo") for v in FAKES[1:]}


def test_prompts_must_fill_a_pass(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prefill.parse(["--out", str(tmp_path / "x.json"), "--tokens", "3000"])
    assert "3000 is no multiple of --prompt-tokens 2048" in capsys.readouterr().err


# ---- The whole program ---------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.nightly
def test_smoke_run_on_cpu(tmp_path):
    """Two servers of the tiny model: rows of the form documented, passes as full as asked for."""
    out = tmp_path / "e2e.json"
    flags = "--device cpu --layers 3 --tokens 64 --prompt-tokens 32 --passes 2 --skews 1.27 --variants rank-1.05"
    flags += " --rounds 2 --warm-ups 1 --minutes 8 --stagger 0 --profile-tokens 0"
    command = [sys.executable, "-m", "benchmarks.e2e.prefill", "--out", str(out), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["command"].startswith("python3 -m benchmarks.e2e.prefill --device cpu")
    rows = {row["case"]["variant"]: row for row in result["rows"]}
    assert set(rows) == {"stock", "balanced", "rank-1.05"}
    expected = {"tokens": 64, "skew": 1.27, "variant": "rank-1.05", "dispatch": "gloo", "layers": 3, "dtype": "bf16"}
    assert rows["rank-1.05"]["case"] == expected | {"ranks": 2, "prompts": "text"}
    assert all(row["full"] == 2 for row in rows.values())  # both rounds, on both ranks
    assert rows["stock"]["ratio"] == 1.0 and rows["rank-1.05"]["ratio"] > 0
    assert rows["rank-1.05"]["host_us_per_layer"] > 0 and rows["stock"]["host_us_per_layer"] is None


def test_ranks_of_all_servers_on_one_gpu_have_sms_of_their_own(monkeypatch) -> None:
    """Two servers of two ranks, each with half of them, stood still."""
    monkeypatch.setattr(groups.mps, "shared_gpu", lambda processes: processes)
    asked = []
    for more in (["--variants", "off", "--dispatch", "bounded"], [], ["--at-once", "2"]):
        options = prefill.parse(["--out", "x", "--commit", "x", "--share-gpu", "--ranks", "2", *more])
        asked.append(groups.sharing(options, prefill.groups_of(options)))
    assert asked == [4, 8, 4]
