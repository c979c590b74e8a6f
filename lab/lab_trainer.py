"""A model, its optimisers and one training step, as a CUDA graph where there is one."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.lab_architecture import GLM, Architecture, Routing
from lab.lab_judge import as_batch, expert_rows, max_over_mean
from lab.lab_layers import scores
from lab.lab_model import LabModel, initialise
from lab.lab_muon import Muon
from lab.lab_tasks import NO_LABEL, Group

WARMUP_STEPS = 400
DECAY = 0.1  # of weight matrices
BALANCE = 0.0005  # weight of the usual balance loss, and what is added to it in layers over the target
BALANCE_OVER, TARGET = 0.02, 1.8  # real models' fullest of 8 ranks has 1.27 to 1.95 times the mean
# Of GLM-4.5V's kind: how far a correction bias moves in a step, down where an expert has more rows than so many times
# the mean, up where it has fewer (DeepSeek-V3's way, but for the band: real models are uneven).
BIAS_STEP, BIAS_BAND = 0.001, (0.6, 1.5)


class Trainer:
    """Model, optimiser and one step; `step()` leaves its figures in `figures` [2 + MoE layers].

    draw: a batch of training samples, on `device`.
    """

    def __init__(
        self,
        arch: Architecture,
        draw: Callable[[], list[Group]],
        device: torch.device,
        lr: float,
        seed: int,
        dtype: torch.dtype,
        experts_by: str,
        optimizer: str = "muon",
        warmup: int = WARMUP_STEPS,
    ):
        self.device, self.dtype, self.draw, self.peak, self.warmup = device, dtype, draw, lr, warmup
        self.model = LabModel(arch)
        initialise(self.model, seed)
        self.model.to(device)
        self.model.experts_by = experts_by
        self.optimizers = optimizers_of(self.model, lr, optimizer, device)
        self.figures = torch.zeros(2 + len(arch.moe_layers), device=device)  # answer loss, right tokens, imbalances
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
        groups = self.draw()
        logits, routings = self.model([as_batch(g) for g in groups], dtype=self.dtype)
        flat = torch.cat([x.flatten(0, 1) for x in logits])
        labels = torch.cat([g.labels.flatten() for g in groups])
        weight = torch.cat([_token_weights(g.labels) for g in groups])
        answer = (F.cross_entropy(flat, labels, ignore_index=NO_LABEL, reduction="none") * weight).sum() / weight.sum()
        by_bias = self.model.arch.family == GLM
        loss = answer
        imbalance = []
        for routing in routings:
            balance, over_mean = _balance(routing, self.model.arch)
            if not by_bias:
                loss = loss + balance * (BALANCE + BALANCE_OVER * (over_mean > TARGET))
            imbalance.append(over_mean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            if by_bias:
                move_biases(self.model, routings)
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
        rate = self.peak * min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def save(self, file: Path, step: int, seconds: float, log: list[dict]) -> None:
        """All that training goes on from; the file is replaced whole."""
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save({**state, "step": step, "seconds": seconds, "log": log}, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    def restore(self, file: Path) -> tuple[int, float, list[dict]]:
        """Step, seconds and log of `save`; before `capture`, which takes the optimisers' memory as it is."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"], state["log"]


def optimizers_of(model: LabModel, lr: float, kind: str, device: torch.device) -> list[torch.optim.Optimizer]:
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


def move_biases(model: LabModel, routings: list[Routing]) -> None:
    """The correction biases of a GLM-4.5V, one step against the load of this batch."""
    low, high = BIAS_BAND
    for routing in routings:
        rows = expert_rows(routing, model.arch.experts)
        load = rows / rows.mean().clamp(min=1e-9)
        step = BIAS_STEP * ((load < low).float() - (load > high).float())
        model.moe(routing.layer).gate.e_score_correction_bias.add_(step)


def _token_weights(labels: Tensor) -> Tensor:
    """[n * L] f32: a row counts as the square root of its answers' tokens. Were all tokens alike, talks would drown
    one-word answers; were all rows alike, a long answer's tokens would count for nothing.
    """
    asked = (labels != NO_LABEL).float()
    return (asked / asked.sum(1, keepdim=True).clamp(min=1).sqrt()).flatten()


def _balance(routing: Routing, arch: Architecture) -> tuple[Tensor, Tensor]:
    """Switch's balance loss (1 = even), and the fullest rank over the mean."""
    rows = expert_rows(routing, arch.experts)
    valid = (routing.ids[:, :1] >= 0).float()
    probability = F.normalize(scores(routing.logits, arch.scoring), p=1.0, dim=-1)
    share = (probability * valid).sum(0) / valid.sum()
    return arch.experts * (rows / rows.sum() * share).sum(), max_over_mean(rows)
