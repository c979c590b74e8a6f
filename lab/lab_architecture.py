"""Sizes of the lab's models, and what goes in and out of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lab.lab_pictures import Size

QWEN, GLM = "qwen3_vl_moe", "glm4v_moe"  # transformers' names of the two families


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model; the defaults are those of models/lab-vl-moe.

    Qwen3-VL-MoE: softmax scores, q/k norms, interleaved M-RoPE, deepstack. GLM-4.5V: sigmoid scores with a correction
    bias within the best groups of experts, a shared expert, `dense` layers first, M-RoPE of half a head by sections.
    """

    family: str = QWEN
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    top_k: int = 4
    intermediate: int = 64  # width of an expert
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_depth: int = 4
    vision_intermediate: int = 256
    deepstack: tuple[int, ...] = (1, 2, 3)
    position_side: int = 16
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (8, 4, 4)
    eps: float = 1e-6  # of the norms
    # GLM-4.5V's kind alone:
    dense: int = 0  # first layers that have one feed-forward network of width 2 * hidden in place of experts
    shared: int = 0  # width of the expert that every token passes through
    groups: int = 1
    topk_groups: int = 1
    scaling: float = 1.0  # of the routed experts' weights

    @property
    def scoring(self) -> str:
        """How the router makes its scores."""
        return "sigmoid" if self.family == GLM else "softmax"

    @property
    def moe_layers(self) -> range:
        return range(self.dense, self.layers)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim // 2 if self.family == GLM else self.head_dim

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
    """Rows of one picture size for the model: ids [n, L]; patches [n * pictures, P, 192] or None; length [n]."""

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


LAYOUTS = 64  # whose positions are remembered. A captured training step reads its own at an address: it has to stay
Layout = tuple[tuple[Size | None, int, int], ...]  # (picture size, rows, columns) of every group


def layout(batch: list[Batch]) -> Layout:
    return tuple((b.size, *b.ids.shape) for b in batch)


def picture_spans(size: Size | None) -> list[slice]:
    """Columns of each picture's visual tokens. <|im_start|> user \\n come before them in every prompt, and each picture
    stands between a token of its own before and behind.
    """
    if size is None:
        return []
    starts = (4 + i * (size.tokens + 2) for i in range(size.pictures))
    return [slice(start, start + size.tokens) for start in starts]


def visual_columns(size: Size | None, width: int, device: torch.device) -> Tensor:
    """[width] bool: columns of visual tokens."""
    found = torch.zeros(width, dtype=torch.bool, device=device)
    for span in picture_spans(size):
        found[span] = True
    return found
