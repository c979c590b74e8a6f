"""Recording what each plan did: `--macs-trace FOLDER`, one JSON-lines file a rank and start. `trace` reads them.

A line a forward pass of a planned batch, with the layers in it that were left alone for want of gain, holds this rank's
own counts by layer, expert and modality; summed over the ranks' files they are the group's loads, before and after. For
the first few pictures a line also holds, per visual token and layer, what its weakest assignment was worth to the plan
and how many of its assignments were clipped and dropped, and the picture itself, made smaller.

Writing makes the host wait for each planned pass (decode passes are not planned): for studies, not for every day.
Nothing that goes wrong in here fails a request: a full disk ends the recording, with one line on stderr.
"""

import base64
import io
import json
import math
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import __version__
from ..choices import WEIGHT_ONE
from ..config import MacsConfig
from ..console import say
from ..errors import MacsError
from ..plan.places import Places
from ..plan.plan import PlanResult
from .stats import rows_of
from .trace import MAX_LINE, MAX_PICTURES, SCHEMA, file_name
from .untrusted import MAX_SIDE

RUN_ENV = "SGLANG_MACS_TRACE_RUN"  # set by the launcher, inherited by its schedulers


@dataclass(frozen=True)
class Place:
    """Which rank of a launch: replica (--dp without dp-attention), stage of the pipeline, rank of the EP group.

    attn_tp: size of attention tensor parallelism; so many neighbouring ranks share the rows of a batch.
    """

    rank: int
    stage: int = 0
    replica: int = 0
    stages: int = 1
    attn_tp: int = 1


