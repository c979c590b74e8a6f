"""Trains and judges the lab's models on one machine with GPUs, each stage in less than ten minutes.

    python3 -m lab.gpu_run train --variants digits --out OUT [--seconds 560]
    python3 -m lab.gpu_run train --variants documents --out OUT [--minutes 16; the same with --resume until it is done]
    python3 -m lab.gpu_run evaluate --out OUT [--seconds 420]
    python3 -m lab.gpu_run both --variants documents-small --seconds 580 --out OUT    # two CPU cores, 20 minutes
    python3 -m lab.gpu_run both --out OUT --smoke        # some minutes: does everything run here?

Needs torch with CUDA, tokenizers, safetensors, scipy, scikit-learn for digits, matplotlib for documents, and nvcc for
the operators (without it they are built for the CPU alone). `train` builds the operators beside the training, and ends
early where no step is made; `evaluate` goes on from what `train` left in build/lab-run. Every 20 seconds OUT gets
NAME.tar.gz of every model: weights, log, profile, findings so far; weights that come in several files lie beside it. A
run that is killed leaves the latest, from which a training can be resumed where build/lab-run is kept; lab.evaluate
--merge makes tables of unfinished findings.

Not benchmarks/gpu/session.py, whose steps end: here stages share what is left of the time, and are ended with it.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "lab-run"
KEEP_EVERY = 20.0  # seconds
FIRST_STEP = 150.0  # seconds within which a training on a GPU has to make a step: imports, stock, products tried, graph
LAST_REPORT = 25.0  # seconds of a training behind its last step: held-out questions, weights, state
MERGING = 80.0  # seconds of an evaluation behind its last case's begin: that case, and the tables


@dataclass(frozen=True)
class Variant:
    """A suite's model to train, and how many processes judge it on how many batches a seed and mix; `sweep_batches` in
    all parts but the main one. reduced: what two CPU cores can judge.
    """

    name: str
    training: tuple[str, ...]
    workers: int
    batches: int
    sweep_batches: int
    reduced: bool = False

    @property
    def folder(self) -> Path:
        return WORK / self.name


VARIANTS = (
    Variant("digits", ("--seed", "7"), workers=8, batches=8, sweep_batches=4),
    # Half the batch, 14 steps a second on an H200: two calls of ten minutes have 14,000.
    Variant("documents", ("--seed", "8", "--batch", "0.5"), workers=8, batches=6, sweep_batches=2),
    Variant(
        "documents-small",
        ("--seed", "7", "--warmup", "100", "--experts-by", "loop", "--workers", "1", "--device", "cpu"),
        workers=2,
        batches=1,
        sweep_batches=1,
        reduced=True,
    ),
)
APART = (
    "state.pt",
    "stock",
    "model-0",
)  # begin of what goes into no archive: what is resumed from, and weights in parts


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this run, as CUDA_VISIBLE_DEVICES names them, and what processes that share them need besides."""

    names: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def of(self, index: int) -> dict[str, str]:
        """Environment of a process on the `index`-th GPU, counted round."""
        return {"CUDA_VISIBLE_DEVICES": self.names[index % len(self.names)], **self.environment} if self.names else {}


class Jobs:
    """Child processes with a log each, spread over the GPUs."""

    def __init__(self, out: Path, gpus: Gpus):
        self.out, self.gpus, self.running = out, gpus, {}

    def start(self, name: str, command: Sequence[object], log: Path, gpu: int = 0, **environment: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self.gpus.of(gpu) | environment
        with log.open("w") as file:
            self.running[name] = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # so that it can be ended with all its own children
            )
        print(f"{name}: {' '.join(map(str, command[1:]))}", flush=True)

    def until(self, happened: Callable[[], bool], names: Sequence[str], seconds: float) -> bool:
        """Whether it has within `seconds`, or before any of these jobs has ended."""
        deadline = time.monotonic() + seconds
        while not happened():
            if any(self.running[n].poll() is not None for n in names) or time.monotonic() > deadline:
                return happened()
            time.sleep(0.5)
        return True

    def wait(self, names: Sequence[str], seconds: float, variants: Sequence[Variant]) -> dict[str, int | None]:
        """Exit codes; what has not ended after `seconds` is ended, None. OUT is kept up to date meanwhile."""
        deadline, kept = time.monotonic() + seconds, time.monotonic()
        while any(self.running[n].poll() is None for n in names) and time.monotonic() < deadline:
            time.sleep(1)
            if time.monotonic() - kept > KEEP_EVERY:
                kept = time.monotonic()
                keep(self.out, variants)
        codes = {}
        for name in names:
            job = self.running.pop(name)
            codes[name] = job.poll()
            if codes[name] is None:
                os.killpg(job.pid, signal.SIGTERM)
        keep(self.out, variants)
        print(f"ended: {codes}", flush=True)
        return codes


