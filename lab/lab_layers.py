"""Layers that the lab's models share: attention, experts, routers. Weights are f32, products run in a given dtype."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.lab_architecture import GLM, Architecture, Routing


def linear(x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As many of the last dimensions' first as `cos` has; the rest passes."""
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-b, a), -1) * sin
    return torch.cat((turned, passed), -1) if passed.shape[-1] else turned


def _repeat(x: Tensor, times: int, dim: int) -> Tensor:
    """repeat_interleave without its copy from the host, which a CUDA graph refuses."""
    shape = list(x.shape)
    return x.unsqueeze(dim + 1).expand(*shape[: dim + 1], times, *shape[dim + 1 :]).flatten(dim, dim + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: list, is_causal: bool) -> Tensor:
    """[T, heads, dim] each -> [T, heads * dim], within each row of each group (n, L)."""
    out, sizes = [], [n * length for n, length in segments]
    for (n, length), *parts in zip(segments, *(x.split(sizes) for x in (q, k, v)), strict=True):
        heads = [x.view(n, length, *x.shape[1:]).transpose(1, 2) for x in parts]
        out.append(F.scaled_dot_product_attention(*heads, is_causal=is_causal).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(out)


class Attention(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        width, biased = arch.heads * arch.head_dim, arch.family == GLM
        self.q_proj = nn.Linear(arch.hidden, width, bias=biased)
        self.k_proj = nn.Linear(arch.hidden, arch.kv_heads * arch.head_dim, bias=biased)
        self.v_proj = nn.Linear(arch.hidden, arch.kv_heads * arch.head_dim, bias=biased)
        self.o_proj = nn.Linear(width, arch.hidden, bias=False)
        if not biased:
            self.q_norm, self.k_norm = RMSNorm(arch.head_dim, arch.eps), RMSNorm(arch.head_dim, arch.eps)

    def forward(self, x: Tensor, segments: list, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[T, H] -> [T, H]; causal within each row of each group."""
        q, k, v = self._heads(x, rope, dtype)
        return linear(attend(q, k, v, segments, is_causal=True), self.o_proj, dtype).float()

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [T, heads, dim]."""
        dim, repeat = self.arch.head_dim, self.arch.heads // self.arch.kv_heads
        q = linear(x, self.q_proj, dtype).view(x.shape[0], -1, dim)
        k = linear(x, self.k_proj, dtype).view(x.shape[0], -1, dim)
        v = linear(x, self.v_proj, dtype).view(x.shape[0], -1, dim)
        if self.arch.family != GLM:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.float(), *rope).to(dtype), _repeat(rotate(k.float(), *rope).to(dtype), repeat, 1)
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


class Experts(nn.Module):
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
        sorted_rows = Permute.apply(repeated, order, back)
        gate, up = F.grouped_mm(sorted_rows, self.gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj.to(x.dtype).transpose(1, 2), offs=ends)
        out = Permute.apply(out, back, order).view(tokens, top_k, -1)
        return (out * weights[..., None].to(x.dtype)).sum(1, dtype=torch.float32)


class Permute(torch.autograd.Function):
    """Rows in another order; the gradient by the inverse order, without index_add's atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


class FeedForward(nn.Module):
    """The network of a dense layer, or a shared expert."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, H] -> [T, H] f32."""
        inner = F.silu(linear(x, self.gate_proj, dtype)) * linear(x, self.up_proj, dtype)
        return linear(inner, self.down_proj, dtype).float()


def scores(logits: Tensor, scoring: str) -> Tensor:
    """The router's probabilities of [T, E] logits."""
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, -1)


class Router(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.weight = nn.Parameter(torch.empty(arch.experts, arch.hidden))
        if arch.family == GLM:
            self.register_buffer("e_score_correction_bias", torch.zeros(arch.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [T, H]: logits [T, E] f32, ids and weights [T, K]."""
        arch = self.arch
        if arch.family != GLM:
            logits = F.linear(x, self.weight.to(x.dtype)).float()
            weights, ids = scores(logits, arch.scoring).topk(arch.top_k, -1)
            return logits, ids, weights / weights.sum(-1, keepdim=True)
        logits = F.linear(x.float(), self.weight)
        score = scores(logits, arch.scoring)
        ids = self._selection(score).topk(arch.top_k, -1).indices
        weights = score.gather(1, ids)
        return logits, ids, weights / weights.sum(-1, keepdim=True) * arch.scaling

    @torch.no_grad()
    def _selection(self, score: Tensor) -> Tensor:
        """[T, E]: what experts are chosen by; a group is as good as its two best."""
        biased, (groups, kept) = score + self.e_score_correction_bias, (self.arch.groups, self.arch.topk_groups)
        if kept == groups:
            return biased
        by_group = biased.view(len(biased), groups, -1)
        best = by_group.topk(2, -1).values.sum(-1).topk(kept, -1).indices
        open_ = torch.zeros(len(biased), groups, dtype=torch.bool, device=score.device).scatter_(1, best, True)
        return by_group.masked_fill(~open_[..., None], -math.inf).flatten(1)


class MoE(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.gate, self.experts = Router(arch), Experts(arch)
        if arch.shared:
            self.shared_experts = FeedForward(arch.hidden, arch.shared)

    def route(self, layer: int, x: Tensor, valid: Tensor, visual: Tensor) -> Routing:
        logits, ids, weights = self.gate(x)
        padding = ~valid[:, None]
        return Routing(layer, x, logits, ids.masked_fill(padding, -1), weights.masked_fill(padding, 0), visual)

    def beside(self, x: Tensor) -> Tensor | float:
        """What the shared expert adds, [T, H] f32."""
        return self.shared_experts(x, x.dtype) if hasattr(self, "shared_experts") else 0.0
