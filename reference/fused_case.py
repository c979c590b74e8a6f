"""A group of ranks in front of the fused dispatch: its inputs on the host, and its poisoned memory on any device."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace

import torch

from . import fused_c as fc
from .kernel_case import POISON, Config, Inputs, make_inputs

LAYER = 5  # what a fault is to name
GUARD = 256  # bytes of poison on either side of every buffer
# Of a region, what holds nothing from one epoch to the next: poisoned in between. LL words hold their epoch, and
# `row_scales` are 0 where scales come with rows.
TRANSIENT = ("rows", "scales", "outputs", "sources", "wanted", "positions", "received", "starts")


@dataclass(frozen=True)
class FusedConfig:
    """Policy and sizes of a group's dispatch; `plan.T` is the most tokens of a rank, `tokens` what each really has."""

    plan: Config
    tokens: tuple[int, ...]
    blocks: int = 4
    format: str = "bfloat16"
    scales_with_rows: bool = False  # FP8: as between devices, else as on one
    names_sources: bool = True  # which only checks ask for
    expert_rows: int = 0  # 0: packed
    alignment: int = 128
    max_rows: int = 0  # 0: as many as may ever come
    needs_entropy: bool = True
    row_experts: bool = False
    carried: bool = False  # nothing is planned: fused_carry
    copies_outputs: bool = False  # combine gets the experts' outputs outside the region
    timeout_ns: int = 10_000_000_000

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.plan.E // self.plan.R

    @property
    def rows(self) -> int:
        """Of every rank's buffer."""
        f = self.plan
        if self.expert_rows:
            return self.local * self.expert_rows
        worst = f.R * f.T * min(f.K, self.local)
        spare = self.local * (self.alignment - 1)
        return self.max_rows or -(-(worst + spare) // self.alignment) * self.alignment

    @property
    def shape(self) -> fc.FusedShape:
        f = self.plan
        return fc.FusedShape(
            f.R, f.E, f.K, f.T, f.H, self.blocks, fc.FORMATS.index(self.format), self.expert_rows, self.rows,
            self.alignment,
        )  # fmt: skip


def masked(config: FusedConfig) -> FusedConfig:
    """The same with rows of their own for every expert, as many as may ever come."""
    return replace(config, expert_rows=config.plan.R * config.plan.T)


def make_group(config: FusedConfig, seed: int, device: str = "cpu") -> list[Inputs]:
    """Fresh inputs of every rank. The first features of a row say whose it is."""
    ranks = []
    for rank, tokens in enumerate(config.tokens):
        inputs = make_inputs(replace(config.plan, T=tokens), seed * fc.MAX_PEERS + rank, device)
        marks = torch.arange(tokens, device=device)
        for feature, mark in enumerate((torch.full_like(marks, rank), marks // 32, marks % 32)):
            inputs.hidden[:, feature] = mark.to(inputs.hidden.dtype)
        ranks.append(inputs)
    return ranks


class Arena:
    """Buffers with poison around every one."""

    def __init__(self, device: str) -> None:
        self.device, self.guarded = device, []

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((size + 2 * GUARD + 256,), POISON, dtype=torch.uint8, device=self.device)
        start = GUARD + -(memory.data_ptr() + GUARD) % 256
        self.guard(name, memory, start, size)
        return memory[start : start + size].view(dtype).view(shape)

    def guard(self, name: str, memory: torch.Tensor, start: int, size: int) -> None:
        """Watches the poison before and behind [start, start + size) of `memory`."""
        self.guarded.append((name, memory[:start], memory[start + size :]))

    def damaged(self) -> list[str]:
        """Names of the buffers beside which something was written."""
        return [
            name for name, before, after in self.guarded if bool((before != POISON).any() | (after != POISON).any())
        ]


@dataclass
class Regions:
    """Addresses of all ranks' regions as this process sees them, and those it owns as [bytes] u8 tensors."""

    addresses: list[int]
    own: dict[int, torch.Tensor]


def regions_in(arena: Arena, layout: fc.FusedLayout, num_ranks: int) -> Regions:
    """All of them here."""
    own = {rank: arena.buffer(f"region {rank}", (layout.bytes,), torch.uint8).zero_() for rank in range(num_ranks)}
    return Regions([own[rank].data_ptr() for rank in range(num_ranks)], own)


@dataclass
class Tensors:
    """One rank's inputs and outputs of one dispatch, by the names of FusedRank."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    expert_outputs: torch.Tensor | None = field(default=None)


class Group:
    """The ranks of a group that this process plays, and the launches over them.

    kernels: called as `kernels("fused_dispatch", params)`; its `library` has the C interface.
    device: "cuda", or "cpu" for an emulator.
    regions: of all ranks; None: all ranks are played here.
    """

    def __init__(self, kernels, config: FusedConfig, device: str = "cuda", regions: Regions | None = None) -> None:
        self.kernels, self.config, self.arena = kernels, config, Arena(device)
        self.layout = fc.layout_of(kernels.library, config.shape)
        self.regions = regions or regions_in(self.arena, self.layout, config.plan.R)
        self.modality = self.arena.buffer("modality", (config.plan.E,), torch.int8)
        self.tensors = {rank: self._make_tensors(rank) for rank in self.regions.own}
        self.structs = {rank: self._struct(rank) for rank in self.tensors}
        size = len(self.structs) * ctypes.sizeof(fc.FusedRank)
        self.many = self.arena.buffer("many", (size,), torch.uint8)
        self._publish()

    @property
    def ranks(self) -> list[int]:
        """Those played here."""
        return list(self.tensors)

    @property
    def same_device(self) -> bool:
        return len(self.structs) == self.config.plan.R

    def _make_tensors(self, rank: int) -> Tensors:
        f = self.config.plan
        ids = torch.int64 if f.ids_i64 else torch.int32
        bounds = f.E if f.scope == "expert" else f.R

        def make(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return self.arena.buffer(f"{name} of rank {rank}", shape, dtype)

        inputs = {
            "hidden_states": make("hidden_states", torch.bfloat16, f.T, f.H),
            "topk_ids": make("topk_ids", ids, f.T, f.K),
            "topk_weights": make("topk_weights", torch.float32, f.T, f.K),
            "segment": make("segment", torch.int32, f.T),
            "router_logits": make("router_logits", torch.float32, f.T, f.E),
        }
        outputs = {
            "new_ids": make("new_ids", ids, f.T, f.K),
            "new_weights": make("new_weights", torch.float32, f.T, f.K),
            "weight": make("weight", torch.float32, f.T),
            "counts": make("counts", torch.int32, 3, f.E, 2),
            "cut": make("cut", torch.int32, bounds, 4),
            "sums": make("sums", torch.int32, 4),
            "combined": make("combined", torch.bfloat16, f.T, f.H),
        }
        if self.config.carried:
            outputs = {"combined": outputs["combined"]}
        if self.config.row_experts:
            outputs["row_experts"] = make("row_experts", torch.int32, self.config.rows)
        copied = make("outputs", torch.bfloat16, self.config.rows, f.H) if self.config.copies_outputs else None
        return Tensors(inputs, outputs, copied)

    def _struct(self, rank: int) -> fc.FusedRank:
        mine, struct = self.tensors[rank], fc.FusedRank(num_tokens=self.config.tokens[rank], rank=rank)
        for peer, address in enumerate(self.regions.addresses):
            struct.region[peer] = address
        for name, tensor in (*mine.inputs.items(), *mine.outputs.items()):
            setattr(struct, name, tensor.data_ptr())
        if self.config.carried:  # what combine goes by is what came in
            struct.new_ids, struct.new_weights = struct.topk_ids, struct.topk_weights
        if mine.expert_outputs is not None:
            struct.outputs = mine.expert_outputs.data_ptr()
        return struct

    def _publish(self) -> None:
        raw = b"".join(bytes(struct) for struct in self.structs.values())
        self.many.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))

    def load(self, ranks: list[Inputs]) -> None:
        """Puts the inputs of every rank into its tensors (behind its tokens stays poison)."""
        self.modality.copy_(torch.from_numpy(ranks[0].modality))
        for rank, tensors in self.tensors.items():
            one = ranks[rank]
            sources = (one.hidden, one.ids, one.gates, one.segment, one.logits)
            for target, source in zip(tensors.inputs.values(), sources, strict=True):
                source = source if isinstance(source, torch.Tensor) else torch.from_numpy(source)
                target[: len(source)].copy_(source)
            self.structs[rank].num_tokens = len(one.ids)
        self._publish()

    def poison(self) -> None:
        """Outputs, and of the regions what nobody reads before it was written this epoch."""
        for rank, tensors in self.tensors.items():
            for tensor in tensors.outputs.values():
                tensor.view(torch.uint8).fill_(POISON)
            for name in TRANSIENT:
                self.bytes_of(rank, name).fill_(POISON)
            if not self.config.scales_with_rows:
                self.bytes_of(rank, "row_scales").fill_(POISON)

    def bytes_of(self, rank: int, name: str) -> torch.Tensor:
        """A part of a rank's region, to the start of the next part."""
        names = [name for name, _ in fc.FusedLayout._fields_]
        following = names[names.index(name) + 1]
        return self.regions.own[rank][getattr(self.layout, name) : getattr(self.layout, following)]

    def part(self, rank: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A part of a rank's region as a tensor."""
        return self.bytes_of(rank, name)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _launched(self, launched: int | None, only: int | None) -> dict[str, object]:
        if only is not None or len(self.structs) == 1:
            return {"one": self.structs[self.ranks[0] if only is None else only], "launched": 1}
        return {"many": self.many.data_ptr(), "launched": len(self.structs) if launched is None else launched}

    def dispatch(self, phase: int = fc.BOTH, launched: int | None = None, only: int | None = None) -> None:
        """launched: the first ranks alone; only: one rank alone."""
        f = self.config.plan
        params = fc.FusedDispatchParams(
            shape=self.config.shape, layout=self.layout, modality=self.modality.data_ptr(),
            policy=f.policy(self.config.needs_entropy), num_segments=f.num_segments, ids_are_i64=f.ids_i64,
            same_device=self.same_device, scales_with_rows=self.config.scales_with_rows,
            names_sources=self.config.names_sources, phase=phase, layer=LAYER, timeout_ns=self.config.timeout_ns,
            **self._launched(launched, only),
        )  # fmt: skip
        carries = self.config.carried and phase != fc.RECEIVE  # which is the same for both
        self.kernels("fused_carry" if carries else "fused_dispatch", params)

    def combine(self, phase: int = fc.BOTH, launched: int | None = None, only: int | None = None) -> None:
        params = fc.FusedCombineParams(
            shape=self.config.shape, layout=self.layout, ids_are_i64=self.config.plan.ids_i64,
            same_device=self.same_device, phase=phase, layer=LAYER,
            timeout_ns=self.config.timeout_ns, **self._launched(launched, only),
        )  # fmt: skip
        self.kernels("fused_combine", params)

    def set_outputs(self, outputs: torch.Tensor) -> None:
        """The experts' outputs [R, rows, H] bf16 of the ranks played here, to where combine takes them from."""
        for rank, tensors in self.tensors.items():
            shape = (self.config.rows, self.config.plan.H)
            own = tensors.expert_outputs
            (self.part(rank, "outputs", torch.bfloat16, *shape) if own is None else own).copy_(outputs[rank])

    def status(self, rank: int) -> fc.FusedStatus:
        raw = self.bytes_of(rank, "status")[: ctypes.sizeof(fc.FusedStatus)]
        return fc.FusedStatus.from_buffer_copy(raw.cpu().numpy().tobytes())

    def epoch(self, rank: int) -> int:
        return int(self.part(rank, "epoch", torch.int32, 1))

    def recover(self, following: int | None = None) -> None:
        """What the host does behind a fault, every rank at rest: faults cleared, and one epoch that all go on from."""
        following = max(self.epoch(rank) for rank in self.ranks) + 1 if following is None else following
        for rank in self.ranks:
            self.part(rank, "epoch", torch.int32, 1).fill_(following)
            self.bytes_of(rank, "status").zero_()
            self.bytes_of(rank, "row_scales").zero_()
