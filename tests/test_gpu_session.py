"""The scheduler of benchmarks/gpu/session.py on small programs: order, GPUs, failures, limits. Needs no GPU."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import result_file, session
from benchmarks.gpu.session import Session, Step

# Writes when it ran and on which GPUs. Ends when those that must run beside it have started, too.
PROGRAM = """
import json, os, pathlib, sys, time
start, (out, sleep, status, *beside) = time.time(), sys.argv[1:]
pathlib.Path(out).with_suffix(".started").touch()
while not all(pathlib.Path(out).with_name(name + ".started").exists() for name in beside): time.sleep(0.02)
time.sleep(float(sleep))
json.dump([start, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")], open(out, "w"))
sys.exit(int(status))
"""
LONG = 120  # seconds that no step here takes, however busy the machine


def step(folder: Path, name: str, gpus: int = 0, alone: bool = False, sleep: float = 0.4, status: int = 0, **options):
    beside = options.pop("beside", ())
    command = [sys.executable, "-c", PROGRAM, str(folder / f"{name}.json"), str(sleep), str(status), *beside]
    return Step(name, command, options.pop("seconds", LONG), gpus, alone, **options)


def run(folder: Path, steps: list[Step], gpus: int = 2, seconds: float = LONG) -> tuple[Session, dict[str, str]]:
    one = Session(steps, gpus, folder)
    one.run(seconds)
    return one, {run.step.name: run.result for run in one.runs} | one.left_out


def span(folder: Path, name: str) -> tuple[float, float, set[str]]:
    start, end, gpus = json.loads((folder / f"{name}.json").read_text())
    return start, end, set(gpus.split(","))


def overlap(a: tuple[float, float, set[str]], b: tuple[float, float, set[str]]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def test_who_times_has_the_gpu_to_itself_and_others_share_it(tmp_path):
    timed, sharing = ("timed-a", "timed-b"), [f"shared-{i}" for i in range(4)]
    steps = [*(step(tmp_path, name, 1, True, beside=timed) for name in timed), step(tmp_path, "both", 2, True)]
    steps += [step(tmp_path, name, 1, beside=sharing) for name in sharing]
    _, results = run(tmp_path, steps)
    assert set(results.values()) == {"ok"}
    a, b, both = (span(tmp_path, name) for name in ("timed-a", "timed-b", "both"))
    shared = [span(tmp_path, name) for name in sharing]
    assert overlap(a, b) and a[2] != b[2]
    assert not overlap(a, both) and not overlap(b, both) and not any(overlap(both, one) for one in shared)
    assert overlap(shared[0], shared[3])


def test_a_failure_stops_only_what_needs_it(tmp_path):
    steps = [
        step(tmp_path, "build", status=3),
        step(tmp_path, "needs-it", 1, needs=("build",)),
        step(tmp_path, "needs-that", 1, needs=("needs-it",)),
        step(tmp_path, "free", 1),
    ]
    _, results = run(tmp_path, steps)
    assert results == {
        "build": "exit 3",
        "needs-it": "build failed",
        "needs-that": "needs-it failed",
        "free": "ok",
    }


def test_a_step_that_needs_one_waits_for_its_end(tmp_path):
    run(tmp_path, [step(tmp_path, "build"), step(tmp_path, "tests", 1, needs=("build",))])
    assert span(tmp_path, "build")[1] < span(tmp_path, "tests")[0]


def test_too_few_gpus_and_missing_programs_are_left_out(tmp_path):
    missing = Step("fused", [sys.executable, "-m", "benchmarks.gpu.not_there"], LONG, 1)
    _, results = run(tmp_path, [step(tmp_path, "two", 2), missing, step(tmp_path, "one", 1)], gpus=1)
    assert results == {"two": "needs 2 GPUs", "fused": "no benchmarks.gpu.not_there", "one": "ok"}


def test_limits_end_a_step_and_a_session(tmp_path):
    _, results = run(tmp_path, [step(tmp_path, "slow", sleep=60, seconds=1), step(tmp_path, "good")])
    assert results == {"slow": "too long", "good": "ok"}
    steps = [step(tmp_path, "first", 1, True, sleep=60), step(tmp_path, "second", 1, True)]
    one, results = run(tmp_path, steps, gpus=1, seconds=1)
    assert results == {"first": "cut off", "second": "no time left"}
    assert one.report() == 1


def test_what_is_ended_takes_along_what_it_started(tmp_path):
    child = tmp_path / "child"
    program = "import subprocess, sys, time\n"
    program += "p = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"  # as a server is
    program += "open(sys.argv[1], 'w').write(str(p.pid)); time.sleep(60)"
    for seconds in (1, 4, 16, 64):  # until it had the time to start something
        run(tmp_path, [Step("server", [sys.executable, "-c", program, str(child)], seconds)])
        if child.exists() and child.read_text():
            break
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_step_after_another_waits_for_its_end_however_it_ends(tmp_path):
    _, results = run(tmp_path, [step(tmp_path, "first", status=1), step(tmp_path, "second", after=("first", "other"))])
    assert results == {"first": "exit 1", "second": "ok"}
    assert span(tmp_path, "first")[1] < span(tmp_path, "second")[0]


def test_what_waits_for_go_gets_it_when_all_others_have_ended(tmp_path):
    program = "import pathlib, sys, time\ngo = pathlib.Path(sys.argv.pop(1))\n"
    program += f"while not go.exists(): time.sleep(0.05)\n{PROGRAM}"
    command = [sys.executable, "-c", program, str(tmp_path / "go"), str(tmp_path / "waits.json"), "0", "0"]
    waits = Step("waits", command, LONG, 2, at_go=True)
    _, results = run(tmp_path, [waits, step(tmp_path, "work", 1, sleep=1.0)])
    assert results == {"waits": "ok", "work": "ok"}
    assert span(tmp_path, "waits")[0] > span(tmp_path, "work")[1]


def test_every_step_names_a_step_before_it_and_a_program(tmp_path):
    names = []
    for one in session.steps(tmp_path, "abc"):
        assert set(one.needs) | set(one.after) <= set(names)
        names.append(one.name)
    assert len(set(names)) == len(names)


def test_the_archives_hold_results_and_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "JIT", tmp_path / "jit")
    (tmp_path / "jit" / "triton").mkdir(parents=True)
    (tmp_path / "jit" / "triton" / "kernel").write_text("x")
    for name in ("kernels.json", "kernels.log"):
        (tmp_path / name).write_text("{}")
    session.pack(tmp_path, tmp_path)
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"kernels.json", "kernels.log"} <= set(archive.getnames())
    with tarfile.open(tmp_path / "jit.tar.gz") as archive:
        assert "./triton/kernel" in archive.getnames()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/x/overhead.py", "--out", "f", "--ranks", "2", "--commit", "c", "--rank", "0"], "overhead --ranks 2"),
        (["serve_bench.py", "--ranks", "4", "--go", "/x/go"], "serve_bench --ranks 4"),
        (["serve_check.py", "--launch", "2 ranks, normal"], "serve_check --launch '2 ranks, normal'"),
    ],
)
def test_a_result_names_the_command_without_its_places(argv, said):
    assert result_file.command_line(argv) == f"python3 -m benchmarks.gpu.{said}"


def test_what_an_earlier_session_compiled_is_not_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    made, header = tmp_path / "made", tmp_path / "header.h"
    made.mkdir()
    header.write_text("1")
    (made / "build.ninja").write_text(f"rule copy\n command = cp $in $out\nbuild {made}/kernel.o: copy {header}\n")

    def ninja(*arguments: str) -> str:
        return subprocess.run(["ninja", "-C", made, *arguments], capture_output=True, text=True, check=True).stdout

    ninja()
    with tarfile.open(tmp_path / "jit.tar.gz", "w:gz") as archive:
        archive.add(made, ".")
    later = time.time() + 1
    os.utime(header, (later, later))
    assert "no work" not in ninja("-n")
    monkeypatch.setattr(time, "time", lambda: later + 1)
    session.unpack_compiled(tmp_path / "jit.tar.gz", made)
    assert "no work" in ninja("-n")


def test_a_result_file_has_a_line_for_each_row():
    result = {"gpu": "a", "wrong": [], "rows": [{"op": "x", "us": [1.5, 2.0]}, {"op": "y", "us": []}]}
    text = result_file.text(result)
    assert json.loads(text) == result and '\n{"op":"y","us":[]}\n]' in text and len(text.splitlines()) == 8
