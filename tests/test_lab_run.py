"""The lab's run on a GPU machine: what it leaves behind when it ends, and when it does not."""

import math
import subprocess
import tarfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from lab import gpu_run, train
from tests.support.waiting import wait_for


@pytest.fixture
def variant(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "WORK", tmp_path / "work")
    made = replace(gpu_run.VARIANTS[0], name="one")
    made.folder.mkdir(parents=True)
    (made.folder / "model.safetensors").write_bytes(b"weights")
    (made.folder / "quality.shard-0.json").write_text("{}")
    (made.folder / "quality.shard-0.new").write_text("half")
    return made


def names(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {member.name for member in tar if member.isfile()}


def test_out_gets_all_that_is_finished_and_nothing_half_written(variant, tmp_path):
    (variant.folder / "model.new").write_bytes(b"half")
    gpu_run.keep(tmp_path, [variant, replace(variant, name="not begun")])
    assert names(tmp_path / "one.tar.gz") == {"one/model.safetensors", "one/quality.shard-0.json"}
    assert sorted(p.name for p in tmp_path.glob("*.tar.gz")) == ["one.tar.gz"]


def test_a_job_that_overruns_is_ended_and_its_state_kept(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "KEEP_EVERY", 0.5)
    jobs = gpu_run.Jobs(tmp_path, gpu_run.Gpus())
    jobs.start("short", ["echo", "done"], variant.folder / "short.log")
    beating = tmp_path / "beat"
    jobs.start("long", ["sh", "-c", f"sh -c 'while true; do date +%N > {beating}; sleep 0.1; done'"], tmp_path / "log")
    jobs.running["short"].wait()
    wait_for(lambda: beating.exists() and beating.read_text())
    long = jobs.running["long"]
    assert jobs.wait(["short", "long"], 2.0, [variant]) == {"short": 0, "long": None}
    assert long.wait() != 0
    last = beating.read_text()
    time.sleep(0.5)
    assert beating.read_text() == last  # its child has ended, too
    assert "one/short.log" in names(tmp_path / "one.tar.gz")


def test_processes_are_dealt_out_over_the_gpus_that_are_left(monkeypatch):
    monkeypatch.setattr(gpu_run.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    found = gpu_run.find_gpus()
    assert [found.of(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["1", "3", "1"]
    assert gpu_run.Gpus().of(0) == {}


def test_weights_in_parts_lie_beside_the_archive_and_what_is_resumed_from_stays(variant, tmp_path):
    """So that no file that comes back is larger than a part, which tests/test_lab_documents.py bounds."""
    (variant.folder / "model-00001-of-00002.safetensors").write_bytes(b"first")
    (variant.folder / "state.pt").write_bytes(b"optimiser")
    (variant.folder / "stock").mkdir()
    (variant.folder / "stock" / "sheet-0-0.npz").write_bytes(b"pictures")
    gpu_run.keep(tmp_path, [variant])
    assert names(tmp_path / "one.tar.gz") == {"one/model.safetensors", "one/quality.shard-0.json"}
    assert (tmp_path / "model-00001-of-00002.safetensors").read_bytes() == b"first"


def test_variants_are_models_that_the_trainer_takes():
    for variant in gpu_run.VARIANTS:
        asked = Namespace(minutes=None, resume=False)
        options = train.options_of(list(map(str, gpu_run.training(variant, asked, 525.4)[3:])))
        assert options.seed and options.suite == variant.name and options.out == variant.folder
        assert (options.minutes, options.call_seconds, options.resume) == (None, 525.0, False)
        asked = Namespace(minutes=16.0, resume=True)
        options = train.options_of(list(map(str, gpu_run.training(variant, asked, 525.4)[3:])))
        assert (options.minutes, options.call_seconds, options.resume) == (16.0, 525.0, True)
    assert len({v.name for v in gpu_run.VARIANTS}) == len(gpu_run.VARIANTS)


@pytest.mark.parametrize(
    ("minutes", "call", "before", "expected"),
    [
        (None, 530.0, 0.0, (490.0, 490.0)),  # one call: the rate falls to its end with the call
        (None, 530.0, 480.0, (970.0, 490.0)),
        (16.0, 530.0, 480.0, (960.0, 490.0)),  # several: it follows their whole
        (16.0, math.inf, 0.0, (960.0, math.inf)),
        (None, math.inf, 0.0, (60 * train.MINUTES, math.inf)),
    ],
)
def test_a_training_ends_with_its_call_whatever_its_start_up_took(minutes, call, before, expected):
    options = Namespace(minutes=minutes, call_seconds=call)
    assert train.schedule(options, before, start_up=40.0) == expected


def test_a_training_that_makes_no_step_is_seen_before_its_time_is_up(variant, tmp_path):
    jobs = gpu_run.Jobs(tmp_path, gpu_run.Gpus())
    log = variant.folder / "train.log"
    line = "   10 s step 80 (8.0/s) answer loss 4.1, right tokens 12.0 %, max/mean 1.4..2.3"
    for name, script in (("dies", "exit 3"), ("steps", f"echo '{line}'; sleep 60"), ("hangs", "sleep 60")):
        jobs.start(name, ["sh", "-c", script], log)
        seconds = 1.0 if name == "hangs" else 60.0
        assert jobs.until(lambda: gpu_run._has_stepped(variant), [name], seconds) == (name == "steps")
        assert jobs.wait([name], 0.0, [variant])[name] == (3 if name == "dies" else None)


def test_only_processes_that_have_to_share_a_gpu_go_through_mps(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command[0])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_run.shutil, "which", lambda _: "/usr/bin/nvidia-cuda-mps-control")
    monkeypatch.setattr(gpu_run.subprocess, "run", run)
    gpus = gpu_run.Gpus(("0", "1"))
    with gpu_run.sharing(gpus, 2) as made:
        assert made is gpus and not commands
    with pytest.raises(KeyError), gpu_run.sharing(gpus, 8) as made:
        pipes = Path(made.environment["CUDA_MPS_PIPE_DIRECTORY"])
        assert made.names == ("0", "1") and pipes.is_dir()
        raise KeyError("whatever ends a stage")
    assert commands[-1] == "nvidia-cuda-mps-control" and not pipes.exists()
    with gpu_run.sharing(gpu_run.Gpus(), 8) as made:
        assert made == gpu_run.Gpus()
