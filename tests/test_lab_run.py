"""The lab's run on a GPU machine: what it leaves behind when it ends, and when it does not."""

import os
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "lab"))

import gpu_run


@pytest.fixture
def variant(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "WORK", tmp_path / "work")
    made = replace(gpu_run.VARIANTS[0], name="one")
    (made.folder / "new").mkdir(parents=True)
    (made.folder / "model.safetensors").write_bytes(b"weights")
    (made.folder / "quality.shard-0.json").write_text("{}")
    (made.folder / "quality.shard-0.new").write_text("half")
    return made


def names(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {member.name for member in tar if member.isfile()}


def test_out_gets_all_that_is_finished_and_nothing_half_written(variant, tmp_path):
    (variant.folder / "new" / "model.safetensors").write_bytes(b"half")
    gpu_run.keep(tmp_path, [variant, replace(variant, name="not begun")])
    assert names(tmp_path / "one.tar.gz") == {"one/model.safetensors", "one/quality.shard-0.json"}
    assert sorted(p.name for p in tmp_path.glob("*.tar.gz")) == ["one.tar.gz"]


def test_a_job_that_overruns_is_ended_and_its_state_kept(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "KEEP_EVERY", 0.5)
    jobs = gpu_run.Jobs(tmp_path)
    jobs.start("short", [sys.executable, "-c", "print('done')"], variant.folder / "short.log")
    sleeper = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '61.5'])"]
    jobs.start("long", sleeper, variant.folder / "long.log")
    long, start = jobs.running["long"], time.monotonic()
    assert jobs.wait(["short", "long"], 4.0, [variant]) == {"short": 0, "long": None}
    assert time.monotonic() - start < 20 and long.wait(10) != 0
    with pytest.raises(ProcessLookupError):  # nor is a child of it left
        time.sleep(1)
        os.killpg(long.pid, 0)
    assert "one/short.log" in names(tmp_path / "one.tar.gz")


def test_variants_are_models_that_the_trainer_takes():
    import train

    for variant in gpu_run.VARIANTS:
        options = train.options_of(["--out", "x", *variant.training])
        assert options.seed and options.scoring in ("softmax", "sigmoid")
    assert len({v.name for v in gpu_run.VARIANTS}) == len(gpu_run.VARIANTS)
