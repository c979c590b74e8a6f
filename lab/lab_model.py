"""Qwen3-VL-MoE in plain torch, for training and for judging: transformers' architecture with a seam at every MoE layer.

A batch is a list of groups whose rows have one picture size, so shapes are static. Attention runs per group; everything
else, the experts above all, runs on the flat [T, H] tokens of the whole batch, as in a server. Parameters carry the
names of `Qwen3VLMoeForConditionalGeneration`, in transformers' layout. The parity test is tests/test_lab.py.

Weights are f32; matrix products run in the `dtype` that `forward` is given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from lab_pictures import MERGE, PATCH, Size
from lab_tokens import IMAGE, VOCAB
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Sizes of the model; the defaults are the lab's checkpoint."""

    hidden: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    top_k: int = 4
    intermediate: int = 64
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_depth: int = 4
    vision_intermediate: int = 256
    deepstack: tuple[int, ...] = (1, 2, 3)
    position_side: int = 16
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (8, 4, 4)
    scoring: str = "softmax"  # how the router makes its probabilities; or "sigmoid", as in Kimi-VL
    shared: int = 0  # width of an expert that every token passes through; such a model is judged here, not served

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Routing:
    """What one MoE layer sees and decided. T counts padding too, where `ids` are -1.

    layer; hidden [T, H] its input; logits [T, E] f32; ids [T, K] i64; weights [T, K] f32; visual [T] bool; received
    [T] f32: the attention that each token got from later ones in the layer, mean over heads, if the model records it.
    """

    layer: int
    hidden: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor
    visual: Tensor
    received: Tensor | None = None


# Given a layer's routing, the (ids, weights) to dispatch; -1 = empty slot.
Seam = Callable[[Routing], tuple[Tensor, Tensor]]

# How experts run: "dense", every expert on every token, as two matrix products; "loop", each on its own rows, one after
# another; "grouped", the same as two grouped products, in fixed shapes.
EXPERTS_BY = ("dense", "loop", "grouped")


@dataclass(frozen=True)
class Batch:
    """Rows of one picture size as the model takes them: ids [n, L], patches [n, P, 192] or None, length [n]."""

    size: Size | None
    ids: Tensor
    patches: Tensor | None
    length: Tensor


@dataclass(frozen=True)
class Embedded:
    """hidden [T, H] f32; deepstack: [T, H] f32 per level; segments: (n, L) per group; rope: cos, sin [T, 1, dim];
    valid, visual [T] bool.
    """

    hidden: Tensor
    deepstack: list[Tensor]
    segments: list[tuple[int, int]]
    rope: tuple[Tensor, Tensor]
    valid: Tensor
    visual: Tensor


class LabModel(nn.Module):
    """See the module's docstring."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.model = nn.ModuleDict({"visual": _Vision(arch), "language_model": _Language(arch)})
        self.lm_head = nn.Linear(arch.hidden, VOCAB, bias=False)
        self.experts_by = "dense"  # one of EXPERTS_BY
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
        hidden, deepstack, done = [], [[] for _ in levels], 0
        for b in batch:
            (n, length), span = b.ids.shape, _image_span(b.size)
            text = torch.cat([b.ids[:, : span.start], b.ids[:, span.stop :]], 1)
            text = F.embedding(text, self.model["language_model"].embed_tokens.weight)
            part = slice(done, done + n * (span.stop - span.start))
            done = part.stop
            image = text[:, :0] if b.size is None else images[part].view(n, -1, text.shape[2])
            hidden.append(torch.cat([text[:, : span.start], image, text[:, span.start :]], 1).flatten(0, 1))
            for rows, level in zip(deepstack, levels, strict=True):
                rows.append(_among_text(level[part].view(n, -1, text.shape[2]), span, length))
        return Embedded(
            torch.cat(hidden).float(),
            [torch.cat(rows) for rows in deepstack],
            [tuple(b.ids.shape) for b in batch],
            _language_rope(_layout(batch), self.arch, batch[0].ids.device),
            torch.cat([_valid(b).flatten() for b in batch]),
            torch.cat([(b.ids == IMAGE).flatten() for b in batch]),
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
            routing = layer.mlp.route(index, normed, given.valid, given.visual)
            if self.records_attention:
                received = layer.self_attn.received(before, given.segments, given.rope, dtype, given.valid)
                routing = replace(routing, received=received)
            routings.append(routing)
            ids, weights = (routing.ids, routing.weights) if seam is None else seam(routing)
            flat = flat + layer.mlp.experts(normed, ids, weights, self.experts_by)
            if layer.mlp.shared_expert is not None:
                flat = flat + layer.mlp.shared_expert(normed)
            if index < len(given.deepstack):
                flat = flat + given.deepstack[index]
        flat = language.norm(flat)
        logits = [
            _linear(x, self.lm_head, dtype).float().view(*shape, -1)
            for x, shape in zip(flat.split([n * w for n, w in given.segments]), given.segments, strict=True)
        ]
        return logits, routings


def initialise(model: LabModel, seed: int) -> None:
    """Normal weights that keep the scale; what is added to the residual stream is smaller."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        fan_in = math.prod(p.shape[1:]) if "patch" in name else p.shape[-1]
        std = 0.3 if "embed_tokens" in name else 1 / math.sqrt(fan_in)
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "attn.proj.weight")):
            std /= math.sqrt(2 * model.arch.layers)
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def _linear(x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias)


