"""What the MoE layers of one forward pass need to know about its batch: which rows are visual, which are left alone,
and whether to act.

The engine's hook opens a `Batch` around the forward pass; dispatchers read it. Whether a batch is planned is decided
from what every rank of the EP group knows alike (`RankBatches`), because the plan's exchange is collective.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import MacsConfig
from .clipped import Clipped

# SGLang pads the positions of multimodal items with ids from here on (managers/schedule_batch.py, MM_PAD_SHIFT_VALUE).
PAD_ID_BASE = 1_000_000
NO_PAD_ID = 0
# Why a batch is not planned: "off" is the preset, "draft" a draft model, "outside" no forward pass (graph capture).
SKIP_REASONS = ("decode", "small", "off", "draft", "outside")
# Of these, where nobody knows what the other ranks run.
UNKNOWN = ("draft", "outside")
NO_GAIN = (
    "no_gain"  # why a layer of a planned batch is not planned: less to gain than a plan costs (dispatch/acting.py)
)
# Values of a segment that are not the number of one.
TEXT, LEFT_ALONE = -1, -2


@dataclass(frozen=True)
class RankBatches:
    """What each attention data-parallel rank runs in one pass, as all ranks of the EP group know it.

    tokens: of each rank; prefills: whether it runs a prefill, alone or mixed with decoding; decodes: whether it decodes
    or verifies speculated tokens, alone or mixed with a prefill; exempts: whether it runs an exempt request.
    """

    tokens: tuple[int, ...]
    prefills: tuple[bool, ...]
    decodes: tuple[bool, ...]
    exempts: tuple[bool, ...] = ()

    @classmethod
    def of_modes(cls, tokens: Sequence[int], modes: Sequence[Any], exempts: Sequence[bool] = ()) -> "RankBatches":
        """modes: SGLang's `ForwardMode` of each rank."""
        return cls(
            tuple(tokens),
            tuple(mode.is_extend() and not mode.is_target_verify() for mode in modes),
            tuple(mode.is_decode() or mode.is_target_verify() or mode.is_mixed() for mode in modes),
            tuple(exempts),
        )

    @property
    def group_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens of the fullest rank."""
        return max(self.tokens, default=0)

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the ranks that run a prefill."""
        return sum(count for count, prefill in zip(self.tokens, self.prefills, strict=True) if prefill)

    @property
    def has_decode(self) -> bool:
        return any(count and decode for count, decode in zip(self.tokens, self.decodes, strict=True))


