"""The vision towers: Qwen3-VL's with deepstack, and GLM-4.5V's; both see patches in the processors' order."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.lab_architecture import LAYOUTS, Architecture, Batch
from lab.lab_layers import FeedForward, RMSNorm, attend, linear, rotate
from lab.lab_pictures import MERGE, PATCH, Size


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class _VisionAttention(nn.Module):
    def __init__(self, arch: Architecture, biased: bool):
        super().__init__()
        self.heads = arch.vision_heads
        self.qkv = nn.Linear(arch.vision_hidden, 3 * arch.vision_hidden, bias=biased)
        self.proj = nn.Linear(arch.vision_hidden, arch.vision_hidden, bias=biased)

    def forward(self, x: Tensor, segments: list, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[T, C] -> [T, C]; within each picture."""
        q, k, v = linear(x, self.qkv, dtype).view(x.shape[0], 3, self.heads, -1).unbind(1)
        q, k = (rotate(t.float(), *rope).to(dtype) for t in (q, k))
        return linear(attend(q, k, v, segments, is_causal=False), self.proj, dtype).float()


class _VisionMLP(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.linear_fc1 = nn.Linear(arch.vision_hidden, arch.vision_intermediate)
        self.linear_fc2 = nn.Linear(arch.vision_intermediate, arch.vision_hidden)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        inner = F.gelu(linear(x, self.linear_fc1, dtype), approximate="tanh")
        return linear(inner, self.linear_fc2, dtype).float()


class _VisionBlock(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.norm1, self.norm2 = _LayerNorm(arch.vision_hidden), _LayerNorm(arch.vision_hidden)
        self.attn, self.mlp = _VisionAttention(arch, biased=True), _VisionMLP(arch)


class _Merger(nn.Module):
    """2 x 2 patches into one visual token; deepstack's normalise after joining them."""

    def __init__(self, arch: Architecture, normalise_joined: bool):
        super().__init__()
        joined = arch.vision_hidden * MERGE**2
        self.normalise_joined = normalise_joined
        self.norm = _LayerNorm(joined if normalise_joined else arch.vision_hidden)
        self.linear_fc1, self.linear_fc2 = nn.Linear(joined, joined), nn.Linear(joined, arch.hidden)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        joined = (x.shape[0] // MERGE**2, -1)
        x = self.norm(x.reshape(joined)) if self.normalise_joined else self.norm(x).reshape(joined)
        return linear(F.gelu(linear(x, self.linear_fc1, dtype)), self.linear_fc2, dtype).float()


class _PatchEmbed(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.proj = nn.Conv3d(3, arch.vision_hidden, (2, PATCH, PATCH), (2, PATCH, PATCH))

    def forward(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """An image fills both frames of the convolution, so their kernels add up."""
        weight = self.proj.weight.sum(2).flatten(1)
        return F.linear(patches.to(dtype), weight.to(dtype), self.proj.bias.to(dtype)).float()


class QwenVision(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.patch_embed = _PatchEmbed(arch)
        self.pos_embed = nn.Embedding(arch.position_side**2, arch.vision_hidden)
        self.blocks = nn.ModuleList(_VisionBlock(arch) for _ in range(arch.vision_depth))
        self.merger = _Merger(arch, False)
        self.deepstack_merger_list = nn.ModuleList(_Merger(arch, True) for _ in arch.deepstack)

    def forward(self, pictures: Sequence[Batch], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens [V, H] of all pictures, and the deepstack levels of the same shape."""
        segments, rope = _vision_layout(pictures, self.arch)
        table = _positions(pictures, self.pos_embed, _stretch, self.arch.position_side)
        x = self.patch_embed(torch.cat([b.patches.flatten(0, 1) for b in pictures]), dtype) + table
        deep = []
        for index, block in enumerate(self.blocks):
            x = x + block.attn(block.norm1(x), segments, rope, dtype)
            x = x + block.mlp(block.norm2(x), dtype)
            if index in self.arch.deepstack:
                deep.append(self.deepstack_merger_list[self.arch.deepstack.index(index)](x, dtype))
        return self.merger(x, dtype), deep


class _GlmBlock(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(arch.vision_hidden, arch.eps), RMSNorm(arch.vision_hidden, arch.eps)
        self.attn, self.mlp = _VisionAttention(arch, biased=False), FeedForward(arch.vision_hidden, arch.hidden)


class _GlmMerger(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.proj = nn.Linear(arch.hidden, arch.hidden, bias=False)
        self.post_projection_norm = nn.LayerNorm(arch.hidden)
        inner = arch.vision_intermediate
        self.gate_proj = nn.Linear(arch.hidden, inner, bias=False)
        self.up_proj = nn.Linear(arch.hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, arch.hidden, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = F.gelu(self.post_projection_norm(linear(x, self.proj, dtype).float()))
        inner = F.silu(linear(x, self.gate_proj, dtype)) * linear(x, self.up_proj, dtype)
        return linear(inner, self.down_proj, dtype).float()


class _GlmPositions(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.position_embedding = nn.Embedding(arch.position_side**2, arch.vision_hidden)


class GlmVision(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.embeddings, self.patch_embed = _GlmPositions(arch), _PatchEmbed(arch)
        self.post_conv_layernorm = RMSNorm(arch.vision_hidden, arch.eps)
        self.blocks = nn.ModuleList(_GlmBlock(arch) for _ in range(arch.vision_depth))
        self.post_layernorm = RMSNorm(arch.vision_hidden, arch.eps)
        self.downsample = nn.Conv2d(arch.vision_hidden, arch.hidden, MERGE, MERGE)
        self.merger = _GlmMerger(arch)

    def forward(self, pictures: Sequence[Batch], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens [V, H] of all pictures; no deepstack levels."""
        segments, rope = _vision_layout(pictures, self.arch)
        table = _positions(pictures, self.embeddings.position_embedding, _bicubic, self.arch.position_side)
        x = self.patch_embed(torch.cat([b.patches.flatten(0, 1) for b in pictures]), dtype)
        x = self.post_conv_layernorm(x) + table
        for block in self.blocks:
            x = x + block.attn(block.norm1(x), segments, rope, dtype)
            x = x + block.mlp(block.norm2(x), dtype)
        joined = self.post_layernorm(x).view(x.shape[0] // MERGE**2, -1)
        weight = self.downsample.weight.permute(0, 2, 3, 1).flatten(1)  # the convolution sees each 2 x 2 once
        x = F.linear(joined.to(dtype), weight.to(dtype), self.downsample.bias.to(dtype))
        return self.merger(x, dtype), []


def _vision_layout(pictures: Sequence[Batch], arch: Architecture) -> tuple[list, tuple[Tensor, Tensor]]:
    """(pictures, patches) of each group, and the rotation of every patch."""
    segments = [tuple(b.patches.shape[:2]) for b in pictures]
    made = tuple((b.size, n) for b, (n, _) in zip(pictures, segments, strict=True))
    return segments, _vision_rope(made, arch.vision_hidden // arch.vision_heads, pictures[0].patches.device)


def _positions(pictures: Sequence[Batch], table: nn.Embedding, mix: Callable, side: int) -> Tensor:
    """[patches, C]: the position table, stretched over each picture by `mix`."""
    stretched = [(mix(b.size, side, b.patches.device) @ table.weight).repeat(len(b.patches), 1) for b in pictures]
    return torch.cat(stretched)


@lru_cache(maxsize=64)
def _bicubic(size: Size, side: int, device: torch.device) -> Tensor:
    """[P, side * side]: how every patch mixes GLM-4.5V's position table."""
    (rows, columns), (row, column) = size.grid, _patch_positions(size, device)
    place = torch.stack([(column + 0.5) / columns, (row + 0.5) / rows], -1) * 2 - 1
    basis = torch.eye(side * side, device=device).view(1, side * side, side, side)
    mixed = F.grid_sample(basis, place[None, :, None], mode="bicubic", padding_mode="border", align_corners=False)
    return mixed[0, :, :, 0].T.contiguous()


@lru_cache(maxsize=LAYOUTS)
def _vision_rope(layout: tuple[tuple[Size, int], ...], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, 1, head_dim] of `n` pictures of each size."""
    dim, angles = head_dim // 2, []
    inverse = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, device=device).float() / dim)
    for size, n in layout:
        row, column = _patch_positions(size, device)
        angle = torch.cat([row[:, None] * inverse, column[:, None] * inverse], -1)
        angles.append(torch.cat([angle, angle], -1).repeat(n, 1))
    angle = torch.cat(angles)[:, None]
    return angle.cos(), angle.sin()


@lru_cache(maxsize=64)
def _stretch(size: Size, side: int, device: torch.device) -> Tensor:
    """[P, side * side]: how every patch mixes the position table, which is stretched over the picture."""
    (rows, columns), (row, column) = size.grid, _patch_positions(size, device)
    y, x = row * ((side - 1) / (rows - 1)), column * ((side - 1) / (columns - 1))
    mix = torch.zeros(rows * columns, side * side, device=device)
    for near_y, wy in ((y.floor(), 1 - y + y.floor()), (y.floor() + 1, y - y.floor())):
        for near_x, wx in ((x.floor(), 1 - x + x.floor()), (x.floor() + 1, x - x.floor())):
            index = near_y.clamp(max=side - 1) * side + near_x.clamp(max=side - 1)
            mix.scatter_add_(1, index.long()[:, None], (wy * wx)[:, None])
    return mix


def _patch_positions(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column [P] f32 of every patch, merge block by merge block."""
    rows, columns = size.grid

    def order(x: Tensor) -> Tensor:
        return x.view(rows // MERGE, MERGE, columns // MERGE, MERGE).transpose(1, 2).flatten()

    row = torch.arange(rows, device=device)[:, None].expand(rows, columns).contiguous()
    column = torch.arange(columns, device=device)[None].expand(rows, columns).contiguous()
    return order(row).float(), order(column).float()