def _image_span(size: Size | None) -> slice:
    """Columns of the visual tokens; <|im_start|> user \\n <|vision_start|> come before them in every prompt."""
    return slice(4, 4 + (0 if size is None else size.tokens))


def _repeat(x: Tensor, times: int, dim: int) -> Tensor:
    """repeat_interleave without its copy from the host, which a CUDA graph refuses."""
    shape = list(x.shape)
    return x.unsqueeze(dim + 1).expand(*shape[: dim + 1], times, *shape[dim + 1 :]).flatten(dim, dim + 1)


def _valid(b: Batch) -> Tensor:
    """[n, L] bool: no padding."""
    return torch.arange(b.ids.shape[1], device=b.ids.device) < b.length[:, None]


def _among_text(image: Tensor, span: slice, length: int) -> Tensor:
    """[n, V, H] -> [n * L, H]: rows of the visual tokens, 0 elsewhere."""
    return F.pad(image.float(), (0, 0, span.start, length - span.stop)).flatten(0, 1)


class _RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class _Attention(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        width = arch.heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden, width, bias=False)
        self.k_proj = nn.Linear(arch.hidden, arch.kv_heads * arch.head_dim, bias=False)
        self.v_proj = nn.Linear(arch.hidden, arch.kv_heads * arch.head_dim, bias=False)
        self.o_proj = nn.Linear(width, arch.hidden, bias=False)
        self.q_norm, self.k_norm = _RMSNorm(arch.head_dim), _RMSNorm(arch.head_dim)

    def forward(self, x: Tensor, segments: list, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[T, H] -> [T, H]; causal within each row of each group."""
        q, k, v = self._heads(x, rope, dtype)
        return _linear(_attend(q, k, v, segments, is_causal=True), self.o_proj, dtype).float()

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [T, heads, dim]."""
        dim, repeat = self.arch.head_dim, self.arch.heads // self.arch.kv_heads
        q = self.q_norm(_linear(x, self.q_proj, dtype).view(x.shape[0], -1, dim))
        k = self.k_norm(_linear(x, self.k_proj, dtype).view(x.shape[0], -1, dim))
        v = _linear(x, self.v_proj, dtype).view(x.shape[0], -1, dim)
        q, k = _rotate(q, *rope).to(dtype), _repeat(_rotate(k, *rope).to(dtype), repeat, 1)
        return q, k, _repeat(v, repeat, 1)

    def received(
        self, x: Tensor, segments: list, rope: tuple[Tensor, Tensor], dtype: torch.dtype, valid: Tensor
    ) -> Tensor:
        """[T] f32: attention that each token gets from the valid tokens behind it in its row, mean over heads."""
        q, k, _ = self._heads(x, rope, dtype)
        out, sizes = [], [n * length for n, length in segments]
        for (n, length), *parts in zip(segments, *(y.split(sizes) for y in (q, k, valid)), strict=True):
            queries, keys = (y.view(n, length, *y.shape[1:]).transpose(1, 2).float() for y in parts[:2])
            logits = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
            before = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            paid = logits.masked_fill(~before, -math.inf).softmax(-1).mean(1)  # [n, from, to]
            paid = paid.tril(-1) * parts[2].view(n, length, 1)
            out.append(paid.sum(1).flatten())
        return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: list, is_causal: bool) -> Tensor:
    """[T, heads, dim] each -> [T, heads * dim], within each row of each group (n, L)."""
    out, sizes = [], [n * length for n, length in segments]
    for (n, length), *parts in zip(segments, *(x.split(sizes) for x in (q, k, v)), strict=True):
        heads = [x.view(n, length, *x.shape[1:]).transpose(1, 2) for x in parts]
        out.append(F.scaled_dot_product_attention(*heads, is_causal=is_causal).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(out)


Layout = tuple[tuple[Size | None, int, int], ...]  # (picture size, rows, columns) of every group


def _layout(batch: Sequence[Batch]) -> Layout:
    return tuple((b.size, *b.ids.shape) for b in batch)


@lru_cache(maxsize=64)
def _language_rope(layout: Layout, arch: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, 1, head_dim] of interleaved M-RoPE."""
    angles = [_prompt_angles(size, length, arch, device).repeat(n, 1) for size, n, length in layout]
    angle = torch.cat(angles)[:, None]
    return angle.cos(), angle.sin()


def _prompt_angles(size: Size | None, length: int, arch: Architecture, device: torch.device) -> Tensor:
    """[L, head_dim] of one prompt with a picture of `size`."""
    positions = torch.arange(length, device=device).expand(3, -1).clone()  # time, row, column
    if size is not None:
        span, (rows, columns) = _image_span(size), (g // MERGE for g in size.grid)
        place = torch.arange(size.tokens, device=device)
        positions[0, span] = span.start
        positions[1, span] = span.start + place // columns
        positions[2, span] = span.start + place % columns
        behind = span.start + max(rows, columns)
        positions[:, span.stop :] = behind + torch.arange(length - span.stop, device=device)
    inverse = 1.0 / arch.rope_theta ** (torch.arange(0, arch.head_dim, 2, device=device).float() / arch.head_dim)
    angles = positions[:, :, None].float() * inverse  # [3, L, head_dim / 2]
    mixed = angles[0].clone()
    for axis in (1, 2):
        mixed[:, axis : arch.mrope_section[axis] * 3 : 3] = angles[axis, :, axis : arch.mrope_section[axis] * 3 : 3]
    return torch.cat([mixed, mixed], -1)


class _Experts(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(arch.experts, 2 * arch.intermediate, arch.hidden))
        self.down_proj = nn.Parameter(torch.empty(arch.experts, arch.hidden, arch.intermediate))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, by: str) -> Tensor:
        """[T, H] -> [T, H] f32: the weighted sum of each token's experts; slots of id -1 add nothing."""
        weights = weights.masked_fill(ids < 0, 0)
        ids = ids.clamp(min=0)
        if by == "grouped":
            return self._grouped(x, ids, weights)
        experts = self.gate_up_proj.shape[0]
        combine = torch.zeros(x.shape[0], experts, device=x.device, dtype=weights.dtype)
        combine = combine.scatter_add(1, ids, weights)  # [T, E]
        return self._dense(x, combine) if by == "dense" else self._loop(x, combine)

    def _dense(self, x: Tensor, combine: Tensor) -> Tensor:
        experts, double, hidden = self.gate_up_proj.shape
        both = F.linear(x, self.gate_up_proj.to(x.dtype).view(-1, hidden)).view(-1, experts, double)
        gate, up = both.chunk(2, -1)
        inner = F.silu(gate) * up * combine[..., None].to(x.dtype)
        down = self.down_proj.to(x.dtype).transpose(1, 2).reshape(-1, hidden)  # [E * I, H]
        return (inner.flatten(1) @ down).float()

    def _loop(self, x: Tensor, combine: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(combine.shape[1]):
            rows = torch.nonzero(combine[:, expert])[:, 0]
            gate, up = F.linear(x[rows], self.gate_up_proj[expert].to(x.dtype)).chunk(2, -1)
            inner = F.silu(gate) * up * combine[rows, expert, None].to(x.dtype)
            out.index_add_(0, rows, F.linear(inner, self.down_proj[expert].to(x.dtype)).float())
        return out

    def _grouped(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (tokens, top_k), experts = ids.shape, self.gate_up_proj.shape[0]
        expert, order = ids.flatten().sort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = torch.zeros(experts, dtype=torch.int32, device=x.device)
        ends = rows.scatter_add(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        repeated = x[:, None].expand(-1, top_k, -1).reshape(tokens * top_k, -1)
        sorted_rows = _Permute.apply(repeated, order, back)
        gate, up = F.grouped_mm(sorted_rows, self.gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj.to(x.dtype).transpose(1, 2), offs=ends)
        out = _Permute.apply(out, back, order).view(tokens, top_k, -1)
        return (out * weights[..., None].to(x.dtype)).sum(1, dtype=torch.float32)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient by the inverse order, without index_add's atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


class _SharedExpert(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.gate_up_proj = nn.Linear(arch.hidden, 2 * arch.shared, bias=False)
        self.down_proj = nn.Linear(arch.shared, arch.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H] f32."""
        gate, up = _linear(x, self.gate_up_proj, x.dtype).chunk(2, -1)
        return _linear(F.silu(gate) * up, self.down_proj, x.dtype).float()


def scores(logits: Tensor, scoring: str) -> Tensor:
    """The router's probabilities of [T, E] logits."""
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, -1)


class _MoE(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.top_k, self.scoring = arch.top_k, arch.scoring
        self.gate = nn.Linear(arch.hidden, arch.experts, bias=False)
        self.experts = _Experts(arch)
        self.shared_expert = _SharedExpert(arch) if arch.shared else None

    def route(self, layer: int, x: Tensor, valid: Tensor, visual: Tensor) -> Routing:
        logits = _linear(x, self.gate, x.dtype).float()
        weights, ids = scores(logits, self.scoring).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        padding = ~valid[:, None]
        return Routing(layer, x, logits, ids.masked_fill(padding, -1), weights.masked_fill(padding, 0), visual)


class _Layer(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.self_attn, self.mlp = _Attention(arch), _MoE(arch)
        self.input_layernorm, self.post_attention_layernorm = _RMSNorm(arch.hidden), _RMSNorm(arch.hidden)


class _Language(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, arch.hidden)
        self.layers = nn.ModuleList(_Layer(arch) for _ in range(arch.layers))
        self.norm = _RMSNorm(arch.hidden)


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class _VisionAttention(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.heads = arch.vision_heads
        self.qkv = nn.Linear(arch.vision_hidden, 3 * arch.vision_hidden)
        self.proj = nn.Linear(arch.vision_hidden, arch.vision_hidden)

    def forward(self, x: Tensor, segments: list, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[T, C] -> [T, C]; within each picture."""
        q, k, v = _linear(x, self.qkv, dtype).view(x.shape[0], 3, self.heads, -1).unbind(1)
        q, k = (_rotate(t.float(), *rope).to(dtype) for t in (q, k))
        return _linear(_attend(q, k, v, segments, is_causal=False), self.proj, dtype).float()


class _VisionMLP(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.linear_fc1 = nn.Linear(arch.vision_hidden, arch.vision_intermediate)
        self.linear_fc2 = nn.Linear(arch.vision_intermediate, arch.vision_hidden)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        inner = F.gelu(_linear(x, self.linear_fc1, dtype), approximate="tanh")
        return _linear(inner, self.linear_fc2, dtype).float()


class _VisionBlock(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.norm1, self.norm2 = _LayerNorm(arch.vision_hidden), _LayerNorm(arch.vision_hidden)
        self.attn, self.mlp = _VisionAttention(arch), _VisionMLP(arch)


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
        return _linear(F.gelu(_linear(x, self.linear_fc1, dtype)), self.linear_fc2, dtype).float()


class _PatchEmbed(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.proj = nn.Conv3d(3, arch.vision_hidden, (2, PATCH, PATCH), (2, PATCH, PATCH))

    def forward(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """An image fills both frames of the convolution, so their kernels add up."""
        weight = self.proj.weight.sum(2).flatten(1)
        return F.linear(patches.to(dtype), weight.to(dtype), self.proj.bias.to(dtype)).float()


class _Vision(nn.Module):
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
        segments = [tuple(b.patches.shape[:2]) for b in pictures]
        sizes, device = tuple(b.size for b in pictures), pictures[0].patches.device
        table = [
            (_stretch(b.size, self.arch.position_side, device) @ self.pos_embed.weight).repeat(n, 1)
            for b, (n, _) in zip(pictures, segments, strict=True)
        ]
        x = self.patch_embed(torch.cat([b.patches.flatten(0, 1) for b in pictures]), dtype) + torch.cat(table)
        head_dim = self.arch.vision_hidden // self.arch.vision_heads
        rope = _vision_rope(tuple(zip(sizes, (n for n, _ in segments), strict=True)), head_dim, device)
        deep = []
        for index, block in enumerate(self.blocks):
            x = x + block.attn(block.norm1(x), segments, rope, dtype)
            x = x + block.mlp(block.norm2(x), dtype)
            if index in self.arch.deepstack:
                deep.append(self.deepstack_merger_list[self.arch.deepstack.index(index)](x, dtype))
        return self.merger(x, dtype), deep


@lru_cache(maxsize=64)
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