def find_gpus() -> Gpus:
    """All of the machine's, or those that CUDA_VISIBLE_DEVICES leaves; asked without starting CUDA in this process."""
    if shutil.which("nvidia-smi") is None:
        return Gpus()
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Gpus(tuple(filter(None, os.environ["CUDA_VISIBLE_DEVICES"].split(","))))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return Gpus(tuple(map(str, range(listed.stdout.count("GPU ")))))


def keep(out: Path, variants: Sequence[Variant]) -> None:
    """OUT/NAME.tar.gz of every model, replaced whole."""
    for variant in variants:
        if variant.folder.exists():
            new = out / f".{variant.name}.new"
            with tarfile.open(new, "w:gz", compresslevel=1) as tar:
                tar.add(variant.folder, variant.name, filter=_archived)
            os.replace(new, out / f"{variant.name}.tar.gz")
            for part in variant.folder.glob("model-0*.safetensors"):
                shutil.copy(part, out / ".part.new")
                os.replace(out / ".part.new", out / part.name)


def _archived(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(member.name).name
    return None if name.endswith(".new") or name.startswith(APART) else member


def tail(log: Path, lines: int = 12) -> None:
    if log.exists():
        print(
            f"--- {log.relative_to(WORK)}", *log.read_text(errors="replace").splitlines()[-lines:], sep="\n", flush=True
        )


@contextmanager
def sharing(gpus: Gpus, processes: int) -> Iterator[Gpus]:
    """The GPUs through MPS where more processes than GPUs run side by side; as they are where it does not work."""
    if processes <= len(gpus.names) or not gpus.names or shutil.which("nvidia-cuda-mps-control") is None:
        yield gpus
        return
    # mkdtemp: the user's alone. Whoever can write to the pipes of the daemon commands it.
    folders = {f"CUDA_MPS_{of}_DIRECTORY": tempfile.mkdtemp(prefix="lab-mps-") for of in ("PIPE", "LOG")}
    # The daemon counts anew those of the GPUs that it is shown: its clients see them as 0, 1, ...
    made = Gpus(tuple(map(str, range(len(gpus.names)))), folders)
    try:
        works = _starts_daemon(gpus, folders) and all(_computes(made.of(i)) for i in range(len(made.names)))
        print(f"MPS {'works' if works else 'does not work: time slices instead'}", flush=True)
        yield made if works else gpus
    finally:
        quit_ = {"input": "quit\n", "text": True, "env": os.environ | folders}
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["nvidia-cuda-mps-control"], check=False, timeout=30, **quit_)
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def _starts_daemon(gpus: Gpus, folders: dict[str, str]) -> bool:
    environment = os.environ | folders | {"CUDA_VISIBLE_DEVICES": ",".join(gpus.names)}
    apart = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)  # no pipe of ours is held open
    try:
        daemon = subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=False, timeout=20, **apart)
    except subprocess.TimeoutExpired:
        return False
    return daemon.returncode == 0