def new_run() -> str:
    """A name for one start of a server: names sort by time."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + secrets.token_hex(2)


def agreed_run() -> str:
    """The name of this start, the same on all its ranks: the launcher's, or, of several hosts' launchers, that of the
    rank which asks first. Waits for nobody: a stage without MoE layers never asks.
    """
    name = os.environ.get(RUN_ENV) or new_run()
    if not dist.is_initialized():
        return name
    return dist.distributed_c10d._get_default_store().compare_set("sglang-macs/trace", "", name).decode()


@dataclass(frozen=True)
class Shown:
    """The part of an image that lies in a batch: its tokens [first, first + count) are the batch's rows from `row` on.

    grid: (frames, height, width) in patches; tokens: of the whole image; pixels: [patches, values] as Qwen's processors
    make them, or None.
    """

    key: int
    row: int
    first: int
    count: int
    tokens: int
    grid: tuple[int, int, int]
    pixels: Tensor | None

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the image's tokens, or None where it is no plain grid: a video, another processor."""
        frames, height, width = self.grid
        merge = math.isqrt(height * width // max(self.tokens, 1))
        if frames != 1 or not merge or merge * merge * self.tokens != height * width:
            return None
        return height // merge, width // merge


@dataclass(frozen=True)
class _Layer:
    """One plan, on the device it was made on; or, if not `planned`, a layer as it was routed. gain: rows expected."""

    layer_id: int
    result: PlanResult
    planned: bool
    gain: int
    importance: Tensor  # [T] f32, see `importance_of`
    clipped: Tensor  # [T] u8, slots of each row
    dropped: Tensor  # [T] u8
    rows: Tensor | None  # [2, R] with replicas: this rank's, by the rank that they were routed and are sent to


class Recorder:
    """Writes one rank's file, which nobody but its owner can read: users' pictures are in it.

    Args:
        config: its `trace` is the folder, `trace_limit_mb` the most that is written.
        place: of this rank.
        run: name of this start, see `agreed_run`.

    Raises MacsError where the file cannot be made, or is there already.
    """

    def __init__(self, config: MacsConfig, place: Place, run: str) -> None:
        self.config, self.place, self.run = config, place, run
        self.stopped = ""  # why nothing more is recorded
        self._left = self._limit = int(config.trace_limit_mb * 1e6)
        self._started = time.monotonic()
        self._step = 0
        self._layers: list[_Layer] = []
        self._sizes = (0, 0, 0)  # ranks, experts, top-k
        self._parts: set[tuple[int, int]] = set()  # (key, first) of the pictures recorded
        try:
            os.makedirs(config.trace, mode=0o700, exist_ok=True)
            path = os.path.join(config.trace, file_name(run, place.replica, place.stage, place.rank))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = open(os.open(path, flags, 0o600), "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise MacsError("--macs-trace", f"{config.trace} ({error.strerror})", "a folder to write into") from error

    def state(self) -> dict[str, object]:
        """For `GET /server_info`: stopped is why nothing more is recorded, or ""."""
        return {"run": self.run, "bytes": self._limit - self._left, "stopped": self.stopped}

    def pass_of(self, forward_batch: Any, attn_tp_rank: int) -> AbstractContextManager[None]:
        """`forward_pass` around one of SGLang's `ForwardBatch`es, with the pictures in it."""
        shown: list[Shown] = []
        with self._harmless():
            shown = [] if self.stopped else shown_in(forward_batch)
        return self.forward_pass(shown, attn_tp_rank)

    @contextmanager
    def forward_pass(self, shown: Sequence[Shown], attn_tp_rank: int) -> Iterator[None]:
        """Around one forward pass: writes its line if it was planned and did not fail. attn_tp_rank says which rows are
        this rank's.
        """
        self._layers.clear()
        try:
            yield
            if self._layers:
                with self._harmless():
                    self._write(shown, attn_tp_rank)
                self._step += 1
        finally:
            self._layers.clear()

    def add(
        self,
        layer_id: int,
        num_ranks: int,
        topk_ids: Tensor,
        topk_weights: Tensor,
        result: PlanResult,
        *,
        planned: bool = True,
        gain: int = 0,
        places: Places | None = None,
    ) -> None:
        """One layer's plan. topk_ids, topk_weights [T, K] are those before it; gain: the rows off the most loaded rank
        that were expected of it, 0 where nothing was known.

        planned: False for a layer that was left alone; `result` is then as routed, its sums those of this rank alone.
        places: with replicas, whose ids are physical.
        """
        if self.stopped:
            return
        with self._harmless():
            importance = importance_of(self.config.importance, topk_ids, topk_weights, result.weight)
            rows, routed, sent = None, topk_ids, result.topk_ids
            if places is not None:
                width, logical = places.num_physical // num_ranks, places.logical_on(topk_ids.device)
                ranks = torch.div(torch.stack([routed, sent]), width, rounding_mode="floor")
                rows, routed, sent = rows_of(ranks, num_ranks), logical[routed.long()], logical[sent.long()]
            clipped = (routed != sent).sum(dim=1, dtype=torch.uint8)
            dropped = ((topk_ids >= 0) & (result.topk_ids < 0)).sum(dim=1, dtype=torch.uint8)
            self._layers.append(_Layer(layer_id, result, planned, gain, importance, clipped, dropped, rows))
            self._sizes = (num_ranks, result.counts.shape[1], topk_ids.shape[1])

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """What goes wrong inside ends the recording and nothing else: a trace must never cost a request."""
        try:
            yield
        except Exception as error:
            self._layers.clear()
            self._stop(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")

    def _stop(self, why: str) -> None:
        self.stopped = " ".join(why.split())[:200]
        with suppress(OSError):
            self._file.close()
        say(f"the trace of rank {self.place.rank} ends in pass {self._step}: {self.stopped}. The server serves on.")

    def _write(self, shown: Sequence[Shown], attn_tp_rank: int) -> None:
        by_layer: dict[int, list[PlanResult]] = {}  # two a layer where SGLang overlaps the halves of a batch
        decisions = {layer.layer_id: (layer.planned, layer.gain) for layer in self._layers}
        for layer in self._layers:
            by_layer.setdefault(layer.layer_id, []).append(layer.result)
        whole = len(by_layer) == len(self._layers)  # the halves' rows would have to be put together again

        def sums(of: Callable[[PlanResult], Tensor]) -> Tensor:
            return torch.stack([sum(of(result) for result in results) for results in by_layer.values()]).cpu()

        units = WEIGHT_ONE if self.config.load == "effective" else 1
        counts = sums(lambda r: r.counts[:3])
        pictures = [self._picture(part, attn_tp_rank) for part in shown if whole and self._wanted(part)]
        line = {
            "step": self._step,
            "time": round(time.monotonic() - self._started, 4),
            "tokens": sum(result.weight.shape[0] for result in next(iter(by_layer.values()))),
            "layers": list(by_layer),
            "visual_share": [round(v / w, 4) if w else 0.5 for v, w in sums(lambda r: r.group[-2:].long()).tolist()],
            "planned": [int(planned) for planned, _ in decisions.values()],
            "gain": [gain for _, gain in decisions.values()],
            "bound": [b // units for b in sums(lambda r: r.cut[:, 3].amax().long()).tolist()],
            "counts": _pack(counts.numpy().astype(np.int32)) if counts.any() else "",
            "pictures": [picture for picture in pictures if picture is not None],
        }
        if self._layers[0].rows is not None:
            line["rows"] = _pack(self._rank_rows().numpy().astype(np.int32))
        header = _json(self._header()) if self._step == 0 else b""
        text = _json(line)
        if len(text) > MAX_LINE:
            text = _json(line | {"pictures": []})
        self._emit(header + text)

    def _rank_rows(self) -> Tensor:
        """[L, 2, R] with replicas, on the host."""
        by_layer: dict[int, Tensor] = {}
        for layer in self._layers:
            by_layer[layer.layer_id] = by_layer.get(layer.layer_id, 0) + layer.rows
        return torch.stack(list(by_layer.values())).cpu()

    def _header(self) -> dict[str, object]:
        ranks, experts, top_k = self._sizes
        sizes = {"ranks": ranks, "experts": experts, "top_k": top_k}
        run = {"schema": SCHEMA, "version": __version__, "run": self.run}
        return {**run, **asdict(self.place), **sizes, "config": self.config.to_json()}

    def _emit(self, text: bytes) -> None:
        full = len(text) > self._left
        if full:
            text, self.stopped = b'{"full":true}\n', "the size limit, --macs-trace-limit-mb"
        self._left -= len(text)
        rest = memoryview(text)
        while rest:  # unbuffered, so that nothing is left to be written when the file is closed
            rest = rest[self._file.write(rest) :]

    def _wanted(self, part: Shown) -> bool:
        """Whether to record this part; remembers it. Requests repeat pictures, and chunks split them.

        The ranks that share a batch's rows decide alike: each sees all parts, those without a row of its own, too.
        """
        known = {key for key, _ in self._parts}
        fresh = (part.key, part.first) not in self._parts and (part.key in known or len(known) < MAX_PICTURES)
        if part.token_grid is None or not fresh:
            return False
        self._parts.add((part.key, part.first))
        return True

    def _picture(self, part: Shown, attn_tp_rank: int) -> dict[str, object] | None:
        """What became of this rank's rows of the part, layer by layer; with attention-TP a rank has a share of them,
        or None. The picture itself goes with its first row, in the first stage.
        """
        layers = self._layers
        rows = layers[0].result.weight.shape[0]
        origin = attn_tp_rank * rows
        start, stop = max(part.row, origin), min(part.row + part.count, origin + rows)
        if start >= stop:
            return None
        mine = slice(start - origin, stop - origin)
        importance = torch.stack([layer.importance[mine] for layer in layers]).cpu()
        scale = importance.amax(dim=1, keepdim=True)
        first = part.first + start - part.row
        shows = first == 0 and self.place.stage == 0 and part.pixels is not None
        return {
            "key": f"{part.key & 0xFFFFFFFF:08x}",
            "grid": part.token_grid,
            "first": first,
            "scale": scale[:, 0].tolist(),
            "importance": _pack((importance / scale.clamp(min=1e-30) * 255).round().to(torch.uint8).numpy()),
            "clipped": _pack(torch.stack([layer.clipped[mine] for layer in layers]).cpu().numpy()),
            "dropped": _pack(torch.stack([layer.dropped[mine] for layer in layers]).cpu().numpy()),
            "jpeg": _jpeg(part) if shows else None,
        }


def importance_of(importance: str, topk_ids: Tensor, topk_weights: Tensor, weight: Tensor) -> Tensor:
    """[T] f32: what the plan went by for each token's weakest assignment, before a full expert lowers it.

    The weakest, because it goes first; the sum over a token's assignments is 1 for every token of most routers.
    importance: as of the configuration; topk_ids, topk_weights [T, K] before the plan; weight [T] entropy weights.
    """
    if importance == "entropy":
        return weight
    gates = topk_weights.float()
    weakest = gates.masked_fill(topk_ids < 0, math.inf).amin(dim=1)
    weakest = weakest.masked_fill(weakest.isinf(), 0.0)
    return weakest * weight if importance == "entropy_gate" else weakest


def shown_in(forward_batch) -> list[Shown]:
    """The images' parts in one of SGLang's `ForwardBatch`es."""
    if not forward_batch.mm_inputs or forward_batch.extend_seq_lens_cpu is None:
        return []
    found, row = [], 0
    lengths = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
    for inputs, (prefix, length) in zip(forward_batch.mm_inputs, lengths, strict=True):
        for item in inputs.mm_items if inputs is not None else ():
            part = _part(item, prefix, length)
            if part is not None:
                found.append(replace(part, row=row + part.row))
        row += length
    return found


def _part(item, prefix: int, length: int) -> Shown | None:
    """The part of SGLang's multimodal `item` in tokens [prefix, prefix + length) of its request."""
    grid = item.model_specific_data.get("image_grid_thw")
    if not item.is_image() or grid is None or len(item.offsets or ()) != 1:
        return None
    begin, last = item.offsets[0]
    start, stop = max(begin, prefix), min(last + 1, prefix + length)
    if start >= stop:
        return None
    pixels = item.feature if isinstance(item.feature, Tensor) and item.feature.ndim == 2 else None
    frames, height, width = torch.as_tensor(grid).reshape(-1, 3)[0].tolist()
    return Shown(
        key=item.pad_value,
        row=start - prefix,
        first=start - begin,
        count=stop - start,
        tokens=last + 1 - begin,
        grid=(frames, height, width),
        pixels=pixels,
    )


def picture(part: Shown) -> np.ndarray | None:
    """[height, width, 3] u8 from patches in the order of Qwen's processors; None where they are not of that kind."""
    (_, height, width), values = part.grid, part.pixels.shape[1]
    side = math.isqrt(values // 6)  # 3 colours, 2 frames
    if part.pixels.shape[0] != height * width or side * side * 6 != values:
        return None
    rows, columns = part.token_grid
    merge = height // rows
    patches = part.pixels.float().cpu().view(rows, columns, merge, merge, 3, 2, side, side)[:, :, :, :, :, 0]
    pixels = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, 3)
    low, high = pixels.min(), pixels.max()  # the processor's normalisation, undone but for contrast
    return ((pixels - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8).numpy()


def _jpeg(part: Shown) -> str | None:
    """The picture at most MAX_SIDE wide and high, as base64; None without Pillow or for other patches."""
    pixels = picture(part)
    if pixels is None:
        return None
    try:
        from PIL import Image
    except ImportError:
        return None
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()


def _json(line: dict[str, object]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