@dataclass(frozen=True)
class Batch:
    """segment [T] i32, unpadded and before any scattering, or None where every token of this rank is planned text.

    skip: "" to plan this batch, otherwise why not, one of `SKIP_REASONS`.
    group_tokens: tokens of the whole EP group, 0 where nobody counted.
    most_tokens: tokens of the fullest of the ranks that have batches of their own, 0 where nobody counted.
    halves: (start, end) token of each half under two-batch overlap, else empty.
    leaves_alone: whether rows of some rank are left alone: decoded tokens in the pass of a prefill, tokens of exempt
    requests. All ranks agree.
    makes_room: whether the others make room for rows left alone: some rank has an exempt request. All ranks agree.
    exempt_tokens: of exempt requests, on this rank.
    measured: whether the group's rows are recounted after the plan. All ranks agree.
    no_gain: layers that are not planned though the batch is. All ranks agree.
    gain: by layer, rows that a plan is expected to take off the most loaded rank; a layer of which nothing is known is
    missing.
    clipped: notes whose tokens lose assignments, with --macs-cache exact.
    of_rows: whether `segment` is that of a MoE layer's rows already, padded and scattered.
    """

    segment: Tensor | None = None
    num_segments: int = 0
    skip: str = "outside"
    group_tokens: int = 0
    most_tokens: int = 0
    halves: tuple[tuple[int, int], ...] = ()
    leaves_alone: bool = False
    makes_room: bool = False
    exempt_tokens: int = 0
    measured: bool = False
    no_gain: frozenset[int] = frozenset()
    gain: Mapping[int, int] = field(default_factory=dict)
    clipped: Clipped | None = field(default=None, repr=False, compare=False)
    of_rows: bool = False
    _of_rows: dict[tuple, tuple[Tensor, bool]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _left_alone: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def skip_of(self, layer_id: int) -> str:
        """Why this layer is not planned, or "": as all ranks decide it."""
        return self.skip or (NO_GAIN if layer_id in self.no_gain else "")

    def segment_of_rows(
        self, rows: int, half: int | None, attn_tp: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, bool]:
        """What `align` makes of this batch, or of one half, and whether the rows can be this batch's. If not, all are
        text: a rank must take part in the plan's exchange whatever it knows. The first layer that asks makes it for
        all the others of the pass.
        """
        if self.of_rows:
            return self.segment, True
        key = (rows, half, attn_tp, device)
        if key not in self._of_rows:
            segment = align(self.segment_of(half), rows, *attn_tp, device)
            fits = segment is not None
            self._of_rows[key] = (segment if fits else align(None, rows, *attn_tp, device), fits)
        return self._of_rows[key]

    def left_alone_of(self, segment: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which rows of a `segment_of_rows` are left alone [T] bool, None where no rank has any; and the segment where
        they are text, for a plan. The first layer makes them for all.
        """
        if not self.leaves_alone:
            return None, segment
        if id(segment) not in self._left_alone:
            self._left_alone[id(segment)] = segment == LEFT_ALONE, segment.clamp(min=TEXT)
        return self._left_alone[id(segment)]

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


def skip_reason(config: MacsConfig, ranks: RankBatches, num_ranks: int) -> str:
    """Why a batch is not planned, or "". num_ranks: of the EP group, over which `min_tokens` is a mean."""
    tokens = ranks.group_tokens if config.decode else ranks.prefill_tokens
    if not any(ranks.prefills) and not config.decode:
        return "decode"
    if tokens < (config.min_tokens or 0) * num_ranks:
        return "small"
    return "off" if config.is_off else ""  # last: with MACS off, the batches it would act on are counted alone


def of_forward(
    forward_batch: Any,
    config: MacsConfig,
    num_ranks: int,
    ranks: RankBatches | None = None,
    decoding: int = 0,
    exempt: Sequence[tuple[int, int]] = (),
) -> Batch:
    """What the MoE layers need of one of SGLang's `ForwardBatch`es, before embedding clamps the padded ids away.

    num_ranks: of the EP group. ranks: what each of them runs; None where attention is not data-parallel, so that all
    run this batch. decoding: how many of the last tokens of a mixed batch are decoded ones. exempt: (start, end) token
    of each exempt request.
    """
    mode, tokens = forward_batch.forward_mode, forward_batch.input_ids.numel()
    ranks = ranks or RankBatches.of_modes([tokens], [mode], [bool(exempt)])
    skip = skip_reason(config, ranks, num_ranks)
    if skip not in ("", "off"):
        return Batch(skip=skip, group_tokens=ranks.group_tokens, most_tokens=ranks.most_tokens)
    segment, num_segments = _visual_segments(forward_batch, config)
    left_alone = list(exempt)
    if not config.decode:
        decoded = decoding if mode.is_mixed() else tokens if mode.is_decode() or mode.is_target_verify() else 0
        left_alone += [(tokens - decoded, tokens)] if decoded else []
    for start, end in left_alone:
        segment = torch.full_like(forward_batch.input_ids, TEXT, dtype=torch.int32) if segment is None else segment
        segment[start:end] = LEFT_ALONE
    return Batch(
        segment,
        num_segments,
        skip=skip,
        group_tokens=ranks.group_tokens,
        most_tokens=ranks.most_tokens,
        halves=tuple(child.tbo_parent_token_range for child in forward_batch.tbo_children or ()),
        leaves_alone=(ranks.has_decode and not config.decode) or any(ranks.exempts),
        makes_room=any(ranks.exempts),
        exempt_tokens=sum(end - start for start, end in exempt),
    )


def spans(chosen: Sequence[bool], lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, end) token of each chosen request of a batch; lengths: tokens of every request in it."""
    ends = list(itertools.accumulate(lengths))
    return tuple((end - n, end) for one, n, end in zip(chosen, lengths, ends, strict=True) if one)


def _visual_segments(forward_batch: Any, config: MacsConfig) -> tuple[Tensor | None, int]:
    """What `segments` returns, or (None, 0) where no token of this rank is visual."""
    if not (forward_batch.forward_mode.is_extend() and forward_batch.contains_mm_inputs()):
        return None, 0
    items = [i for inputs in forward_batch.mm_inputs if inputs is not None for i in inputs.mm_items]
    return segments(forward_batch.input_ids, config.entropy_scope, _stand_for(items, config.entropy_scope))


def _stand_for(items: Iterable[Any], entropy_scope: str) -> dict[int, int]:
    """Ids of SGLang's `MultimodalDataItem`s that `segments` must not take as they are, and what it takes instead: text
    for sounds, which share the padding; for the further ids of an item its first, where items are told apart.
    """
    found: dict[int, int] = {}
    for item in items:
        ids = getattr(item, "pad_values", None) or (item.pad_value,)  # from SGLang 0.5.23 on several, in turn
        if item.is_audio():
            found |= dict.fromkeys(ids, NO_PAD_ID)
        elif entropy_scope == "image":
            found |= dict.fromkeys(ids[1:], ids[0])
    return found


def unmarked(items: Iterable[Any], input_ids: Sequence[int]) -> int:
    """How many of a request's pictures and videos have no padded position in its ids: no token of theirs is visual.

    items: SGLang's `MultimodalDataItem`s; `offsets` are (first, last) positions in `input_ids`.
    """
    return sum(
        not item.is_audio() and not any(max(input_ids[first], input_ids[last]) >= PAD_ID_BASE for first, last in places)
        for item in items
        if (places := [(a, b) for a, b in item.offsets or () if 0 <= a <= b < len(input_ids)])
    )


def segments(input_ids: Tensor, entropy_scope: str, stand_for: Mapping[int, int] | None = None) -> tuple[Tensor, int]:
    """Segment of each token from the engine's padded ids, and the number of segments.

    Args:
        input_ids: [T] integer ids, multimodal positions at `PAD_ID_BASE` + hash of the item.
        entropy_scope: "batch" puts all visual tokens into segment 0; "image" gives each item its own.
        stand_for: other ids to take for some of them (`NO_PAD_ID`: text).
    Returns:
        [T] i32, -1 = text; and the number of segments.
    """
    if stand_for:
        input_ids = _replaced(input_ids, stand_for)
    visual = input_ids >= PAD_ID_BASE
    segment = torch.full(input_ids.shape, TEXT, dtype=torch.int32, device=input_ids.device)
    if entropy_scope == "batch":
        return segment.masked_fill_(visual, 0), 1
    items, index = torch.unique(input_ids[visual], return_inverse=True)
    segment[visual] = index.int()
    return segment, items.numel()


def _replaced(ids: Tensor, by: Mapping[int, int]) -> Tensor:
    """`ids` [T] with what `by` holds for some of them."""
    known, others = torch.tensor(sorted(by.items()), dtype=ids.dtype).to(ids.device).unbind(1)
    place = torch.searchsorted(known.contiguous(), ids).clamp_(max=known.numel() - 1)
    return torch.where(known[place] == ids, others[place], ids)


def align(
    segment: Tensor | None, rows: int, attn_tp_rank: int, attn_tp_size: int, device: torch.device
) -> Tensor | None:
    """The segment of each row that the MoE layer sees: padded with text, then this rank's contiguous share.

    Returns [rows] i32, or None where the rows cannot be those of this batch (the caller counts it and takes all rows
    for text).
    """
    if segment is None:
        return torch.full((rows,), TEXT, dtype=torch.int32, device=device)
    if segment.numel() > rows * attn_tp_size:
        return None
    return scattered(segment, rows, attn_tp_rank, attn_tp_size, fill=TEXT)


def scattered(values: Tensor, rows: int, attn_tp_rank: int, attn_tp_size: int, fill: int = 0) -> Tensor:
    """This rank's share of per-token values under attention-TP: padded with `fill`, then a contiguous slice.

    values: [N, ...] with N <= rows * attn_tp_size. Returns [rows, ...].
    """
    padded = values.new_full((rows * attn_tp_size, *values.shape[1:]), fill)
    padded[: values.shape[0]] = values
    return padded[attn_tp_rank * rows : (attn_tp_rank + 1) * rows]
