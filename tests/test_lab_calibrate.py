"""Calibration: planted experts are found, chance finds none, and a recording comes from a server or a dataset."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from PIL import Image
from serving import photograph_files

from sglang_macs import calibrate, profile
from sglang_macs.calibrate import Recording
from sglang_macs.cli import main
from sglang_macs.errors import MacsError

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
    modality, p = calibrate.modalities(recording(planted=1.0))
    expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.int8)
    expected[:, 0], expected[:, 1] = 1, -1
    assert torch.equal(modality, expected)
    assert (p[:, :2] < 1e-6).all()


def test_chance_alone_makes_no_modality():
    for seed in range(20):
        assert not calibrate.modalities(recording(seed=seed))[0].any()


def test_a_significant_but_small_difference_is_none():
    """Many samples make 10 % significant; capacity should not move for it."""
    modality, p = calibrate.modalities(recording(samples=20_000, planted=0.1))
    assert (p[:, 0] < 1e-6).all() and not modality.any()


def test_too_few_samples_with_both_modalities_are_refused():
    only_text = recording(planted=1.0)
    only_text.rows[15:, :, :, 0] = 0
    with pytest.raises(MacsError, match="15 samples with image and text"):
        calibrate.modalities(only_text)


def test_a_profile_keeps_its_evidence_and_old_ones_are_read(tmp_path):
    made = calibrate.make_profile(recording(planted=1.0), "A", "f00")
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
        return calibrate.fingerprint(tmp_path / name)

    assert stored("a", 1.0, 1.0) == stored("b", 1.0, 2.0) != stored("c", 2.0, 1.0)
    with pytest.raises(MacsError, match=r"no \*\.safetensors"):
        calibrate.fingerprint(tmp_path)


class FakeServer(BaseHTTPRequestHandler):
    """/server_info of two ranks whose counters grow by a sample of `source` at every look."""

    source = recording(planted=1.0)
    looks = 0

    def do_GET(self):
        rows = self.source.rows[: FakeServer.looks].sum(0)
        FakeServer.looks += 1
        states = [
            {"macs": {"expert_rows": {str(layer): (rows[layer] // 2 + part).tolist() for layer in range(LAYERS)}}}
            for part in ((rows[0] * 0), rows[0] % 2)
        ]
        body = json.dumps({"internal_states": states}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_running_server_is_watched():
    FakeServer.looks = 0
    server = HTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        watched = calibrate.watch_server(url, samples=30, interval=0.0, patience=5.0)
        assert watched.rows.shape == (30, LAYERS, EXPERTS, 2)
        assert torch.equal(watched.rows[:, 0], FakeServer.source.rows[:30, 0])
        assert calibrate.modalities(watched)[0][0, :2].tolist() == [1, -1]
        FakeServer.looks = 60  # traffic has ended
        with pytest.raises(MacsError, match="no mixed traffic"):
            calibrate.watch_server(url, samples=3, interval=0.01, patience=0.1)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(MacsError, match="--server"):
        calibrate.watch_server(url, samples=1, interval=0.0, patience=0.1)


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
    assert made.evidence.samples == 20 and made.evidence.fingerprint == calibrate.fingerprint(model)
    # The tiny model is built so that its first half serves images (tiny_models.VISUAL_PULL).
    first = [m for row in made.modality.values() for m in row[: made.num_experts // 2]]
    second = [m for row in made.modality.values() for m in row[made.num_experts // 2 :]]
    assert first.count(1) > 2 * second.count(1) and second.count(-1) > first.count(-1)
    assert "visual" in capsys.readouterr().out
    (tmp_path / "d.jsonl").write_text('{"no": "text"}')
    assert main([*arguments, "--dataset", str(tmp_path / "d.jsonl")]) == 2
    assert "line 1 of" in capsys.readouterr().err