def _computes(environment: dict[str, str]) -> bool:
    """Whether a process of this environment can use its GPU."""
    probe = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').item()"]
    try:
        return subprocess.run(probe, env=os.environ | environment, check=False, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def build_command(cuda: bool) -> tuple[list[str], dict[str, str]]:
    """Builds sglang_macs/_C against the torch that is here, whatever its release."""
    import torch

    release = ".".join(torch.__version__.split(".")[:2])
    environment = {"MACS_TORCH": release, "MACS_CUDA": str(int(cuda)), "MAX_JOBS": "10"}
    return ["nice", sys.executable, "setup.py", "build_ext", "--inplace"], environment


def train(options: argparse.Namespace, gpus: Gpus) -> None:
    """All variants at once, with the operators' build beside them."""
    ends, variants = time.monotonic() + options.seconds, options.variants
    if not options.resume:
        for variant in variants:
            shutil.rmtree(variant.folder, ignore_errors=True)
    with sharing(gpus, len(variants)) as shared:
        jobs, logs, names = Jobs(options.out, shared), variants[0].folder, [v.name for v in variants]
        if options.rebuild or not _has_operators():
            command, environment = build_command(cuda=bool(gpus.names))
            jobs.start("build", command, logs / "build.log", **environment)
        for index, variant in enumerate(variants):
            command = training(variant, options, ends - time.monotonic() - 10 - LAST_REPORT)
            jobs.start(variant.name, command, variant.folder / "train.log", index)
        stepping = all(jobs.until(lambda v=v: _has_stepped(v), [v.name], FIRST_STEP) for v in variants)
        given_up = bool(gpus.names) and not stepping
        codes = jobs.wait(names, 0 if given_up else ends - time.monotonic() - 10, variants)
        for variant in variants:
            tail(variant.folder / "train.log", 40)
        if "build" in jobs.running:
            left = ends - time.monotonic() - 5 if options.stage == "train" else 120
            jobs.wait(["build"], 0 if given_up else max(1.0, left), variants)
            tail(logs / "build.log", 3)
    if given_up:
        raise SystemExit(f"no step within {FIRST_STEP:g} s, or failed before one: given up")
    if failed := [name for name, code in codes.items() if code]:
        raise SystemExit(f"failed: {', '.join(failed)}; what was kept goes on with --resume")


def training(v: Variant, options: argparse.Namespace, seconds: float) -> list[object]:
    """The command that trains a model, in a call of so many seconds."""
    command = [sys.executable, "-m", "lab.train", "--suite", v.name, "--out", v.folder, *v.training]
    command += ["--call-seconds", f"{seconds:.0f}", "--judge-every", f"{min(90, seconds / 3):.0f}"]
    command += ["--minutes", options.minutes] if options.minutes else []
    return command + (["--resume"] if options.resume else [])


def _has_stepped(v: Variant) -> bool:
    log = v.folder / "train.log"
    return log.exists() and "answer loss" in log.read_text(errors="replace")


def evaluate(options: argparse.Namespace, gpus: Gpus) -> None:
    """Calibrates and judges all variants at once."""
    ends, logs = time.monotonic() + options.seconds, options.variants[0].folder
    with sharing(gpus, sum(v.workers for v in options.variants)) as shared:
        jobs = Jobs(options.out, shared)
        for cuda in (True, False) if gpus.names else (False,):  # rather the CPU's operators than none
            if not _has_operators():
                command, environment = build_command(cuda)
                jobs.start("build", command, logs / f"build-{'cuda' if cuda else 'cpu'}.log", **environment)
                jobs.wait(["build"], 150, options.variants)
        device = "cuda" if gpus.names and _operators_take_cuda() else "cpu"
        variants = [v for v in options.variants if _has_weights(v.folder)]
        for index, v in enumerate(variants):
            command = [sys.executable, "-m", "lab.lab_calibration", "--suite", v.name, "--checkpoint", v.folder]
            command += ["--device", device]
            jobs.start(f"calibrate {v.name}", command, v.folder / "calibrate.log", index)
        jobs.wait([f"calibrate {v.name}" for v in variants], 120, variants)
        left = ends - time.monotonic()
        for index, v in enumerate(variants):
            # Without a GPU the cores are shared out as the GPU's processes are.
            share = 1 if device == "cuda" else os.cpu_count() / sum(x.workers for x in variants)
            workers = max(1, int(v.workers * share))
            command = evaluation(v, options.smoke, device, workers, max(5.0, left - MERGING))
            jobs.start(f"evaluate {v.name}", command, v.folder / "evaluate.log", index)
        jobs.wait([f"evaluate {v.name}" for v in variants], left - 5, variants)
    for v in variants:
        tail(v.folder / "calibrate.log", 3)
        tail(v.folder / "evaluate.log", 45)


def evaluation(v: Variant, smoke: bool, device: str, workers: int, seconds: float) -> list[object]:
    """The command that judges a model."""
    command = [sys.executable, "-m", "lab.evaluate", "--suite", v.name, "--checkpoint", v.folder]
    command += ["--out", v.folder / "quality.json"]
    command += ["--device", device, "--workers", workers, "--seconds", int(seconds)]
    command += ["--batches", 1 if smoke else v.batches, "--sweep-batches", 1 if smoke else v.sweep_batches]
    command += ["--seeds", 1] if smoke else []
    return command + (["--reduced"] if v.reduced else [])


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def _has_operators() -> bool:
    return bool(list((ROOT / "sglang_macs").glob("_C*.so")))


def _operators_take_cuda() -> bool:
    probe = "import sys, sglang_macs.ops as o; sys.exit(0 if o.cuda_backend() == 'cuda' else 1)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("train", "evaluate", "both"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="of a stage (training 560, evaluation 420; smoke 100 each)")
    parser.add_argument("--variants", nargs="*", choices=[v.name for v in VARIANTS], default=["digits", "documents"])
    parser.add_argument("--smoke", action="store_true", help="a short training, one batch of each mix")
    parser.add_argument("--minutes", type=float, help="of a training over several calls (default: what this call has)")
    parser.add_argument("--resume", action="store_true", help="go on with what build/lab-run holds")
    parser.add_argument("--rebuild", action="store_true", help="build the operators even if they are there")
    options = parser.parse_args()
    options.variants = [v for v in VARIANTS if v.name in options.variants]
    options.out.mkdir(parents=True, exist_ok=True)
    gpus, given = find_gpus(), options.seconds
    if options.stage in ("train", "both"):
        options.seconds = given or (100 if options.smoke else 560)
        train(options, gpus)
    if options.stage in ("evaluate", "both"):
        options.seconds = given or (150 if options.smoke else 420)
        evaluate(options, gpus)
    print(*(f"{p.name} {p.stat().st_size / 2**20:.1f} MiB" for p in sorted(options.out.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
