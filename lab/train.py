"""Trains the lab's multimodal mixture of experts, on one GPU in under ten minutes.

    python lab/train.py --out OUT [--minutes 8] [--material material.npz]

Every step draws fresh pictures on the device; step, pictures included, is one CUDA graph. The learning rate follows the
clock, so that the budget is used whatever the machine's speed. Writes OUT/model.safetensors (bf16, hub layout) and
OUT/train.json at every report: a run that is cut off leaves its latest state. Judged on digits and sums that training
never sees.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lab_checkpoint
import lab_material
import torch
import torch.nn.functional as F
from lab_judge import RANKS, as_batch, by_task, exact, expert_rows, max_over_mean
from lab_model import EXPERTS_BY, Architecture, LabModel, Routing, initialise, scores
from lab_muon import Muon
from lab_tasks import JUDGED, NO_LABEL, TRAIN_MIX, Group, Maker
from lab_tokens import Vocabulary
from torch import Tensor

WARMUP_STEPS = 400
DECAY = 0.1  # of weight matrices
BALANCE = 0.0005  # weight of the usual balance loss, and what is added to it in layers over the target
BALANCE_OVER, TARGET = 0.02, 1.8  # real models' fullest of 8 ranks has 1.27 to 1.95 times the mean


class Trainer:
    """Model, optimiser and one step; `step()` leaves its figures in `figures` [2 + layers]."""

    def __init__(
        self,
        arch: Architecture,
        make: Maker,
        mix: dict,
        lr: float,
        seed: int,
        dtype: torch.dtype,
        experts_by: str,
        optimizer: str = "muon",
    ):
        self.device, self.dtype, self.make, self.mix, self.peak = make.device, dtype, make, mix, lr
        self.model = LabModel(arch)
        initialise(self.model, seed)
        self.model.to(self.device)
        self.optimizers = _optimizers(self.model, lr, optimizer, self.device)
        self.figures = torch.zeros(2 + arch.layers, device=self.device)  # answer loss, right tokens, imbalance by layer
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self._forget_gradients()
        self._step()

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        groups = self.make.batch(self.mix)
        logits, routings = self.model([as_batch(g) for g in groups], dtype=self.dtype)
        flat = torch.cat([x.flatten(0, 1) for x in logits])
        labels = torch.cat([g.labels.flatten() for g in groups])
        weight = torch.cat([_token_weights(g.labels) for g in groups])
        answer = (F.cross_entropy(flat, labels, ignore_index=NO_LABEL, reduction="none") * weight).sum() / weight.sum()
        loss = answer
        imbalance = []
        for routing in routings:
            balance, over_mean = _balance(routing, self.model.arch)
            loss = loss + balance * (BALANCE + BALANCE_OVER * (over_mean > TARGET))
            imbalance.append(over_mean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            asked = labels != NO_LABEL
            right = ((flat.argmax(-1) == labels) & asked).sum() / asked.sum()
            self.figures.copy_(torch.stack([answer.detach(), right, *imbalance]))

    def capture(self) -> None:
        """Turn the step into a CUDA graph; without one steps still work, more slowly."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def set_rate(self, step: int, progress: float) -> None:
        """Linear warm-up by steps, then a cosine over `progress` in [0, 1] down to 1 %."""
        rate = self.peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _optimizers(model: LabModel, lr: float, kind: str, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for matrices that map features to features, AdamW for all else; or ("adamw") AdamW for everything."""
    cuda = device.type == "cuda"
    named = list(model.named_parameters())
    others = [p for n, p in named if p.ndim <= 1 or "embed" in n]
    heads = [p for n, p in named if "lm_head" in n]
    matrices = [p for n, p in named if p.ndim > 1 and "embed" not in n and "lm_head" not in n]
    made = [Muon(matrices, torch.tensor(lr, device=device) if cuda else lr, DECAY)] if kind == "muon" else []
    groups = [{"params": heads, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    groups += [{"params": matrices, "weight_decay": DECAY}] if kind == "adamw" else []
    rate = torch.tensor(lr, device=device) if cuda else lr
    return [*made, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=cuda, capturable=cuda)]


def _token_weights(labels: Tensor) -> Tensor:
    """[n * L] f32: a row counts as the square root of its answers' tokens. Were all tokens alike, talks would drown
    one-word answers; were all rows alike, a long answer's tokens would count for nothing.
    """
    asked = (labels != NO_LABEL).float()
    return (asked / asked.sum(1, keepdim=True).sqrt()).flatten()


def _balance(routing: Routing, arch: Architecture) -> tuple[Tensor, Tensor]:
    """Switch's balance loss (1 = even), and the fullest rank over the mean."""
    rows = expert_rows(routing, arch.experts)
    valid = (routing.ids[:, :1] >= 0).float()
    probability = F.normalize(scores(routing.logits, arch.scoring), p=1.0, dim=-1)
    share = (probability * valid).sum(0) / valid.sum()
    return arch.experts * (rows / rows.sum() * share).sum(), max_over_mean(rows)


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
    """Judge, print and save the present state."""
    accuracy, imbalance = judge(trainer.model, batches, trainer.dtype)
    tasks: dict[str, list[float]] = {}
    for name, value in accuracy.items():
        tasks.setdefault(name.split("/")[0], []).append(value)
    per_task = {k: sum(v) / len(v) for k, v in tasks.items()}
    log.append({"step": step, "seconds": round(seconds, 1), "accuracy": accuracy, "imbalance": imbalance})
    shown = " ".join(f"{k} {100 * v:.1f}" for k, v in per_task.items())
    print(f"[{seconds:5.0f} s, step {step}] held out: {shown}", flush=True)
    print("    by size: " + " ".join(f"{k} {100 * v:.0f}" for k, v in accuracy.items()), flush=True)
    print("    max/mean of ranks by layer: " + " ".join(f"{x:.2f}" for x in imbalance["ranks"]), end="")
    print("   of experts: " + " ".join(f"{x:.2f}" for x in imbalance["experts"]), flush=True)
    lab_checkpoint.save_weights(trainer.model, out / "new")
    os.replace(out / "new" / "model.safetensors", out / "model.safetensors")
    (out / "train.json").write_text(json.dumps({**meta, "log": log}))


def held_out_batches(make: Maker, sizes: list[str], mixed: dict) -> list[list[Group]]:
    """Fixed batches to judge on: every task by itself, and mixed ones as in training for the imbalance."""
    repeats = {"text": 4, "tiny": 4, "wide": 4, "square": 6, "large": 16, "huge": 24}
    batches = [[make.group(s, JUDGED[s])] for s in sizes for _ in range(repeats[s])]
    return batches + [make.batch(mixed) for _ in range(4)]


def grouped_works(arch: Architecture, device: torch.device) -> bool:
    """Whether grouped products give what the dense ones give here, forwards and backwards; tried in a process of its
    own, for a failure on a GPU can take its process along.
    """
    call = [sys.executable, __file__, "--check-grouped", "--device", str(device), "--experts", str(arch.experts)]
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
    experts = model.model["language_model"].layers[0].mlp.experts.to(device)
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
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--material", type=Path, help="of lab_material.py, where scikit-learn is missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--batch", type=float, default=1.0, help="times the samples of lab_tasks.TRAIN_MIX")
    parser.add_argument("--sizes", nargs="*", help="only these picture sizes")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--scoring", choices=("softmax", "sigmoid"), default="softmax", help="of the router")
    parser.add_argument("--shared", type=int, default=0, help="width of a shared expert")
    parser.add_argument("--experts-by", choices=EXPERTS_BY, help="default: grouped where that works")
    parser.add_argument("--check-grouped", action="store_true", help="only compare grouped with dense experts")
    parser.add_argument("--judge-every", type=float, default=60.0, help="seconds between reports")
    parser.add_argument("--start-from", type=Path, help="a checkpoint to go on with, instead of a random start")
    parser.add_argument("--no-graph", action="store_true", help="steps run one kernel at a time")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arch = replace(
        Architecture(),
        experts=options.experts,
        layers=options.layers,
        scoring=options.scoring,
        shared=options.shared,
    )
    if options.check_grouped:
        return check_grouped(arch, device, dtype)
    if options.experts_by is None:
        options.experts_by = "grouped" if grouped_works(arch, device) else "dense"
    trainer = make_trainer(options, arch, device, dtype)
    held_out = Maker(trainer.make.words, lab_material.load("held_out", device, options.material), "held_out")
    batches = held_out_batches(held_out, list(trainer.mix), trainer.mix)
    samples = sum(sum(tasks.values()) for tasks in trainer.mix.values())
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {samples} samples a step, experts {options.experts_by}", flush=True)
    if device.type == "cuda" and not options.no_graph:
        capture_or_restart(trainer, options.experts_by)
    run(trainer, batches, options, meta_of(trainer, options))
    print(f"{samples} samples a step; {RANKS} ranks", flush=True)


def make_trainer(options: argparse.Namespace, arch: Architecture, device: torch.device, dtype: torch.dtype) -> Trainer:
    """With its data, and OUT's folder and description of the architecture."""
    (options.out / "new").mkdir(parents=True, exist_ok=True)
    (options.out / "lab.json").write_text(json.dumps({"architecture": arch.to_json()}, indent=1) + "\n")
    shutil.copy(lab_checkpoint.CHECKPOINT / "tokenizer.json", options.out)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    words = Vocabulary(lab_checkpoint.CHECKPOINT / "tokenizer.json", device)
    mix = {
        size: {t: max(1, round(options.batch * n)) for t, n in tasks.items() if not options.tasks or t in options.tasks}
        for size, tasks in TRAIN_MIX.items()
        if not options.sizes or size in options.sizes
    }
    mix = {size: tasks for size, tasks in mix.items() if tasks}
    make = Maker(words, lab_material.load("train", device, options.material), "train")
    trainer = Trainer(arch, make, mix, options.lr, options.seed, dtype, options.experts_by, options.optimizer)
    if options.start_from:
        trainer.model.load_state_dict(lab_checkpoint.load(options.start_from, device).state_dict())
    trainer.set_rate(0, 0.0)
    return trainer


def meta_of(trainer: Trainer, options: argparse.Namespace) -> dict:
    """What the log says of the run as a whole."""
    name = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu"
    meta = {
        "architecture": trainer.model.arch.to_json(),
        "mix": trainer.mix,
        "balance": [BALANCE, BALANCE_OVER, TARGET],
    }
    meta |= {"seed": options.seed, "lr": options.lr, "minutes": options.minutes, "experts_by": options.experts_by}
    meta["optimizer"] = options.optimizer
    return {**meta, "device": name, "torch": torch.__version__}


def capture_or_restart(trainer: Trainer, experts_by: str) -> None:
    """A failed capture can leave the device's generator unusable: then the process starts anew, with less."""
    try:
        trainer.capture()
        print("step captured as a CUDA graph", flush=True)
    except RuntimeError as error:
        less = ["--experts-by", "dense"] if experts_by == "grouped" else ["--no-graph"]
        print(f"no CUDA graph ({error}); starting again with {' '.join(less)}", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv, *less])


