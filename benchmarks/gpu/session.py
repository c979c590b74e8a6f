"""Everything that a GPU machine has to show, in one call: builds, checks, times, servers; side by side where they may.

    python3 -m benchmarks.gpu.session --out FOLDER --commit ID [--only NAME ...] [--seconds 580] [--jit FILE]
    python3 -m benchmarks.gpu.session --list

Steps start in the order of `steps`. A step that times has its GPUs to itself, others share them; a step with too few
GPUs, or without its program, is left out. A failure stops only the steps that need it. FOLDER gets results.tar.gz (all
JSON and logs) and jit.tar.gz (what servers compiled; give it back with --jit, and they start faster). Exit 1 if
anything failed.

Not make -j: it knows neither GPUs that a step has to itself, nor time limits.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = sys.executable
JIT = Path("/tmp/sglang-jit")  # all caches of compiled kernels
CACHES = {
    "SGLANG_CACHE_DIR": str(JIT),  # those of Triton, FlashInfer and DeepGEMM lie below it
    "SGLANG_JIT_CACHE_DIR": str(JIT / "sglang"),
    "TVM_FFI_CACHE_DIR": str(JIT / "tvm-ffi"),
}
CHECKED = (
    "2 ranks, 128 experts",
    "2 ranks, fused",
    "2 ranks, peer exchange",
    "2 ranks, FP8 blocks",
    "2 ranks, two batches",
    "2 ranks, fused, FP8 blocks",
)
SEVERAL = (2, 4, 8)  # GPUs on which ranks are checked and timed over NVLink
# The entry point that SGLang looks for, and the operators, unless a build of them lies there that loads.
LOADS = f"{PYTHON} -c 'from sglang_macs import ops; assert ops.cuda_backend() == \"cuda\"'"
BUILD = f"{PYTHON} setup.py -q egg_info && ({LOADS} || {PYTHON} setup.py -q build_ext --inplace) && {LOADS}"


@dataclass(frozen=True)
class Step:
    """One command.

    seconds: after which it is ended; gpus: how many it needs; alone: nothing else may run on them; needs: steps that
    have to succeed before; at_go: after its start it holds no GPU, and waits for the file `go`, which comes when all
    other steps have ended; after: steps that have to have ended before, well or not.
    """

    name: str
    command: list[str]
    seconds: int
    gpus: int = 0
    alone: bool = False
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    at_go: bool = False
    after: tuple[str, ...] = ()


def packages() -> Path:
    """The folder in which SGLang and what it needs are installed."""
    found = importlib.util.find_spec("sglang")
    return Path(found.origin).parent.parent if found and found.origin else ROOT / "sglang_macs"


def steps(out: Path, commit: str, checked: Sequence[str] = CHECKED) -> list[Step]:
    def script(name: str, *arguments: str, result: str = "") -> list[str]:
        place = ["--out", str(out / result), "--commit", commit] if result else []
        return [PYTHON, "-m", f"benchmarks.gpu.{name}", *arguments, *place]

    def fused(processes: str, *arguments: str, result: str = "") -> list[str]:
        return script("check_fused", "--processes", processes, *arguments, result=result)

    def timed_on(n: int) -> list[Step]:
        """A rank a GPU."""
        ranks = ("--ranks", str(n))
        normal = script("overhead", *ranks, "--normal-only", result=f"overhead_{n}_normal.json")
        times = fused(str(n), "--time-only", "--seconds", "380", result=f"fused_{n}.json")
        return [
            Step(f"overhead-{n}", script("overhead", *ranks, result=f"overhead_{n}.json"), 240, n, True, extension),
            Step(f"overhead-{n}-normal", normal, 120, n, True, extension),
            Step(f"fused-{n}", times, 400, n, True, both),
        ]

    def served_on(n: int) -> Step:
        names = (f"{n} ranks, 128 experts", f"{n} ranks, fused")
        command = script("serve_check", "--at-once", "6", "--launch", *names, result=f"serve_{n}.json")
        return Step(f"serve-{n}", command, 420, n, False, models, after=("bytecode",))

    def bench_on(n: int) -> Step:
        command = script("serve_bench", "--ranks", str(n), "--go", str(out / "go"), result=f"bench_{n}.json")
        # Its servers start when fewer others do.
        return Step(f"bench-{n}", command, 560, n, False, models, at_go=True, after=("bytecode", "serve-one-gpu"))

    def tests() -> list[str]:
        files = ("tests/test_gpu.py", "tests/test_replicas_gpu.py")
        return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]

    def sanitizer(tool: str) -> list[str]:
        check = script("check_kernels", "--check-only", "--small", "16", "--seed", "11", "--jobs", "2")
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *check]

    # A fresh installation holds sources alone, and 80 s of a server's first start are imports. That some file of some
    # package cannot be compiled is no failure.
    bytecode = f"{PYTHON} -m compileall -q -j 0 {packages()} > /dev/null; true"
    # The fused path in graphs of several rounds stands still there: docs/design/fused_dispatch.md.
    composed = ("--mps", "--time-only", "--composed-only")
    serve = script("serve_check", "--at-once", "6", "--launch", *checked, result="serve.json")
    one_gpu = script("serve_check", "--launch", "2 ranks, one GPU", result="serve_one_gpu.json")
    check = script("check_kernels", "--check-only", "--large", "--jobs", "8")
    kernels, extension, models = ("build-kernels",), ("build-extension",), ("build-extension", "build-models")
    both = (*kernels, *extension)
    cuda, triton = {"MACS_CUDA_BACKEND": "cuda"}, {"MACS_CUDA_BACKEND": "triton"}
    return [
        Step("bytecode", ["bash", "-c", bytecode], 120),
        Step("build-extension", ["bash", "-c", BUILD], 240),
        Step("build-kernels", [PYTHON, "-m", "reference.kernels_c", "16"], 120),
        Step("build-models", script("serve_check", "--build-only", "--launch", *CHECKED, "2 ranks, one GPU"), 240),
        # What is timed, one after the other on a GPU.
        Step("instructions", script("time_instructions", result="instructions.json"), 60, 1, True),
        Step("time-kernels", script("check_kernels", "--time-only", result="kernels.json"), 150, 1, True, kernels),
        Step("overhead-1", script("overhead", result="overhead_1.json"), 180, 1, True, extension),
        Step("time-replicas", script("time_replicas", result="replicas_plan.json"), 60, 1, True, extension),
        Step("time-triton", script("time_operators", result="triton.json"), 120, 1, True, extension, triton),
        Step("bounded", script("check_bounded", result="bounded.json"), 150, 1, True, extension),
        Step("fused", script("check_fused", result="fused.json"), 240, 1, True, both),
        *(step for n in SEVERAL for step in timed_on(n)),
        Step("composed-mps-8", fused("8", *composed, result="composed_mps_8.json"), 120, 1, True, both),
        Step("fused-mps-2-times", fused("2", "--mps", "--time-only", result="fused_mps_2.json"), 200, 1, True, both),
        # Only right or wrong, but a wait of theirs ends after milliseconds.
        Step("fused-mps-2", fused("2", "--mps", "--check-only"), 120, 1, True, kernels),
        Step("fused-mps-8", fused("8", "--mps", "--check-only"), 120, 1, True, kernels),
        *(Step(f"fused-check-{n}", fused(str(n), "--check-only"), 120, n, True, kernels) for n in SEVERAL),
        # What is only right or wrong, all at once.
        Step("serve", serve, 420, 2, False, models, after=("bytecode",)),
        *(served_on(n) for n in SEVERAL[1:]),
        Step("serve-one-gpu", one_gpu, 240, 1, False, models, after=("bytecode",)),
        Step("check-kernels", check, 300, 1, False, kernels),
        Step("tests-cuda", tests(), 240, 1, False, extension, cuda),
        Step("tests-triton", tests(), 240, 1, False, extension, triton),
        Step("memcheck", sanitizer("memcheck"), 300, 1, False, kernels),
        Step("racecheck", sanitizer("racecheck"), 300, 1, False, kernels),
        *(bench_on(n) for n in SEVERAL),
    ]


# ---- Running them --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A step that has started: its process, the GPUs it got, and what became of it ("" while it runs)."""

    step: Step
    process: subprocess.Popen
    gpus: list[int]
    started: float
    result: str = ""
    seconds: float = 0.0

    def look(self, now: float) -> None:
        """Notices the end, and ends what has run too long."""
        self.seconds = now - self.started
        status = self.process.poll()
        if status is not None:
            self.result = "ok" if status == 0 else f"exit {status}"
        elif self.seconds > self.step.seconds:
            self.stop("too long")

    def stop(self, result: str) -> None:
        """Ends it and all it has started: servers are process groups of their own, and would hold their GPU."""
        family = descendants(self.process.pid)
        os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        for pid in [self.process.pid, *family]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.result = result


