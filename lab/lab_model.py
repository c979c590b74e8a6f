"""Qwen3-VL-MoE and GLM-4.5V in plain torch, for training and for judging: with a seam at every MoE layer.

A batch is a list of groups whose rows have one picture size, so shapes are static. Attention runs per group; everything
else, the experts above all, runs on the flat [T, H] tokens of the whole batch, as in a server. Parameters carry the
names of `Qwen3VLMoeForConditionalGeneration` or `Glm4vMoeForConditionalGeneration`. The parity tests are
tests/test_lab.py and tests/test_lab_documents.py.

Weights are f32; matrix products run in the `dtype` that `forward` is given.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.lab_architecture import (
    GLM,
    LAYOUTS,
    Architecture,
    Batch,
    Embedded,
    Layout,
    Routing,
    Seam,
    layout,
    picture_spans,
    visual_columns,
)
from lab.lab_layers import Attention, FeedForward, MoE, RMSNorm, linear
from lab.lab_pictures import MERGE, Size
from lab.lab_tokens import VOCAB
from lab.lab_towers import GlmVision, QwenVision


class _Layer(nn.Module):
    def __init__(self, arch: Architecture, index: int):
        super().__init__()
        self.self_attn = Attention(arch)
        self.mlp = MoE(arch) if index >= arch.dense else FeedForward(arch.hidden, 2 * arch.hidden)
        self.input_layernorm = RMSNorm(arch.hidden, arch.eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden, arch.eps)


class _Language(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, arch.hidden)
        self.layers = nn.ModuleList(_Layer(arch, i) for i in range(arch.layers))
        self.norm = RMSNorm(arch.hidden, arch.eps)


class LabModel(nn.Module):
    """See the module's docstring."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        tower = GlmVision if arch.family == GLM else QwenVision
        self.model = nn.ModuleDict({"visual": tower(arch), "language_model": _Language(arch)})
        self.lm_head = nn.Linear(arch.hidden, VOCAB, bias=False)
        self.experts_by = "dense"  # one of lab_architecture.EXPERTS_BY
        self.records_attention = False  # then `Routing.received` is filled, at a cost

    def forward(
        self, batch: Sequence[Batch], seam: Seam | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], list[Routing]]:
        """Logits [n, L, V] f32 of each group, and each layer's routing as the router had it."""
        return self.decode(self.embed(batch, dtype), seam, dtype)

    def embed(self, batch: Sequence[Batch], dtype: torch.dtype = torch.float32) -> Embedded:
        """What enters the language model; the same whatever its experts do."""
        pictures = [b for b in batch if b.size is not None]
        images, levels = self.model["visual"](pictures, dtype) if pictures else (None, [])
        of_group = [len(b.patches) * b.size.tokens for b in pictures]
        parts = iter(zip(*(x.split(of_group) for x in (images, *levels)), strict=True)) if pictures else iter(())
        hidden, deepstack = [], [[] for _ in levels]
        for b in batch:
            text = F.embedding(b.ids, self.model["language_model"].embed_tokens.weight)
            image, *deep = next(parts) if b.size is not None else (None, *(None for _ in levels))
            hidden.append(_among_text(text, image, b.size))
            for rows, level in zip(deepstack, deep, strict=True):
                rows.append(_among_text(torch.zeros_like(text), level, b.size))
        device = batch[0].ids.device
        return Embedded(
            torch.cat(hidden).float(),
            [torch.cat(rows) for rows in deepstack],
            [tuple(b.ids.shape) for b in batch],
            _language_rope(layout(batch), self.arch, device),
            torch.cat([_valid(b).flatten() for b in batch]),
            torch.cat([visual_columns(b.size, b.ids.shape[1], device).repeat(len(b.ids)) for b in batch]),
        )

    def decode(
        self, given: Embedded, seam: Seam | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], list[Routing]]:
        """As `forward`, from `embed`'s result."""
        language, flat, routings = self.model["language_model"], given.hidden, []
        for index, layer in enumerate(language.layers):
            before = layer.input_layernorm(flat)
            flat = flat + layer.self_attn(before, given.segments, given.rope, dtype)
            normed = layer.post_attention_layernorm(flat).to(dtype)
            if index < self.arch.dense:
                flat = flat + layer.mlp(normed, dtype)
                continue
            routing = layer.mlp.route(index, normed, given.valid, given.visual)
            if self.records_attention:
                received = layer.self_attn.received(before, given.segments, given.rope, dtype, given.valid)
                routing = replace(routing, received=received)
            routings.append(routing)
            ids, weights = (routing.ids, routing.weights) if seam is None else seam(routing)
            flat = flat + layer.mlp.experts(normed, ids, weights, self.experts_by) + layer.mlp.beside(normed)
            if index < len(given.deepstack):
                flat = flat + given.deepstack[index]
        flat = language.norm(flat)
        logits = [
            linear(x, self.lm_head, dtype).float().view(*shape, -1)
            for x, shape in zip(flat.split([n * w for n, w in given.segments]), given.segments, strict=True)
        ]
        return logits, routings

    def moe(self, layer: int) -> MoE:
        """Of a decoder layer."""
        return self.model["language_model"].layers[layer].mlp


