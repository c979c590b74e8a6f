"""Trains the lab's models on one GPU: that of digits in under ten minutes, that of documents in ten to twenty.

    python -m lab.train --out OUT [--suite digits] [--minutes 8] [--material material.npz]
    python -m lab.train --out OUT --suite documents --call-seconds 530               # all of it in this call
    python -m lab.train --out OUT --suite documents --minutes 20 --call-seconds 530  # and the same with --resume
    python -m lab.train --out OUT --suite documents-small --minutes 12      # two CPU cores

Digits are drawn on the device; documents by other processes (lab_stock.py). The step is one CUDA graph. The learning
rate follows the clock, so that the budget is used whatever the machine's speed. Writes the weights (bf16) and
OUT/train.json at every report, and OUT/state.pt every two minutes, from which `--resume` goes on: a run that is cut
off leaves its latest state. Judged on samples that training never sees.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from lab import lab_checkpoint, lab_material, lab_stock
from lab.lab_architecture import EXPERTS_BY, GLM, Architecture
from lab.lab_judge import RANKS, as_batch, by_task, exact, expert_rows, max_over_mean
from lab.lab_model import LabModel, initialise
from lab.lab_suites import SUITES, Mix, Suite
from lab.lab_tasks import Maker
from lab.lab_tokens import Vocabulary, document_tokenizer, train_tokenizer
from lab.lab_trainer import BALANCE, BALANCE_OVER, BIAS_BAND, BIAS_STEP, TARGET, Trainer

START = time.monotonic()  # of the process
MINUTES = 8.0  # of training, where neither they nor the call's seconds are given
SAVE_EVERY = 120.0  # seconds
ROUND = 10  # steps that a GPU is given at once; as many new batches are taken up meanwhile
STOCK_BATCHES = 400  # batches' rows that are held on the device; a tenth of it on a CPU
STOCK_SHARE, STOCK_SECONDS = 0.3, 40.0  # of which so much is waited for before the first step, or so long


class Restart(Exception):
    """Why this process has to start anew, and the options that it then gets besides."""


@torch.no_grad()
def judge(model: LabModel, batches: list, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Accuracy by "task/size"; and by layer the mean imbalance of ranks and of experts."""
    right: dict[str, list[bool]] = {}
    ranks, experts = [], []
    for groups in batches:
        logits, routings = model([as_batch(g) for g in groups], dtype=dtype)
        answers = [exact(x, g.labels) for x, g in zip(logits, groups, strict=True)]
        for name, rows in by_task(groups, answers).items():
            right.setdefault(name, []).extend(rows)
        rows = [expert_rows(r, model.arch.experts) for r in routings]
        ranks.append([float(max_over_mean(r)) for r in rows])
        experts.append([float(max_over_mean(r, model.arch.experts)) for r in rows])
    mean = {"ranks": torch.tensor(ranks).mean(0).tolist(), "experts": torch.tensor(experts).mean(0).tolist()}
    return {k: sum(v) / len(v) for k, v in right.items()}, mean


def report(trainer: Trainer, batches: list, out: Path, log: list[dict], step: int, seconds: float, meta: dict) -> None:
    """Judge, print and save the present weights."""
    accuracy, imbalance = judge(trainer.model, batches, trainer.dtype)
    tasks: dict[str, list[float]] = {}
    for name, value in accuracy.items():
        tasks.setdefault(name.split("/")[0], []).append(value)
    per_task = {k: sum(v) / len(v) for k, v in tasks.items()}
    log.append({"step": step, "seconds": round(seconds, 1), "accuracy": accuracy, "imbalance": imbalance})
    log[-1] |= {"loss": round(float(trainer.figures[0]), 4)}
    shown = " ".join(f"{k} {100 * v:.1f}" for k, v in per_task.items())
    print(f"[{seconds:5.0f} s, step {step}] held out: {shown}", flush=True)
    print("    by size: " + " ".join(f"{k} {100 * v:.0f}" for k, v in accuracy.items()), flush=True)
    print("    max/mean of ranks by layer: " + " ".join(f"{x:.2f}" for x in imbalance["ranks"]), end="")
    print("   of experts: " + " ".join(f"{x:.2f}" for x in imbalance["experts"]), flush=True)
    lab_checkpoint.save_weights(trainer.model, out)
    (out / "train.json").write_text(json.dumps({**meta, "log": log}))