def descendants(pid: int) -> list[int]:
    """Of a process; none of one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


class Session:
    """Runs steps in order on `gpus` GPUs, logs to out/NAME.log."""

    def __init__(self, chosen: list[Step], gpus: int, out: Path) -> None:
        self.waiting, self.gpus, self.out = list(chosen), gpus, out
        self.runs: list[Run] = []
        self.left_out: dict[str, str] = {}

    def running(self) -> list[Run]:
        return [run for run in self.runs if not run.result]

    def advance(self) -> None:
        """Looks at what runs, starts what may."""
        for run in self.running():
            run.look(time.monotonic())
        blocked = False  # by a step earlier in the order, that waits for GPUs
        for step in list(self.waiting):
            if missing := self._missing(step):
                self.left_out[step.name] = missing
                self.waiting.remove(step)
            elif step.gpus and blocked:
                continue
            elif self._ready(step) and (found := self._place(step)) is not None:
                self.waiting.remove(step)
                self.runs.append(self._start(step, found))
            else:
                blocked |= step.gpus > 0
        if not self.waiting and all(run.step.at_go for run in self.running()):
            (self.out / "go").touch()

    def _missing(self, step: Step) -> str:
        """Why a step can never run; empty while it may."""
        if step.gpus > self.gpus:
            return f"needs {step.gpus} GPUs"
        option, module = step.command[1:3] if len(step.command) > 2 else ("", "")
        if option == "-m" and module.startswith("benchmarks.") and importlib.util.find_spec(module) is None:
            return f"no {module}"
        failed = {run.step.name for run in self.runs if run.result not in ("", "ok")} | set(self.left_out)
        return " ".join(f"{name} failed" for name in step.needs if name in failed)

    def _ready(self, step: Step) -> bool:
        """Whether what it needs has succeeded; what was not asked for counts as done before."""
        asked = {run.step.name for run in self.runs} | {other.name for other in self.waiting}
        done = {run.step.name for run in self.runs if run.result == "ok"}
        ended = {run.step.name for run in self.runs if run.result}
        return all(name in done for name in step.needs if name in asked) and all(
            name in ended for name in step.after if name in asked
        )

    def _place(self, step: Step) -> list[int] | None:
        """The GPUs for a step, the least busy first; None while there are too few."""
        holders = [run for run in self.running() if not run.step.at_go]
        load = {gpu: [run for run in holders if gpu in run.gpus] for gpu in range(self.gpus)}
        in_the_way = {gpu: [run for run in runs if step.alone or run.step.alone] for gpu, runs in load.items()}
        free = sorted((gpu for gpu in load if not in_the_way[gpu]), key=lambda gpu: len(load[gpu]))
        return free[: step.gpus] if len(free) >= step.gpus else None

    def _start(self, step: Step, gpus: list[int]) -> Run:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **CACHES, **step.environment}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if step.gpus and len(gpus) < self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with (self.out / f"{step.name}.log").open("w") as log:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        print(f"{step.name}: started on GPUs {gpus}" if step.gpus else f"{step.name}: started", flush=True)
        return Run(step, process, gpus, time.monotonic())

    def run(self, seconds: float) -> None:
        """Until everything has ended, or for `seconds`."""
        deadline = time.monotonic() + seconds
        while self.waiting or self.running():
            self.advance()
            if time.monotonic() > deadline:
                for run in self.running():
                    run.stop("cut off")
                self.left_out |= {step.name: "no time left" for step in self.waiting}
                return
            time.sleep(0.2)

    def report(self) -> int:
        """The table; 1 if anything failed."""
        for run in self.runs:
            lines = (self.out / f"{run.step.name}.log").read_text(errors="replace").strip().splitlines() or [""]
            print(f"{run.step.name:17s} {run.result:9s} {run.seconds:5.0f} s  {lines[-1][:110]}")
        for name, reason in self.left_out.items():
            print(f"{name:17s} left out         {reason}")
        return 1 if any(run.result != "ok" for run in self.runs) else 0


# ---- What comes back -----------------------------------------------------------------------------------------------


def unpack_compiled(archive: Path, folder: Path) -> None:
    """What an earlier session's servers compiled. ninja would compile it anew, 30 s for one kernel that every request
    waits for, since the headers were installed after it: from now on it counts as newer.
    """
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    now = time.time()
    for log in folder.rglob(".ninja_log"):
        for made in log.parent.iterdir():
            os.utime(made, (now, now))
        try:
            subprocess.run(["ninja", "-C", log.parent, "-t", "restat"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:  # a start is slower then, and the session goes on
            print(f"{log.parent} will be compiled anew: {error}", flush=True)


def pack(out: Path, folder: Path) -> None:
    """results.tar.gz of the steps' JSON and logs and the servers' logs; jit.tar.gz of what was compiled."""
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        for path in [*folder.glob("*.json"), *folder.glob("*.log"), *(ROOT / "build").glob("gpu-*.log")]:
            archive.add(path, path.name)
    if JIT.exists():
        with tarfile.open(out / "jit.tar.gz", "w:gz") as archive:
            archive.add(JIT, ".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the two archives")
    parser.add_argument("--commit", default="unknown", help="of the sources, for the result files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps (what they need counts as done)")
    parser.add_argument("--launch", nargs="+", default=CHECKED, metavar="LAUNCH", help="those that `serve` checks")
    parser.add_argument("--seconds", type=float, default=580, help="for all steps together")
    parser.add_argument("--gpus", type=int, help="how many to use (default: all)")
    parser.add_argument("--jit", type=Path, help="jit.tar.gz of an earlier session")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    options = parser.parse_args()
    folder = ROOT / "build" / "session"
    every = steps(folder, options.commit, options.launch)
    if options.list:
        print("\n".join(f"{step.name:17s} {' '.join(step.command)}" for step in every))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if unknown := set(options.only or ()) - {step.name for step in every}:
        parser.error(f"no such step: {' '.join(sorted(unknown))}; see --list")
    for place in (folder, options.out, JIT):
        place.mkdir(parents=True, exist_ok=True, mode=0o700 if place == JIT else 0o777)
    if JIT.is_symlink() or JIT.stat().st_uid != os.getuid():  # what lies there is run
        parser.error(f"{JIT} belongs to somebody else: remove it")
    (folder / "go").unlink(missing_ok=True)
    if options.jit and options.jit.exists():
        unpack_compiled(options.jit, JIT)
    session = Session([step for step in every if not options.only or step.name in options.only],
                      options.gpus if options.gpus is not None else count_gpus(), folder)  # fmt: skip
    session.run(options.seconds)
    pack(options.out, folder)
    return session.report()


def count_gpus() -> int:
    return len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.splitlines())


if __name__ == "__main__":
    sys.exit(main())