def initialise(model: LabModel, seed: int) -> None:
    """Normal weights that keep the scale; what is added to the residual stream is smaller."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        fan_in = math.prod(p.shape[1:]) if p.ndim > 3 else p.shape[-1]  # of a convolution, or a matrix
        std = 0.3 if "embed_tokens" in name else 1 / math.sqrt(fan_in)
        if name.endswith(
            (
                "o_proj.weight",
                "experts.down_proj",
                "mlp.down_proj.weight",
                "shared_experts.down_proj.weight",
                "attn.proj.weight",
            )
        ):
            std /= math.sqrt(2 * model.arch.layers)
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def _valid(b: Batch) -> Tensor:
    """[n, L] bool: no padding."""
    return torch.arange(b.ids.shape[1], device=b.ids.device) < b.length[:, None]


def _among_text(text: Tensor, images: Tensor | None, size: Size | None) -> Tensor:
    """[n * L, H]: rows of `text` [n, L, H], those of `images` [n * pictures * tokens, H] in their places."""
    if size is None:
        return text.flatten(0, 1)
    images = images.view(len(text), size.pictures, size.tokens, -1).to(text.dtype)
    parts, done = [], 0
    for picture, span in enumerate(picture_spans(size)):
        parts += [text[:, done : span.start], images[:, picture]]
        done = span.stop
    return torch.cat([*parts, text[:, done:]], 1).flatten(0, 1)


@lru_cache(maxsize=LAYOUTS)
def _language_rope(made: Layout, arch: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, 1, rotary dim] of M-RoPE."""
    angles = [_prompt_angles(size, length, arch, device).repeat(n, 1) for size, n, length in made]
    angle = torch.cat(angles)[:, None]
    return angle.cos(), angle.sin()


def _prompt_angles(size: Size | None, length: int, arch: Architecture, device: torch.device) -> Tensor:
    """[L, rotary dim] of one prompt with pictures of `size`."""
    inverse = 1.0 / arch.rope_theta ** (torch.arange(0, arch.rotary_dim, 2, device=device).float() / arch.rotary_dim)
    angles = _positions(size, length, device)[:, :, None].float() * inverse  # [3, L, rotary dim / 2]
    if arch.family == GLM:
        parts = angles.split(list(arch.mrope_section), -1)
        mixed = torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)
    else:  # interleaved
        mixed = angles[0].clone()
        for axis in (1, 2):
            mixed[:, axis : arch.mrope_section[axis] * 3 : 3] = angles[axis, :, axis : arch.mrope_section[axis] * 3 : 3]
    return torch.cat([mixed, mixed], -1)


def _positions(size: Size | None, length: int, device: torch.device) -> Tensor:
    """[3, L]: time, row and column of every token; behind a picture they go on from its longer side."""
    positions = torch.arange(length, device=device).expand(3, -1).clone()
    for span in picture_spans(size):
        rows, columns = (g // MERGE for g in size.grid)
        place, start = torch.arange(size.tokens, device=device), positions[:, span.start].clone()
        positions[0, span] = start[0]
        positions[1, span] = start[1] + place // columns
        positions[2, span] = start[2] + place % columns
        behind = torch.arange(length - span.stop, device=device) + max(rows, columns)
        positions[:, span.stop :] = start[:, None] + behind
    return positions
