"""What the MoE layers of one forward pass need to know about its batch: which rows are visual, and whether to act.

The engine's hook opens a `Batch` around the forward pass; dispatchers read it. Whether a batch is planned is decided
from what every rank of the EP group knows alike, because the plan's exchange is collective.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import MacsConfig

# SGLang pads the positions of multimodal items with ids from here on (managers/schedule_batch.py, MM_PAD_SHIFT_VALUE).
PAD_ID_BASE = 1_000_000
# Why a batch is not planned: "off" is the preset, "draft" a draft model, "outside" no forward pass (graph capture).
SKIP_REASONS = ("decode", "small", "off", "draft", "outside")


@dataclass(frozen=True)
class Batch:
    """segment [T] i32, unpadded and before any scattering, or None where no token of this rank is visual.

    skip: "" to plan this batch, otherwise why not, one of `SKIP_REASONS`.
    group_tokens: tokens of the whole EP group, 0 where nobody counted.
    halves: (start, end) token of each half under two-batch overlap, else empty.
    """

    segment: Tensor | None = None
    num_segments: int = 0
    skip: str = "outside"
    group_tokens: int = 0
    halves: tuple[tuple[int, int], ...] = ()
    _of_rows: dict[tuple, tuple[Tensor, bool]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def segment_of_rows(
        self, rows: int, half: int | None, attn_tp: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, bool]:
        """What `align` makes of this batch, or of one half, and whether the rows can be this batch's. If not, all are
        text: a rank must take part in the plan's exchange whatever it knows. The first layer that asks makes it for
        all the others of the pass.
        """
        key = (rows, half, attn_tp, device)
        if key not in self._of_rows:
            segment = align(self.segment_of(half), rows, *attn_tp, device)
            fits = segment is not None
            self._of_rows[key] = (segment if fits else align(None, rows, *attn_tp, device), fits)
        return self._of_rows[key]

    def segment_of(self, half: int | None) -> Tensor | None:
        """The segment of one half, or of the whole batch where `half` is None."""
        if self.segment is None or half is None:
            return self.segment
        start, end = self.halves[half]
        return self.segment[start:end]


_current = Batch()


@contextmanager
def forward(batch: Batch) -> Iterator[None]:
    """Makes `batch` the current one; nested passes (draft models, recomputation) restore the outer one."""
    global _current
    outer, _current = _current, batch
    try:
        yield
    finally:
        _current = outer


def current() -> Batch:
    """The batch of the forward pass that is running, or one that is skipped as "outside"."""
    return _current


def skip_reason(config: MacsConfig, *, is_prefill: bool, group_tokens: int) -> str:
    """Why a batch is not planned, or "". Both arguments must be the same on every rank of the EP group."""
    if not is_prefill and not config.decode:
        return "decode"
    if group_tokens < config.min_tokens:
        return "small"
    return "off" if config.is_off else ""  # last: with MACS off, the batches it would act on are counted alone


def of_forward(forward_batch: Any, config: MacsConfig) -> Batch:
    """What the MoE layers need of one of SGLang's `ForwardBatch`es, before embedding clamps the padded ids away."""
    mode = forward_batch.forward_mode
    # Under dp-attention these are agreed between ranks; without it, every rank runs the same batch.
    tokens_by_rank = forward_batch.original_global_num_tokens_cpu or forward_batch.global_num_tokens_cpu
    if tokens_by_rank is not None:
        is_prefill, group_tokens = forward_batch.is_extend_in_batch, sum(tokens_by_rank)
    else:
        is_prefill, group_tokens = mode.is_extend(), forward_batch.input_ids.numel()
    skip = skip_reason(config, is_prefill=is_prefill, group_tokens=group_tokens)
    if skip not in ("", "off"):
        return Batch(skip=skip)
    halves = tuple(child.tbo_parent_token_range for child in forward_batch.tbo_children or ())
    common = {"skip": skip, "group_tokens": group_tokens, "halves": halves}
    if not (mode.is_extend() and forward_batch.contains_mm_inputs()):
        return Batch(**common)
    items = [i for inputs in forward_batch.mm_inputs if inputs is not None for i in inputs.mm_items]
    audio = frozenset(i.pad_value for i in items if i.is_audio())
    segment, num_segments = segments(forward_batch.input_ids, config.entropy_scope, audio)
    return Batch(segment, num_segments, **common)


def segments(input_ids: Tensor, entropy_scope: str, not_visual: frozenset[int] = frozenset()) -> tuple[Tensor, int]:
    """Segment of each token from the engine's padded ids, and the number of segments.

    Args:
        input_ids: [T] integer ids, multimodal positions at `PAD_ID_BASE` + hash of the item.
        entropy_scope: "batch" puts all visual tokens into segment 0; "image" gives each item its own.
        not_visual: pad ids of items that are not visual (audio shares the padding).
    Returns:
        [T] i32, -1 = text; and the number of segments.
    """
    visual = input_ids >= PAD_ID_BASE
    for pad_id in not_visual:
        visual &= input_ids != pad_id
    segment = torch.full(input_ids.shape, -1, dtype=torch.int32, device=input_ids.device)
    if entropy_scope == "batch":
        return segment.masked_fill_(visual, 0), 1
    items, index = torch.unique(input_ids[visual], return_inverse=True)
    segment[visual] = index.int()
    return segment, items.numel()


def align(
    segment: Tensor | None, rows: int, attn_tp_rank: int, attn_tp_size: int, device: torch.device
) -> Tensor | None:
    """The segment of each row that the MoE layer sees: padded with text, then this rank's contiguous share.

    Returns [rows] i32, or None where the rows cannot be those of this batch (the caller counts it and takes all rows
    for text).
    """
    if segment is None:
        return torch.full((rows,), -1, dtype=torch.int32, device=device)
    if segment.numel() > rows * attn_tp_size:
        return None
    return scattered(segment, rows, attn_tp_rank, attn_tp_size, fill=-1)


def scattered(values: Tensor, rows: int, attn_tp_rank: int, attn_tp_size: int, fill: int = 0) -> Tensor:
    """This rank's share of per-token values under attention-TP: padded with `fill`, then a contiguous slice.

    values: [N, ...] with N <= rows * attn_tp_size. Returns [rows, ...].
    """
    padded = values.new_full((rows * attn_tp_size, *values.shape[1:]), fill)
    padded[: values.shape[0]] = values
    return padded[attn_tp_rank * rows : (attn_tp_rank + 1) * rows]
