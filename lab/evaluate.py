"""What clipping costs: a lab's model under every method, at equal rows of the fullest rank.

    python -m lab.evaluate [--suite digits] [--reduced]        # reduced: 15 minutes on two CPU cores
    python -m lab.evaluate --suite documents --checkpoint FOLDER
    python -m lab.evaluate --suite documents-small --reduced   # the model that a CPU trains, on a CPU

Batches of mixed requests, their tokens on virtual source ranks (8; 16 and 32 in parts of their own), go through the
model; at every MoE layer the product's operators (or a baseline) decide what is dispatched. All methods get the same
requests, so they are paired. Writes docs/results/quality*.json, which lab/plot.py turns into pictures and tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from lab import lab_calibration, lab_checkpoint, lab_entropy, lab_plans, lab_result
from lab.lab_cases import Course, run_work, share_of, work_of
from lab.lab_judge import RANKS
from lab.lab_statistics import LEARNED, MASTERED, Findings, merged
from lab.lab_suites import SUITES
from sglang_macs.plan import profile

START = time.monotonic()  # of the process
LAST_CASE = 60.0  # seconds that workers get, after the time given, for the case that they are at


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="digits")
    parser.add_argument("--checkpoint", type=Path, help="default: the suite's")
    parser.add_argument("--material", type=Path, help="of lab_material.py, where scikit-learn is missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="default: docs/results/quality.json, quality_documents_reduced.json, ..."
    )
    parser.add_argument("--reduced", action="store_true", help="fewer batches, bounds 1.0, 1.05 and 1.2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, help="per seed and mix (default 8; reduced 1)")
    parser.add_argument("--sweep-batches", type=int, help="the same for the other parts (4; 1)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the run, after which no case begins")
    parser.add_argument("--workers", type=int, help="processes (default: the CPU's cores; 6 on a GPU)")
    parser.add_argument("--bounds", type=float, nargs="*")
    parser.add_argument("--skip", nargs="*", default=[], choices=lab_plans.PARTS)
    parser.add_argument("--shard", help="I/N: only every N-th case from the I-th on, findings kept beside --out")
    parser.add_argument("--merge", action="store_true", help="only put together what workers have left beside --out")
    options = parser.parse_args(arguments)
    suite = "" if options.suite == "digits" else f"_{options.suite.replace('-', '_')}"
    name = f"quality{suite}{'_reduced' if options.reduced else ''}.json"
    options.out = options.out or lab_checkpoint.ROOT / "docs" / "results" / name
    options.checkpoint = options.checkpoint or SUITES[options.suite].checkpoint
    options.workers = options.workers or (6 if options.device.startswith("cuda") else os.cpu_count())
    options.bounds = options.bounds or ((1.0, 1.05, 1.2) if options.reduced else lab_plans.BOUNDS)
    options.batches = options.batches or (1 if options.reduced else 8)
    options.sweep_batches = options.sweep_batches or (1 if options.reduced else 4)
    return options


def shard_file(out: Path, index: int) -> Path:
    return out.with_suffix(f".shard-{index}.json")


def shard_files(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.stem}.shard-*.json"))


@torch.no_grad()
def run_shard(options: argparse.Namespace, index: int, of: int) -> None:
    """One worker's cases; its findings are on disk after each."""
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the cores are the workers'
    dtype = torch.float32  # also on a GPU: what is measured is clipping, not rounding
    model = lab_checkpoint.load(options.checkpoint, device)
    model.experts_by = "dense" if device.type == "cuda" else "loop"
    suite = SUITES[options.suite]
    make, other = suite.makers(options.checkpoint / "tokenizer.json", options.material)
    calibrated = profile.load(str(options.checkpoint / "profile.json"))  # recorded on training samples
    modality = lab_plans.modality_of(model, calibrated)
    course = Course(model, make, suite.mixes, dtype, range(options.seeds), START + options.seconds)
    parts = lab_plans.parts_of(options, course, other, modality)
    result = {
        "schema": "sglang-macs/quality/1",
        "suite": suite.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "reduced": options.reduced,
        "ranks": RANKS,
        "learned": MASTERED if suite.name == "digits" else LEARNED,
        "ocr": suite.ocr,
        "seeds": list(range(options.seeds)),
        "mixes": suite.mixes,
        "architecture": asdict(model.arch),
    }

    def keep(found: dict[str, Findings]) -> None:
        raw = result | {"findings": {name: f.to_json() for name, f in found.items()}}
        whole = shard_file(options.out, index)
        new = whole.with_suffix(".new")
        new.write_text(json.dumps(raw))
        os.replace(new, whole)

    # First what one worker has alone: cases can be cut off.
    if index == 0 and "drift" not in options.skip and suite.material:
        result["drift"] = lab_calibration.drift(model, make, other, suite.sample, dtype)
    if index == of - 1 and "entropy" not in options.skip:
        result["entropy"] = lab_entropy.study(course, course.seeds)
    keep(run_work(course, parts, share_of(work_of(course, parts), index, of), keep))


def run_workers(options: argparse.Namespace) -> None:
    """As many processes as asked for, each with its share of the cases; a GPU cannot be shared by forking."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for old in shard_files(options.out):
        old.unlink()
    command = [sys.executable, *sys.orig_argv[1:], "--shard"]
    workers = [subprocess.Popen([*command, f"{i}/{options.workers}"]) for i in range(options.workers)]
    ends = START + options.seconds + LAST_CASE
    while any(w.poll() is None for w in workers) and time.monotonic() < ends:
        time.sleep(0.2)
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    failed = [w.args[-1] for w in workers if w.wait() != 0]
    if failed:
        print(f"workers {', '.join(failed)} failed or had no time left; what they had found counts", flush=True)


def main() -> None:
    options = options_of()
    if options.shard:
        return run_shard(options, *map(int, options.shard.split("/")))
    if not options.merge:
        run_workers(options)
    files = shard_files(options.out)
    if not files:
        raise SystemExit(f"nothing to merge: no {options.out.stem}.shard-*.json in {options.out.parent}")
    result = {**merged([json.loads(f.read_text()) for f in files]), "seconds": round(time.monotonic() - START, 1)}
    lab_result.write(options.out, result)
    print(f"wrote {options.out} ({result['seconds']:.0f} s)")
    print_summary(result)


def print_summary(result: dict) -> None:
    """The lines that matter most."""
    for row in [row for part in ("main", "replicas") if part in result for row in result[part]["rows"]]:
        if row["bound"] in (None, 1.0, 1.05):
            kept, low, high = (100 * x for x in row["kept"])
            print(
                f"{row['bound'] or '':>5} {row['method']:<22} kept {kept:6.2f} % [{low:.2f}, {high:.2f}]  "
                f"KL {row['kl']:.4f}  clipped {100 * row['share']['clipped']:.1f} %  "
                f"worst {row['max_rank_rows_after']['worst']:.3f}"
            )


if __name__ == "__main__":
    main()