def held_out_batches(suite: Suite, make, mix: Mix) -> list:
    """Fixed batches to judge on: every task by itself, and mixed ones as in training for the imbalance."""
    batches = [[make.group(s, suite.judged[s])] for s in mix for _ in range(suite.repeats[s])]
    return batches + [make.batch(mix) for _ in range(2)]


def grouped_works(suite: Suite, device: torch.device) -> bool:
    """Whether grouped products give what the dense ones give here, forwards and backwards; tried in a process of its
    own, for a failure on a GPU can take its process along.
    """
    call = [sys.executable, "-m", "lab.train", "--check-grouped", "--device", str(device), "--suite", suite.name]
    # Outside of MPS, where a fault would end all processes that share the GPU.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_MPS")}
    try:
        return subprocess.run([*call, "--out", "."], timeout=120, check=False, env=alone).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def check_grouped(arch: Architecture, device: torch.device, dtype: torch.dtype) -> None:
    """Raises where grouped and dense experts disagree."""
    torch.manual_seed(0)
    model = LabModel(arch)
    initialise(model, 0)
    experts = model.moe(arch.dense).experts.to(device)
    tokens = 5000  # uneven groups, and an expert without rows
    ids = torch.rand(tokens, arch.experts - 1, device=device).pow(3).topk(arch.top_k).indices
    weights = torch.rand(tokens, arch.top_k, device=device)
    found = []
    for by in ("dense", "grouped"):
        x = torch.linspace(-1, 1, tokens * arch.hidden, device=device).sin().view(tokens, -1).to(dtype).requires_grad_()
        out = experts(x, ids, weights, by)
        gradients = torch.autograd.grad(out.square().sum(), [x, *experts.parameters()])
        found.append([out.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        error = float((one.float() - other.float()).norm() / one.float().norm())
        if not error < 0.04:  # bf16 rounds the gates at different places
            raise SystemExit(f"grouped and dense experts differ by {error:.3f}")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default="digits")
    parser.add_argument("--minutes", type=float, help=f"of all calls (default: this call's, or {MINUTES})")
    parser.add_argument("--call-seconds", type=float, default=math.inf, help="of this call, its start-up included")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, if it is there")
    parser.add_argument("--material", type=Path, help="of lab_material.py, where scikit-learn is missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=400, help="steps")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--batch", type=float, default=1.0, help="times the suite's samples of a step")
    parser.add_argument("--sizes", nargs="*", help="only these picture sizes")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--workers", type=int, help="processes that draw documents (default: the cores but two)")
    parser.add_argument("--experts-by", choices=EXPERTS_BY, help="default: grouped where that works")
    parser.add_argument("--check-grouped", action="store_true", help="only compare grouped with dense experts")
    parser.add_argument("--judge-every", type=float, default=60.0, help="seconds between reports")
    parser.add_argument("--no-graph", action="store_true", help="steps run one kernel at a time")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    device, suite = torch.device(options.device), SUITES[options.suite]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.check_grouped:
        return check_grouped(suite.architecture, device, dtype)
    if options.experts_by is None:
        by = "dense" if device.type == "cuda" else "loop"
        options.experts_by = "grouped" if grouped_works(suite, device) else by
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    mix = mix_of(suite, options)
    words = prepare(options.out, suite.architecture, device)
    draw, stock = source(suite, options, mix, words)
    try:
        trainer = Trainer(
            suite.architecture,
            *(draw, device, options.lr, options.seed, dtype, options.experts_by, options.optimizer, options.warmup),
        )
        trainer.set_rate(0, 0.0)
        run(trainer, suite, options, mix, stock)
    finally:
        if stock is not None:
            stock.end()


def mix_of(suite: Suite, options: argparse.Namespace) -> Mix:
    """The samples of a step that are asked for."""
    mix = {
        size: {t: max(1, round(options.batch * n)) for t, n in tasks.items() if not options.tasks or t in options.tasks}
        for size, tasks in suite.train.items()
        if not options.sizes or size in options.sizes
    }
    return {size: tasks for size, tasks in mix.items() if tasks}


def prepare(out: Path, arch: Architecture, device: torch.device) -> Vocabulary:
    """OUT's folder, tokenizer and description of the architecture."""
    out.mkdir(parents=True, exist_ok=True)
    lab_checkpoint.write_architecture(out, arch)
    (document_tokenizer() if arch.family == GLM else train_tokenizer()).save(str(out / "tokenizer.json"))
    return Vocabulary(out / "tokenizer.json", device)


def source(suite: Suite, options: argparse.Namespace, mix: Mix, words: Vocabulary) -> tuple:
    """What draws a batch, and the stock that it draws from, if any."""
    if suite.material:
        make = Maker(words, lab_material.load("train", words.device, options.material), "train")
        return partial(make.batch, mix), None
    batches = STOCK_BATCHES if words.device.type == "cuda" else STOCK_BATCHES // 10
    stock = lab_stock.Stock(mix, batches, options.out / "stock", words.device)
    count = max(1, (os.cpu_count() or 2) - 2) if options.workers is None else options.workers
    seed = int(time.time()) if options.resume else options.seed  # other samples than before the interruption
    stock.workers = lab_stock.start_workers(count, mix, stock.folder, options.out / "tokenizer.json", seed)
    try:
        stock.fill(STOCK_SHARE, STOCK_SECONDS)
    except BaseException:
        stock.end()
        raise
    print("stock: " + " ".join(f"{k} {int(r.held)} rows" for k, r in stock.rings.items()), flush=True)
    return stock.batch, stock


def meta_of(trainer: Trainer, suite: Suite, options: argparse.Namespace, mix: Mix) -> dict:
    """What the log says of the run as a whole."""
    name = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu"
    meta = {"suite": suite.name, "architecture": trainer.model.arch.to_json(), "mix": mix}
    meta |= {"balance": [BALANCE, BALANCE_OVER, TARGET], "bias": [BIAS_STEP, *BIAS_BAND]}
    kept = ("seed", "lr", "warmup", "experts_by", "optimizer")
    return {**meta, **{k: getattr(options, k) for k in kept}, "device": name, "torch": torch.__version__}


def capture_or_restart(trainer: Trainer, options: argparse.Namespace) -> None:
    """A failed capture can leave the device's generator unusable: then the process has to start anew, with less."""
    try:
        trainer.capture()
        print("step captured as a CUDA graph", flush=True)
    except torch.OutOfMemoryError:
        raise Restart(f"a batch of {options.batch:g} does not fit", "--batch", str(options.batch / 2)) from None
    except RuntimeError as error:
        less = ["--no-graph"] if options.experts_by == "dense" else ["--experts-by", "dense"]
        raise Restart(f"no CUDA graph ({error})", *less) from None


def run(trainer: Trainer, suite: Suite, options: argparse.Namespace, mix: Mix, stock) -> None:
    """Steps until the time is up, with reports."""
    held_out, _ = suite.makers(options.out / "tokenizer.json", options.material, trainer.device)
    batches, meta = held_out_batches(suite, held_out, mix), meta_of(trainer, suite, options, mix)
    state, (step, before, log) = options.out / "state.pt", (0, 0.0, [])
    if options.resume and state.exists():
        step, before, log = trainer.restore(state)
        print(f"resumed at step {step}, {before:.0f} s", flush=True)
    describe(trainer, mix, options)
    if trainer.device.type == "cuda" and not options.no_graph:
        capture_or_restart(trainer, options)
    start, first = time.monotonic(), step
    budget, left = schedule(options, before, start - START)
    meta["minutes"] = round(budget / 60, 2)
    judged = saved = printed = elapsed = 0.0
    while before + elapsed < budget and elapsed < left:
        trainer.set_rate(step, (before + elapsed) / budget)
        trainer.step()
        step += 1
        if step % ROUND == 0:
            if stock is not None:
                stock.refill(ROUND)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()  # the clock, and the host not far ahead
            if elapsed - printed > 10:
                printed = elapsed
                new = math.nan if stock is None else stock.taken / ((step - first) * samples_of(mix))
                if not print_figures(trainer, step, (step - first) / elapsed, before + elapsed, new):
                    start_again(options)
        if elapsed - judged > options.judge_every:
            judged = elapsed
            report(trainer, batches, options.out, log, step, before + elapsed, meta)
        if elapsed - saved > SAVE_EVERY:
            saved = elapsed
            trainer.save(state, step, before + elapsed, log)
        elapsed = time.monotonic() - start
    trainer.save(state, step, before + elapsed, log)
    report(trainer, batches, options.out, log, step, before + elapsed, meta)


def schedule(options: argparse.Namespace, before: float, start_up: float) -> tuple[float, float]:
    """Seconds of training over all calls, which the learning rate follows, and of them those that this call has left.

    before: of earlier calls.
    """
    left = options.call_seconds - start_up
    if options.minutes:
        return 60 * options.minutes, left
    return (before + left, left) if math.isfinite(left) else (60 * MINUTES, left)


def samples_of(mix: Mix) -> int:
    return sum(sum(tasks.values()) for tasks in mix.values())


def describe(trainer: Trainer, mix: Mix, options: argparse.Namespace) -> None:
    """What a step works on, and what it will take of the device."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    groups = trainer.draw()
    tokens = sum(g.ids.numel() for g in groups)
    visual = sum(0 if g.size is None else len(g.ids) * g.size.pictures * g.size.tokens for g in groups)
    samples = samples_of(mix)
    print(f"{parameters / 1e6:.2f} M parameters; experts {options.experts_by}; {RANKS} ranks", flush=True)
    print(f"a step: {samples} samples, {tokens} tokens, {visual} of them visual", flush=True)


def print_figures(trainer: Trainer, step: int, speed: float, elapsed: float, new: float) -> bool:
    """Of the latest step; whether its loss is finite. new: samples that were drawn over those that were used; NaN where
    each batch is drawn for itself.
    """
    loss, right, *over = trainer.figures.tolist()
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if trainer.device.type == "cuda" else ""
    print(
        f"{elapsed:5.0f} s step {step} ({speed:.1f}/s{memory}) answer loss {loss:.3f}, right tokens "
        f"{100 * right:.1f} %, max/mean {min(over):.2f}..{max(over):.2f}"
        + ("" if math.isnan(new) else f", new samples {100 * new:.0f} %"),
        flush=True,
    )
    return math.isfinite(loss)


def start_again(options: argparse.Namespace) -> None:
    """After a loss that is not finite: anew with AdamW at half the rate, in the time that is left of the call."""
    if options.optimizer == "adamw":
        raise SystemExit("the loss is not finite; lower --lr")
    (options.out / "state.pt").unlink(missing_ok=True)
    raise Restart("the loss is not finite", "--optimizer", "adamw", "--lr", str(options.lr / 2))


if __name__ == "__main__":
    try:
        main()
    except Restart as restart:
        why, *less = restart.args
        less += ["--call-seconds", f"{options_of().call_seconds - (time.monotonic() - START):.0f}"]
        print(f"{why}; starting again with {' '.join(less)}", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *less])
