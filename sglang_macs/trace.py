"""Recording what each plan did, and reading it back: `--macs-trace FOLDER`, one JSON-lines file a rank.

A line a planned forward pass holds this rank's own counts by layer, expert and modality; summed over the ranks' files
they are the group's loads, before and after. For the first few pictures a line also holds, per visual token and layer,
its weight and how many of its assignments were clipped and dropped, and the picture itself, made smaller.

Writing makes the host wait for each planned pass (decode passes are not planned): for studies, not for every day.
"""

import base64
import io
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .choices import WEIGHT_ONE
from .config import MacsConfig
from .errors import MacsError
from .plan import PlanResult

SCHEMA = "sglang-macs/trace/1"
MAX_PICTURES = 16  # of each rank
MAX_SIDE = 512  # pixels of a stored picture
KEPT, CLIPPED, REROUTED = range(3)  # rows of a plan's counts


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
    """One plan, on the device it was made on."""

    layer_id: int
    num_ranks: int
    result: PlanResult
    clipped: Tensor  # [T] u8, slots of each row
    dropped: Tensor  # [T] u8


class Recorder:
    """Writes one rank's file.

    Args:
        config: its `trace` is the folder, `trace_limit_mb` the most that is written.
        rank: of the expert-parallel group.
    """

    def __init__(self, config: MacsConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self._left = int(config.trace_limit_mb * 1e6)
        self._started = time.monotonic()
        self._step = 0
        self._layers: list[_Layer] = []
        self._sizes = (0, 0, 0)  # ranks, experts, top-k
        self._parts: set[tuple[int, int]] = set()  # (key, first) of the pictures recorded
        try:
            os.makedirs(config.trace, exist_ok=True)
            self._file = open(os.path.join(config.trace, f"rank-{rank}.jsonl"), "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise MacsError("--macs-trace", f"{config.trace} ({error.strerror})", "a folder to write into") from error

    @contextmanager
    def forward_pass(self, shown: Sequence[Shown], attn_tp_rank: int) -> Iterator[None]:
        """Around one forward pass: writes its line if it was planned. attn_tp_rank says which rows are this rank's."""
        self._layers.clear()
        try:
            yield
        finally:
            if self._layers and self._left > 0:
                self._write(shown, attn_tp_rank)
            self._step += bool(self._layers)
            self._layers.clear()

    def add(self, layer_id: int, num_ranks: int, topk_ids: Tensor, result: PlanResult) -> None:
        """One layer's plan. topk_ids [T, K] are those before it."""
        clipped = (topk_ids != result.topk_ids).sum(dim=1, dtype=torch.uint8)
        dropped = ((topk_ids >= 0) & (result.topk_ids < 0)).sum(dim=1, dtype=torch.uint8)
        self._layers.append(_Layer(layer_id, num_ranks, result, clipped, dropped))
        self._sizes = (num_ranks, result.counts.shape[1], topk_ids.shape[1])

    def _write(self, shown: Sequence[Shown], attn_tp_rank: int) -> None:
        by_layer: dict[int, list[PlanResult]] = {}  # two a layer where SGLang overlaps the halves of a batch
        for layer in self._layers:
            by_layer.setdefault(layer.layer_id, []).append(layer.result)
        whole = len(by_layer) == len(self._layers)  # the halves' rows would have to be put together again

        def sums(of: Callable[[PlanResult], Tensor]) -> Tensor:
            return torch.stack([sum(of(result) for result in results) for results in by_layer.values()]).cpu()

        units = WEIGHT_ONE if self.config.load == "effective" else 1
        line = {
            "step": self._step,
            "time": round(time.monotonic() - self._started, 4),
            "tokens": sum(result.weight.shape[0] for result in next(iter(by_layer.values()))),
            "layers": list(by_layer),
            "visual_share": [round(v / w, 4) if w else 0.5 for v, w in sums(lambda r: r.group[-2:].long()).tolist()],
            "bound": [b // units for b in sums(lambda r: r.cut[:, 3].amax().long()).tolist()],
            "counts": _pack(sums(lambda r: r.counts).numpy().astype(np.int32)),
            "pictures": [self._picture(part, attn_tp_rank) for part in shown if whole and self._wanted(part)],
        }
        if self._step == 0:
            self._emit(self._header())
        self._emit(line)

    def _header(self) -> dict[str, object]:
        ranks, experts, top_k = self._sizes
        sizes = {"rank": self.rank, "ranks": ranks, "experts": experts, "top_k": top_k}
        return {"schema": SCHEMA, "version": __version__, **sizes, "config": self.config.to_json()}

    def _emit(self, line: dict[str, object]) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        self._left -= len(text)
        if self._left < 0:
            self._left, text = 0, '{"full":true}\n'
        self._file.write(text)
        self._file.flush()

    def _wanted(self, part: Shown) -> bool:
        """Whether to record this part; remembers it. Requests repeat pictures, and chunks split them."""
        known = {key for key, _ in self._parts}
        fresh = (part.key, part.first) not in self._parts and (part.key in known or len(known) < MAX_PICTURES)
        if part.token_grid is None or not fresh:
            return False
        self._parts.add((part.key, part.first))
        return True

    def _picture(self, part: Shown, attn_tp_rank: int) -> dict[str, object]:
        """What became of this rank's rows of the part, layer by layer; with attention-TP a rank has a share of them."""
        layers = self._layers
        rows = layers[0].result.weight.shape[0]
        origin = attn_tp_rank * rows
        start, stop = max(part.row, origin), min(part.row + part.count, origin + rows)
        mine = slice(max(start - origin, 0), max(stop - origin, 0))
        weight = torch.stack([layer.result.weight[mine] for layer in layers])
        return {
            "key": f"{part.key & 0xFFFFFFFF:08x}",
            "grid": part.token_grid,
            "first": part.first + max(start - part.row, 0),
            "weight": _pack((weight * 255).round().to(torch.uint8).cpu().numpy()),
            "clipped": _pack(torch.stack([layer.clipped[mine] for layer in layers]).cpu().numpy()),
            "dropped": _pack(torch.stack([layer.dropped[mine] for layer in layers]).cpu().numpy()),
            "jpeg": None if part.first or part.pixels is None else _jpeg(part),
        }


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
    from PIL import Image

    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()


# ---- Reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One planned forward pass over the whole group. L layers, R ranks, E experts.

    time in seconds; tokens: over all ranks; visual_share, bound [L]; counts [L, 3, E, 2] i64 kept, clipped, re-routed
    in, by (visual | text), summed over the ranks.
    """

    time: float
    tokens: int
    visual_share: np.ndarray
    bound: np.ndarray
    counts: np.ndarray

    def expert_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """[L, E] rows before and after."""
        before = self.counts[:, KEPT] + self.counts[:, CLIPPED]
        after = self.counts[:, KEPT] + self.counts[:, REROUTED]
        return before.sum(axis=-1), after.sum(axis=-1)


@dataclass
class Picture:
    """One image's fate on the rank that had it. weight [L, rows, columns] f32, NaN where not recorded; clipped,
    dropped [L, rows, columns] u8 of its tokens' top-k assignments.
    """

    jpeg: bytes | None
    weight: np.ndarray
    clipped: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A recorded run. full: whether a rank stopped at its limit."""

    ranks: int
    experts: int
    top_k: int
    config: dict
    layers: list[int]
    steps: list[Step]
    pictures: list[Picture]
    full: bool

    def rank_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """[steps, L, R] rows before and after, experts placed linearly."""
        pairs = [step.expert_rows() for step in self.steps]
        shape = (len(pairs), len(self.layers), self.ranks, -1)
        before, after = (np.stack([pair[i] for pair in pairs]).reshape(shape).sum(axis=-1) for i in (0, 1))
        return before, after


def load(folder: str) -> Trace:
    """Reads every rank's file below `folder`. A last line that a crash cut short is left out; anything else that is
    not a trace raises MacsError.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith("rank-") and name.endswith(".jsonl"))
        if not names:
            raise MacsError("trace", f"{folder} without rank-N.jsonl", "a folder that --macs-trace wrote")
        files = [_lines(os.path.join(folder, name)) for name in names]
    except OSError as error:
        raise MacsError("trace", f"{folder} ({error.strerror})", "a folder that --macs-trace wrote") from error
    try:
        return _combine([file[0] for file in files], [file[1:] for file in files])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, zlib.error) as error:
        if isinstance(error, MacsError):
            raise
        raise MacsError("trace", f"{folder} ({error!r})", SCHEMA, "Record it again.") from error


def _lines(path: str) -> list[dict]:
    with open(path, "rb") as file:
        raw = file.read().split(b"\n")
    lines = []
    for number, text in enumerate(raw):
        if not text:
            continue
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError) as error:  # also what is no UTF-8
            if number == len(raw) - 1:
                break  # no newline behind it: the process was killed while it wrote
            raise MacsError("trace", f"line {number + 1} of {path} ({error})", "JSON", "Record it again.") from error
    if not lines or not isinstance(lines[0], dict) or lines[0].get("schema") != SCHEMA:
        raise MacsError("trace", f"{path} without a header", SCHEMA, "Was any batch planned while it was recorded?")
    return lines


def _combine(headers: list[dict], files: list[list[dict]]) -> Trace:
    ranks, experts, top_k = (_count(headers[0][name]) for name in ("ranks", "experts", "top_k"))
    if sorted(header["rank"] for header in headers) != list(range(ranks)) or experts % ranks:
        found = f"files of ranks {[header['rank'] for header in headers]} and {experts} experts"
        raise MacsError("trace", found, f"one of each of {ranks} ranks", "Copy the other hosts' files into the folder.")
    by_rank = [[line for line in file if "step" in line] for file in files]
    length = min(len(lines) for lines in by_rank)
    if not length:
        raise MacsError("trace", "no planned pass", "at least one", "Send a prefill of --macs-min-tokens tokens.")
    layers = [int(layer) for layer in by_rank[0][0]["layers"]]
    if any(line["layers"] != layers for lines in by_rank for line in lines[:length]):
        raise MacsError("trace", "passes over different layers", f"layers {layers} in each", "Record it again.")
    steps = [_step([lines[i] for lines in by_rank], len(layers), experts) for i in range(length)]
    pictures = [p for lines in by_rank for p in _pictures(lines[:length], len(layers))]
    full = any("full" in line for file in files for line in file)
    return Trace(ranks, experts, top_k, dict(headers[0]["config"]), layers, steps, pictures, full)


def _step(lines: list[dict], layers: int, experts: int) -> Step:
    if len({line["step"] for line in lines}) != 1:
        raise MacsError(
            "trace", f"steps {[line['step'] for line in lines]}", "the same on each rank", "Record it again."
        )
    counts = sum(_unpack(line["counts"], np.int32, (layers, 3, experts, 2)).astype(np.int64) for line in lines)
    share, bound = (_numbers(lines[0][name], (layers,), high) for name, high in (("visual_share", 1), ("bound", 2**33)))
    if counts.min() < 0 or (counts[:, REROUTED].sum() > counts[:, CLIPPED].sum()):
        raise ValueError("counts that no plan makes")
    time_s = float(_numbers(lines[0]["time"], (), 1e12))
    return Step(time_s, sum(int(_numbers(line["tokens"], (), 2**31)) for line in lines), share, bound, counts)


def _pictures(lines: list[dict], layers: int) -> list[Picture]:
    """One rank's pictures; the parts of chunked ones put together."""
    found: dict[str, Picture] = {}
    for part in (part for line in lines for part in line["pictures"]):
        rows, columns = (_count(size) for size in part["grid"])
        if part["key"] not in found:
            blank = np.zeros((layers, rows, columns), dtype=np.uint8)
            found[part["key"]] = Picture(None, np.full(blank.shape, np.nan, dtype=np.float32), blank, blank.copy())
        one, first = found[part["key"]], int(part["first"])
        if part["jpeg"] is not None:
            one.jpeg = base64.b64decode(part["jpeg"], validate=True)
        weight = _unpack(part["weight"], np.uint8, (layers, -1))
        where = slice(first, first + weight.shape[1])
        one.weight.reshape(layers, -1)[:, where] = weight / np.float32(255)
        for name in ("clipped", "dropped"):
            getattr(one, name).reshape(layers, -1)[:, where] = _unpack(part[name], np.uint8, (layers, -1))
    return list(found.values())


def _count(value: object) -> int:
    if type(value) is not int or not 0 < value < 2**20:  # True is an int, too
        raise ValueError(f"a size of {value!r}")
    return value


def _numbers(value: object, shape: tuple[int, ...], high: float) -> np.ndarray:
    """`value` as f64 of `shape`, each in [0, high]. Raises ValueError, TypeError."""
    numbers = np.array(value, dtype=float).reshape(shape)
    if not ((numbers >= 0) & (numbers <= high)).all():  # NaN fails, too
        raise ValueError(f"{value!r} beyond 0 to {high:g}")
    return numbers


def _unpack(text: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Raises ValueError for another size. At most a little more than `shape` is decompressed, so no line is a bomb."""
    most = 64 << 20
    raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), most)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)