def run(trainer: Trainer, batches: list, options: argparse.Namespace, meta: dict) -> None:
    """Steps until the time is up, with reports."""
    start, step, judged, printed, budget = time.perf_counter(), 0, 0.0, 0.0, options.minutes * 60
    log: list[dict] = []
    while (elapsed := time.perf_counter() - start) < budget:
        trainer.set_rate(step, elapsed / budget)
        trainer.step()
        step += 1
        if step % 10 == 0:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()  # the clock, and the host not far ahead
            if elapsed - printed > 10:
                printed = elapsed
                if not print_figures(trainer, step, elapsed):
                    start_again(options, budget - elapsed)
        if elapsed - judged > options.judge_every:
            judged = elapsed
            report(trainer, batches, options.out, log, step, elapsed, meta)
    report(trainer, batches, options.out, log, step, time.perf_counter() - start, meta)
    os.rmdir(options.out / "new")


def print_figures(trainer: Trainer, step: int, elapsed: float) -> bool:
    """Of the latest step; whether its loss is finite."""
    loss, right, *over = trainer.figures.tolist()
    print(
        f"{elapsed:5.0f} s step {step} ({step / elapsed:.1f}/s) answer loss {loss:.3f}, right tokens "
        f"{100 * right:.1f} %, max/mean {min(over):.2f}..{max(over):.2f}",
        flush=True,
    )
    return math.isfinite(loss)


def start_again(options: argparse.Namespace, seconds: float) -> None:
    """After a loss that is not finite: anew with AdamW at half the rate, in the time that is left."""
    less = ["--optimizer", "adamw", "--lr", str(options.lr / 2), "--minutes", f"{seconds / 60:.2f}"]
    if options.optimizer == "adamw":
        raise SystemExit("the loss is not finite; lower --lr")
    print(f"the loss is not finite; starting again with {' '.join(less)}", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, *less])


if __name__ == "__main__":
    main()
