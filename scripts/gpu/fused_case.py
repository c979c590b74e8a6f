"""A group of ranks in front of the fused dispatch: its inputs on the host, and its poisoned memory on any device."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace

import fused_c as fc
import kernels_c as c
import torch
from kernel_case import POISON, Config, Inputs, make_inputs

GUARD = 256  # bytes of poison on either side of every buffer
PLAN_OUTPUTS = ("new_ids", "new_weights", "weight", "counts", "cut", "sums")


@dataclass(frozen=True)
class FusedConfig:
    """Policy and sizes of a group's dispatch; `plan.T` is the most tokens of a rank, `tokens` what each really has."""

    plan: Config
    tokens: tuple[int, ...]
    blocks: int = 4
    format: str = "bfloat16"
    expert_rows: int = 0  # 0: packed
    alignment: int = 128
    max_rows: int = 0  # 0: as many as may ever come
    needs_entropy: bool = True
    row_experts: bool = False
    copies_outputs: bool = False  # combine gets the experts' outputs outside the region
    timeout_ns: int = 10_000_000_000

    @property
    def local(self) -> int:
        return self.plan.E // self.plan.R

    @property
    def rows(self) -> int:
        """Of every rank's buffer."""
        f = self.plan
        if self.expert_rows:
            return self.local * self.expert_rows
        worst = f.R * f.T * min(f.K, self.local)
        spare = self.local * (self.alignment - 1)
        return self.max_rows or -(-(worst + spare) // self.alignment) * self.alignment or self.alignment

    @property
    def shape(self) -> fc.FusedShape:
        f = self.plan
        return fc.FusedShape(
            f.R, f.E, f.K, f.T, f.H, self.blocks, fc.FORMATS.index(self.format), self.expert_rows, self.rows,
            self.alignment,
        )  # fmt: skip


def masked(config: FusedConfig) -> FusedConfig:
    """The same with rows of their own for every expert, as many as may ever come."""
    return replace(config, expert_rows=max(1, config.plan.R * config.plan.T))


def make_group(config: FusedConfig, seed: int) -> list[Inputs]:
    """Fresh inputs of every rank. The first features of a row say whose it is."""
    ranks = []
    for rank, tokens in enumerate(config.tokens):
        inputs = make_inputs(replace(config.plan, T=tokens), seed * fc.MAX_PEERS + rank)
        marks = torch.arange(tokens)
        for feature, mark in enumerate((torch.full_like(marks, rank), marks // 32, marks % 32)):
            inputs.hidden[:, feature] = mark.to(inputs.hidden.dtype)
        ranks.append(inputs)
    return ranks


class Arena:
    """Buffers with poison around every one."""

    def __init__(self, device: str) -> None:
        self.device, self.guarded = device, []

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: int = POISON) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((size + 2 * GUARD + 256,), POISON, dtype=torch.uint8, device=self.device)
        start = GUARD + -(memory.data_ptr() + GUARD) % 256
        inside = memory[start : start + size]
        inside.fill_(fill)
        self.guarded.append((name, memory[:start], memory[start + size :]))
        return inside.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype, device=self.device)

    def damaged(self) -> list[str]:
        """Names of the buffers beside which something was written."""
        return [
            name for name, before, after in self.guarded if bool((before != POISON).any() | (after != POISON).any())
        ]


@dataclass
class Rank:
    """One rank's tensors: its region, inputs, outputs."""

    region: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    expert_outputs: torch.Tensor | None = field(default=None)


class Group:
    """All ranks of a group in one address space, and the launches over them.

    device: "cuda", or "cpu" for an emulator.
    kernels: called as `kernels("fused_dispatch", params)`; its `library` has the C interface.
    """

    def __init__(self, kernels, config: FusedConfig, device: str = "cuda") -> None:
        self.kernels, self.config = kernels, config
        self.layout = fc.layout_of(kernels.library, config.shape)
        self.arena = Arena(device)
        self.ranks = [self._make_rank(rank) for rank in range(config.plan.R)]
        self.modality = self.arena.buffer("modality", (config.plan.E,), torch.int8)
        self.structs = (fc.FusedRank * config.plan.R)(*(self._struct(rank) for rank in range(config.plan.R)))
        self.many = self.arena.buffer("many", (ctypes.sizeof(self.structs),), torch.uint8)
        self._publish()

    def _make_rank(self, rank: int) -> Rank:
        f, make = self.config.plan, self.arena.buffer
        ids = torch.int64 if f.ids_i64 else torch.int32
        bounds = f.E if f.scope == "expert" else f.R
        name = f"rank {rank} "
        inputs = {
            "hidden_states": make(name + "hidden_states", (f.T, f.H), torch.bfloat16),
            "topk_ids": make(name + "topk_ids", (f.T, f.K), ids),
            "topk_weights": make(name + "topk_weights", (f.T, f.K), torch.float32),
            "segment": make(name + "segment", (f.T,), torch.int32),
            "router_logits": make(name + "router_logits", (f.T, f.E), torch.float32),
        }
        outputs = {
            "new_ids": make(name + "new_ids", (f.T, f.K), ids),
            "new_weights": make(name + "new_weights", (f.T, f.K), torch.float32),
            "weight": make(name + "weight", (f.T,), torch.float32),
            "counts": make(name + "counts", (3, f.E, 2), torch.int32),
            "cut": make(name + "cut", (bounds, 4), torch.int32),
            "sums": make(name + "sums", (4,), torch.int32),
            "combined": make(name + "combined", (f.T, f.H), torch.bfloat16),
        }
        if self.config.row_experts:
            outputs["row_experts"] = make(name + "row_experts", (self.config.rows,), torch.int32)
        region = make(name + "region", (self.layout.bytes,), torch.uint8, fill=0)
        own = make(name + "outputs", (self.config.rows, f.H), torch.bfloat16) if self.config.copies_outputs else None
        return Rank(region, inputs, outputs, own)

    def _struct(self, rank: int) -> fc.FusedRank:
        mine, struct = self.ranks[rank], fc.FusedRank(num_tokens=self.config.tokens[rank], rank=rank)
        for peer, other in enumerate(self.ranks):
            struct.region[peer] = other.region.data_ptr()
        for name, tensor in (*mine.inputs.items(), *mine.outputs.items()):
            setattr(struct, name, tensor.data_ptr())
        if mine.expert_outputs is not None:
            struct.outputs = mine.expert_outputs.data_ptr()
        return struct

    def _publish(self) -> None:
        self.many.copy_(torch.frombuffer(bytearray(bytes(self.structs)), dtype=torch.uint8))

    def load(self, ranks: list[Inputs]) -> None:
        """Puts the inputs of every rank into its tensors (behind its tokens stays poison)."""
        self.modality.copy_(torch.from_numpy(ranks[0].modality))
        for rank, inputs in enumerate(ranks):
            tensors = (inputs.hidden, inputs.ids, inputs.gates, inputs.segment, inputs.logits)
            for target, source in zip(self.ranks[rank].inputs.values(), tensors, strict=True):
                source = source if isinstance(source, torch.Tensor) else torch.from_numpy(source)
                target[: len(source)].copy_(source)
            self.structs[rank].num_tokens = len(inputs.ids)
        self._publish()

    def poison(self) -> None:
        """Outputs, and of the regions what nobody reads before it was written this round."""
        for rank in range(len(self.ranks)):
            for tensor in self.ranks[rank].outputs.values():
                tensor.view(torch.uint8).fill_(POISON) if tensor.numel() else None
            for name in ("rows", "scales", "outputs", "sources", "positions", "received", "starts"):
                self.bytes_of(rank, name).fill_(POISON)

    def bytes_of(self, rank: int, name: str) -> torch.Tensor:
        """A part of a rank's region, to the start of the next part."""
        offsets = [getattr(self.layout, field) for field, _ in fc.FusedLayout._fields_]
        at = [field for field, _ in fc.FusedLayout._fields_].index(name)
        return self.ranks[rank].region[offsets[at] : offsets[at + 1]]

    def part(self, rank: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A part of a rank's region as a tensor."""
        return self.bytes_of(rank, name)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def dispatch_params(self, phase: int = fc.BOTH, launched: int | None = None) -> fc.FusedDispatchParams:
        f = self.config.plan
        return fc.FusedDispatchParams(
            shape=self.config.shape, layout=self.layout, modality=self.modality.data_ptr(),
            bucket_bits=f.bucket_bits, reroute_rounds=f.rounds, num_segments=f.num_segments, ids_are_i64=f.ids_i64,
            needs_entropy=self.config.needs_entropy, protect_text=f.protect_text, scope=c.SCOPES.index(f.scope),
            load=c.LOADS.index(f.load), importance=c.IMPORTANCES.index(f.importance),
            reroute=c.REROUTES.index(f.reroute), scoring=c.SCORINGS.index(f.scoring), gamma=f.gamma, rho=f.rho,
            alpha=f.alpha, c_min=f.c_min, delta=f.delta, phase=phase, timeout_ns=self.config.timeout_ns,
            many=self.many.data_ptr(), launched=f.R if launched is None else launched,
        )  # fmt: skip

    def combine_params(self, phase: int = fc.BOTH, launched: int | None = None) -> fc.FusedCombineParams:
        return fc.FusedCombineParams(
            shape=self.config.shape, layout=self.layout, many=self.many.data_ptr(),
            ids_are_i64=self.config.plan.ids_i64, phase=phase, timeout_ns=self.config.timeout_ns,
            launched=self.config.plan.R if launched is None else launched,
        )  # fmt: skip

    def dispatch(self, phase: int = fc.BOTH, launched: int | None = None) -> None:
        self.kernels("fused_dispatch", self.dispatch_params(phase, launched))

    def combine(self, phase: int = fc.BOTH, launched: int | None = None) -> None:
        self.kernels("fused_combine", self.combine_params(phase, launched))

    def set_outputs(self, outputs: list[torch.Tensor]) -> None:
        """The experts' outputs [rows, H] bf16 of every rank, to where combine takes them from."""
        for rank, rows in enumerate(outputs):
            own, shape = self.ranks[rank].expert_outputs, (self.config.rows, self.config.plan.H)
            target = self.part(rank, "outputs", torch.bfloat16, *shape) if own is None else own
            target.copy_(rows)

    def status(self, rank: int) -> fc.FusedStatus:
        raw = self.bytes_of(rank, "status")[: ctypes.sizeof(fc.FusedStatus)]
        return fc.FusedStatus.from_buffer_copy(raw.cpu().numpy().tobytes())

    def rounds(self) -> list[int]:
        return [int(self.part(rank, "round", torch.int32, 1)) for rank in range(len(self.ranks))]

    def recover(self) -> None:
        """What the host does behind a fault, with every rank at rest: faults cleared, rounds agreed on."""
        following = max(self.rounds()) + 1
        for rank in range(len(self.ranks)):
            self.part(rank, "round", torch.int32, 1).fill_(following)
            self.bytes_of(rank, "status").fill_(0)
