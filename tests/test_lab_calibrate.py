"""Calibration: planted experts are found, chance finds none, and a recording comes from a server or a dataset."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.serving import photograph_files
from sglang_macs.cli import main
from sglang_macs.errors import MacsError
from sglang_macs.observe import calibration
from sglang_macs.observe.calibration import Recording
from sglang_macs.plan import profile
from tests.support.info_server import answering, body

LAYERS, EXPERTS = 2, 16


def recording(samples: int = 60, planted: float = 0.0, seed: int = 0) -> Recording:
    """Poisson rows; of every layer, expert 0 gets `planted` times more visual rows, expert 1 as much more text."""
    rate = torch.full((samples, LAYERS, EXPERTS, 2), 40.0)
    rate[:, :, 0, 0] *= 1 + planted
    rate[:, :, 1, 1] *= 1 + planted
    generator = torch.Generator().manual_seed(seed)
    burst = torch.rand(samples, LAYERS, EXPERTS, 1, generator=generator) + 0.5  # rows of one sample go together
    return Recording(torch.poisson(rate * burst, generator).long(), list(range(LAYERS)))


def test_planted_experts_are_found_and_no_others():
    modality, p = calibration.modalities(recording(planted=1.0))
    expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.int8)
    expected[:, 0], expected[:, 1] = 1, -1
    assert torch.equal(modality, expected)
    assert (p[:, :2] < 1e-6).all()


def test_chance_alone_makes_no_modality():
    for seed in range(20):
        assert not calibration.modalities(recording(seed=seed))[0].any()


def test_a_significant_but_small_difference_is_none():
    """Many samples make 10 % significant; capacity should not move for it."""
    modality, p = calibration.modalities(recording(samples=20_000, planted=0.1))
    assert (p[:, 0] < 1e-6).all() and not modality.any()


def test_too_few_samples_with_both_modalities_are_refused():
    only_text = recording(planted=1.0)
    only_text.rows[15:, :, :, 0] = 0
    with pytest.raises(MacsError, match="15 samples with image and text"):
        calibration.modalities(only_text)


def test_a_profile_keeps_its_evidence_and_old_ones_are_read(tmp_path):
    made = calibration.make_profile(recording(planted=1.0), "A", "f00")
    profile.save(made, str(tmp_path / "p.json"))
    read = profile.load(str(tmp_path / "p.json"))
    assert read == made and read.evidence.samples == 60
    assert sum(map(sum, read.evidence.rows[0])) == int(recording(planted=1.0).rows[:, 0].sum())
    raw = json.loads((tmp_path / "p.json").read_text())
    del raw["evidence"]
    (tmp_path / "old.json").write_text(json.dumps({**raw, "schema": "sglang-macs/profile/1"}))
    old = profile.load(str(tmp_path / "old.json"))
    assert old.modality == made.modality and old.evidence is None
    (tmp_path / "bad.json").write_text(json.dumps({**raw, "evidence": {"samples": 3}}))
    with pytest.raises(MacsError, match="--macs-profile"):
        profile.load(str(tmp_path / "bad.json"))


def test_the_fingerprint_is_the_routers(tmp_path):
    from safetensors.torch import save_file

    def stored(name: str, router: float, other: float) -> str:
        (tmp_path / name).mkdir()
        tensors = {"layers.0.mlp.gate.weight": torch.full((2, 2), router).bfloat16(), "x": torch.full((2,), other)}
        save_file(tensors, str(tmp_path / name / "model.safetensors"))
        return calibration.routers(tmp_path / name).fingerprint

    assert stored("a", 1.0, 1.0) == stored("b", 1.0, 2.0) != stored("c", 2.0, 1.0)
    with pytest.raises(MacsError, match=r"no \*\.safetensors"):
        calibration.routers(tmp_path)


@pytest.mark.parametrize("name", ["lab-vl-moe", "lab-documents-small"])
def test_the_committed_profile_is_of_the_committed_model(name):
    model = Path(__file__).resolve().parent.parent / "models" / name
    made, routers = profile.load(str(model / "profile.json")), calibration.routers(model)
    assert made.evidence.fingerprint == routers.fingerprint
    calibration.check_layers(made.modality, routers.layers)


# ---- From a running server -----------------------------------------------------------------------------------------


class Server:
    """Answers each look with the next of some lists of states, or errors; the last for ever. It has its own clock."""

    def __init__(self, *answers) -> None:
        self.answers, self.now = list(answers), 0.0

    def states(self) -> list[dict]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, MacsError):
            raise answer
        return answer

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def states(rows: torch.Tensor | None, layers=range(LAYERS), **changes) -> list[dict]:
    """Of two ranks at infinite gamma that have half of rows [LAYERS, E, 2] each."""
    halves = [] if rows is None else [rows // 2, rows - rows // 2]
    tables = [{str(i): half[i].tolist() for i in layers} for half in halves] or [{}, {}]
    config = {"gamma": "inf", "preset": "rank"}
    return [{"version": "0", "rank": i, "config": config, "expert_rows": t, **changes} for i, t in enumerate(tables)]


GROWING = recording(planted=1.0).rows.cumsum(0)  # what a server has counted after each sample


def watched(monkeypatch, *answers, samples: int = 20) -> Recording:
    server = Server(*answers)
    monkeypatch.setattr(calibration, "time", server)
    return calibration.watch_server(server, range(LAYERS), samples, interval=1.0, patience=5.0)


def refused(monkeypatch, *answers) -> str:
    with pytest.raises(MacsError) as caught:
        watched(monkeypatch, *answers)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_running_server_is_watched(monkeypatch):
    found = watched(monkeypatch, *map(states, GROWING), samples=30)
    assert found.layers == [0, 1] and torch.equal(found.rows, GROWING[1:31] - GROWING[:30])
    assert calibration.modalities(found)[0][0, :2].tolist() == [1, -1]


def test_a_server_is_watched_from_before_its_traffic(monkeypatch):
    """No layer has been counted yet, then one, then all."""
    late = (states(None), states(None), states(GROWING[0], layers=[1]))
    found = watched(monkeypatch, *late, *map(states, GROWING))
    assert torch.equal(found.rows[0], GROWING[0]) and torch.equal(found.rows[1], GROWING[1] - GROWING[0])


def test_a_sample_is_whole_before_it_counts(monkeypatch):
    """Looks between which a layer had one modality only are put together with the next."""
    only_text = GROWING[0].clone()
    only_text[0, :, 0] = 0
    found = watched(monkeypatch, states(GROWING[0] * 0), states(only_text), *map(states, GROWING[1:]))
    assert torch.equal(found.rows[0], GROWING[1])


def test_a_server_without_traffic_is_no_profile(monkeypatch):
    error = refused(monkeypatch, states(None))
    assert "0 of 20 samples" in error and "no rows in any layer" in error
    assert "3 of 20 samples" in refused(monkeypatch, *map(states, GROWING[:4]))


def test_layers_and_modalities_that_never_come_are_named(monkeypatch):
    text = GROWING.clone()
    text[:, 1, :, 0] = 0
    assert "no visual rows in layers [1]" in refused(monkeypatch, *map(states, text), states(text[-1]))
    first = [states(rows, layers=[0]) for rows in GROWING]  # the other stages of a pipeline do not answer
    assert "layers [1]" in refused(monkeypatch, *first)
    other = [{**state, "expert_rows": {"7": GROWING[0, 0].tolist()}} for state in states(None)]
    assert "layers [7], which the checkpoint does not have" in refused(monkeypatch, other)


@pytest.mark.parametrize("config", [{"gamma": 1.1, "preset": "rank"}, {"gamma": "inf", "preset": "off"}, {}])
def test_a_server_that_does_not_count_experts_is_refused_at_once(monkeypatch, config):
    assert "Start it with --macs-gamma inf" in refused(monkeypatch, states(GROWING[0], config=config))
    restarted = (states(GROWING[0]), states(GROWING[1]), states(None, config=config))
    assert "Start it with --macs-gamma inf" in refused(monkeypatch, *restarted)


def test_a_server_that_starts_again_costs_a_sample(monkeypatch):
    down = MacsError("server", "nothing", "an answer")
    before, after = list(map(states, GROWING[:11])), list(map(states, GROWING[:12]))
    whole = [rows.tolist() for rows in (*GROWING[:1], *(GROWING[1:12] - GROWING[:11]))]
    for between in ([], [down], [down, states(None)], [states(None)]):
        found = watched(monkeypatch, *before, *between, *after)
        assert torch.equal(found.rows[:10], GROWING[1:11] - GROWING[:10])
        assert all(rows in whole for rows in found.rows[10:].tolist())
    assert "got nothing, expected an answer" in refused(monkeypatch, *before, down)


def test_ranks_that_come_do_not_bring_their_past(monkeypatch):
    """The rows that a second rank counted before it first answered are no sample."""
    alone = [states(rows)[:1] for rows in GROWING[:5]]
    both = list(map(states, GROWING[5:30]))
    found = watched(monkeypatch, *alone, *both)
    assert torch.equal(found.rows[4], GROWING[6] - GROWING[5])


def test_a_part_of_the_ranks_is_no_profile(monkeypatch):
    part = states(GROWING[0], ranks={"ep_size": 4, "answering": [0]})
    assert "counters of 1 of 4 ranks" in refused(monkeypatch, part)
    assert "counters of 1 of 4 ranks" in refused(monkeypatch, states(GROWING[0]), part)
    once = watched(monkeypatch, *map(states, GROWING[:3]), part, *map(states, GROWING[3:]))
    assert torch.equal(once.rows[2], GROWING[4] - GROWING[3])  # a rank that answered too late, once


@pytest.mark.parametrize(
    "table", [None, 4, "x", {"0": 4}, {"0": [[1, 2], [3]]}, {"0": [[1.5, 2]]}, {"0": [[-1, 2]]}, {"0": [1, 2]},
              {"zero": [[1, 2]]}, {"0": [[1, 2]], "1": [[1, 2], [3, 4]]}, {"0": [["1", 2]]}, {"0": [[10**30, 2]]}],
    ids=str,
)  # fmt: skip
def test_counters_of_another_form_are_refused(monkeypatch, table):
    assert "expert_rows of another form from sglang-macs 0" in refused(
        monkeypatch, states(GROWING[0], expert_rows=table)
    )


# ---- The command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """config.json and routers of LAYERS layers, and of one behind them that drafts."""
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["AForCausalLM"], "text_config": {"num_hidden_layers": LAYERS}}
    (folder / "config.json").write_text(json.dumps(config))
    routers = {f"model.layers.{i}.mlp.gate.weight": torch.ones(EXPERTS, 4) for i in range(LAYERS + 1)}
    save_file(routers, str(folder / "model.safetensors"))
    return folder


def test_the_command_writes_a_profile_of_a_running_server(checkpoint, tmp_path, capsys):
    looks = iter(GROWING)
    arguments = ["--model-path", str(checkpoint), "--out", str(tmp_path / "p.json"), "--api-key", "k"]
    with answering(lambda: body(states(next(looks))), api_key="k") as url:
        assert main(["calibrate", "--server", url, *arguments, "--samples", "20", "--interval", "0"]) == 0
    made = profile.load(str(tmp_path / "p.json"))
    assert list(made.modality) == [0, 1] and made.modality[0][:2] == [1, -1] and made.architecture == "AForCausalLM"
    assert "from 20 samples" in capsys.readouterr().out


def test_no_profile_is_written_where_the_server_gave_none(checkpoint, tmp_path, capsys):
    out = tmp_path / "p.json"
    out.write_text("the last one")
    arguments = ["--model-path", str(checkpoint), "--out", str(out), "--interval", "0", "--patience", "0"]
    for found in (states(None), states(GROWING[0], config={"gamma": 1.1})):
        with answering(body(found)) as url:
            assert main(["calibrate", "--server", url, *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1 and out.read_text() == "the last one"


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"architectures": []}', '{"architectures": [4]}', "[" * 50_000,
                                    '{"architectures": ["A"], "text_config": 3}'], ids=range(7))  # fmt: skip
def test_a_checkpoint_without_a_model_is_refused_in_one_line(checkpoint, tmp_path, capsys, config):
    (checkpoint / "config.json").write_text(config)
    arguments = ["--model-path", str(checkpoint), "--out", str(tmp_path / "p.json")]
    assert main(["calibrate", "--server", "http://127.0.0.1:9", *arguments]) == 2
    error = capsys.readouterr().err
    assert "--model-path" in error and len(error.splitlines()) == 1


def test_layers_that_a_recording_lacks_are_named():
    calibration.check_layers([1, 0], {0, 1})
    with pytest.raises(MacsError, match=r"no rows in layers \[2\]"):
        calibration.check_layers([0, 1], {0, 1, 2})


def test_a_dataset_is_replayed_by_the_command(vl_model, tmp_path, capsys):
    from sglang_macs.tiny_models import reference_path

    model = reference_path(vl_model)
    Image.open(io.BytesIO(photograph_files()["china"])).resize((128, 128)).save(tmp_path / "china.png")
    lines = [{"text": f"What is number {i}?", "images": ["china.png"] if i % 2 else []} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "p.json"
    arguments = ["calibrate", "--model-path", str(model), "--out", str(out)]
    assert main([*arguments, "--dataset", str(tmp_path / "d.jsonl")]) == 0
    made = profile.load(str(out))
    assert made.evidence.samples == 20 and made.evidence.fingerprint == calibration.routers(model).fingerprint
    # The tiny model is built so that its first half serves images (tiny_models.VISUAL_PULL).
    first = [m for row in made.modality.values() for m in row[: made.num_experts // 2]]
    second = [m for row in made.modality.values() for m in row[made.num_experts // 2 :]]
    assert first.count(1) > 2 * second.count(1) and second.count(-1) > first.count(-1)
    assert "visual" in capsys.readouterr().out
    (tmp_path / "d.jsonl").write_text('{"no": "text"}')
    assert main([*arguments, "--dataset", str(tmp_path / "d.jsonl")]) == 2
    assert "line 1 of" in capsys.readouterr().err
