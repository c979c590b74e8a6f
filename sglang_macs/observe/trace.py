"""Reading what `--macs-trace FOLDER` recorded (recorder.py writes it); needs no torch.

Every start of a server is a *run*, with one JSON-lines file a rank: a header, then a line a planned pass. Whatever is
read is bounded by what is really there: a file is read line by line, and what it makes of itself when it is
decompressed comes out of a budget that grows with its size.
"""

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ..errors import MacsError
from .untrusted import Budget, checked_count, jpeg, numbers, unpack

SCHEMA = "sglang-macs/trace/2"
MAX_PICTURES = 16  # of each rank
MAX_LINE = 16 << 20  # bytes
KEPT, CLIPPED, REROUTED = range(3)  # rows of a plan's counts

MAX_CELLS = 1 << 16  # visual tokens of one picture
MAX_SIZES = {"ranks": 1024, "experts": 4096, "top_k": 64, "stages": 256, "attn_tp": 1024}
MAX_LAYERS = 512
FREE_BYTES, BYTES_A_BYTE = 64 << 20, 64  # what a trace may decompress to: some, and so much for each byte of its files

_FILE = re.compile(
    r"(?P<run>.+)\.replica-(?P<replica>\d{1,4})\.stage-(?P<stage>\d{1,4})\.rank-(?P<rank>\d{1,4})\.jsonl"
)
_FIX = "Record it again."


def file_name(run: str, replica: int, stage: int, rank: int) -> str:
    """Of one rank of one start."""
    return f"{run}.replica-{replica}.stage-{stage}.rank-{rank}.jsonl"


@dataclass(frozen=True)
class Step:
    """One forward pass of a planned batch over the whole EP group. L layers of all stages, R ranks.

    time in seconds; tokens: over all ranks. planned [L] bool: False where a layer was left alone, since a plan costs
    more than it would have gained; gain [L]: rows off the most loaded rank that were expected of a plan, 0 where
    nothing was known. visual_share, bound [L]; of a layer left alone an average over the ranks, and no bound. before,
    after [L, R] i64: rows of each rank, experts placed linearly; outcomes [L, 3, 2] i64 kept, clipped, re-routed in, by
    (visual | text); experts [L, 2, E] i32: rows as they were routed, (visual | text).
    """

    time: float
    tokens: int
    planned: np.ndarray
    gain: np.ndarray
    visual_share: np.ndarray
    bound: np.ndarray
    before: np.ndarray
    after: np.ndarray
    outcomes: np.ndarray
    experts: np.ndarray


@dataclass
class Picture:
    """One image's outcome where it was first recorded most completely: by the ranks of an EP group that share a batch.

    importance [L, rows, columns] f32: what the plan went by for a token's weakest assignment, NaN where not recorded;
    clipped, dropped [L, rows, columns] u8 of its tokens' top-k assignments. replica, rank: who recorded it (the first
    rank); copies: how often it was recorded, each time in another batch.
    """

    replica: int
    rank: int
    jpeg: bytes | None
    importance: np.ndarray
    clipped: np.ndarray
    dropped: np.ndarray
    copies: int = 1

    @property
    def known(self) -> np.ndarray:
        """[rows, columns] bool: the tokens that are recorded in every layer."""
        return ~np.isnan(self.importance).any(axis=0)


@dataclass(frozen=True)
class Trace:
    """A recorded run. runs: all in the folder, oldest first; replicas: those whose passes are in here, one EP group
    each; full: whether a rank stopped at its limit.
    """

    run: str
    runs: list[str]
    replicas: list[int]
    ranks: int
    experts: int
    top_k: int
    config: dict
    layers: list[int]
    steps: list[Step]
    pictures: list[Picture]
    full: bool

    def rank_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """[steps, L, R] rows before and after."""
        return np.stack([step.before for step in self.steps]), np.stack([step.after for step in self.steps])


def load(folder: str, run: str | None = None, replica: int | None = None) -> Trace:
    """Reads one run below `folder`: the latest, or that of this name. Replicas serve side by side, each with ranks of
    its own: all their passes together, in the order of time, or those of one.

    A last line that a crash cut short is left out; anything else that is not a trace raises MacsError.
    """
    try:
        run, runs, files = _files_of(folder, run, replica)
        budget = Budget(FREE_BYTES + BYTES_A_BYTE * sum(map(os.path.getsize, chain(*files.values()))))
        groups = [group for number, paths in files.items() if (group := _group(number, paths, budget)) is not None]
        if not groups:
            fix = "Send a prefill of --macs-min-tokens tokens, or name an earlier run."
            raise MacsError("trace", f"no planned pass in run {run}", "at least one", fix)
        return _together(run, runs, groups)
    except OSError as error:
        raise MacsError("trace", f"{folder} ({error.strerror})", "a folder that --macs-trace wrote") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, zlib.error) as error:
        if isinstance(error, MacsError):
            raise
        what = " ".join(str(error).split())[:200]
        raise MacsError("trace", f"{folder} ({type(error).__name__}: {what})", SCHEMA, _FIX) from error


def _files_of(folder: str, run: str | None, replica: int | None) -> tuple[str, list[str], dict[int, list[str]]]:
    """(run, all runs, {replica: its files})."""
    names = sorted(os.listdir(folder))
    found = [match for match in map(_FILE.fullmatch, names) if match]
    if not found:
        old = any(re.fullmatch(r"rank-\d+\.jsonl", name) for name in names)
        got = f"{folder} with the files of an older version" if old else f"{folder} without RUN.replica-N....jsonl"
        raise MacsError("trace", got, "a folder that --macs-trace wrote", _FIX if old else "")
    runs = sorted({match["run"] for match in found})
    run = runs[-1] if run is None else run
    if run not in runs:
        raise MacsError("--run", run, f"one of {', '.join(runs[-4:])}")
    files: dict[int, list[str]] = {}
    for match in (match for match in found if match["run"] == run):
        files.setdefault(int(match["replica"]), []).append(os.path.join(folder, match.string))
    if replica is not None and replica not in files:
        raise MacsError("--replica", replica, f"one of {', '.join(map(str, sorted(files)))}, which run {run} has")
    return run, runs, {number: files[number] for number in sorted(files) if replica in (None, number)}


class _File:
    """One rank's file, line by line."""

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise MacsError("trace", f"{path}, which is no file", "a file that --macs-trace wrote")
        self.path, self._number = path, 0
        self._file = open(path, "rb")  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def next(self) -> dict | None:
        """None at the end, or where the process was killed while it wrote. Raises MacsError for what is no line."""
        text = self._file.readline(MAX_LINE + 1)
        self._number += 1
        where = f"line {self._number} of {self.path}"
        if len(text) > MAX_LINE:
            raise MacsError("trace", f"{where} of more than {MAX_LINE} bytes", "shorter lines", _FIX)
        try:
            line = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:  # also what is no UTF-8
            if not text.endswith(b"\n"):
                return None
            raise MacsError("trace", f"{where} ({str(error)[:120]})", "JSON", _FIX) from error
        if not isinstance(line, dict | None):
            raise MacsError("trace", f"{where}, a {type(line).__name__}", "an object", _FIX)
        return line


@dataclass(frozen=True)
class _Group:
    """What one replica recorded, all its stages and ranks."""

    replica: int
    header: dict
    layers: list[int]
    steps: list[Step]
    pictures: dict[tuple[int, str], Picture]
    full: bool


def _group(replica: int, paths: Sequence[str], budget: Budget) -> _Group | None:
    """One replica's files, pass by pass; None where none of them holds a pass."""
    files: list[_File] = []
    try:
        for path in paths:
            files.append(_File(path))
        headers = [file.next() for file in files]
        if not any(headers):
            return None
        for header, path in zip(headers, paths, strict=True):
            if not header or header.get("schema") != SCHEMA:
                got = f"{path} of schema {str(header.get('schema'))[:40]!r}" if header else f"{path} without a header"
                raise MacsError("trace", got, SCHEMA, _FIX)
        return _passes(replica, headers, files, budget)
    finally:
        for file in files:
            file.close()


def _passes(replica: int, headers: list[dict], files: list[_File], budget: Budget) -> _Group | None:
    sizes = _sizes(replica, headers)
    stages = _by_stage(replica, headers, sizes)
    layers: list[list[int]] = []  # of each stage
    steps: list[Step] = []
    pictures: dict[tuple[int, str], Picture] = {}
    while True:
        lines = [file.next() for file in files]
        full = any(line is not None and "full" in line for line in lines)
        if full or None in lines:
            break
        by_stage = [[lines[i] for i in stage] for stage in stages]
        layers = layers or [_layer_ids(stage[0]["layers"]) for stage in by_stage]
        if any(line["layers"] != ids for stage, ids in zip(by_stage, layers, strict=True) for line in stage):
            raise MacsError("trace", "passes over different layers", f"layers {layers} in each", _FIX)
        if len({line["step"] for line in lines}) != 1:
            raise MacsError("trace", f"steps {[line['step'] for line in lines]}", "the same on each rank", _FIX)
        steps.append(_step(by_stage, [len(ids) for ids in layers], sizes, budget))
        _add_pictures(pictures, replica, by_stage, [len(ids) for ids in layers], sizes["attn_tp"], budget)
    if not steps:
        return None
    ids = list(chain(*layers))
    if len(set(ids)) < len(ids):
        raise MacsError("trace", f"layers {layers}", "each layer in one stage", _FIX)
    known = {key: picture for key, picture in pictures.items() if picture.known.any()}
    return _Group(replica, headers[0], ids, steps, known, full)


def _sizes(replica: int, headers: list[dict]) -> dict[str, int]:
    sizes = {name: checked_count(headers[0][name], most) for name, most in MAX_SIZES.items()}
    if any(header[name] != size for header in headers for name, size in sizes.items()):
        raise MacsError("trace", f"ranks of replica {replica} of other sizes", f"{sizes} on each", _FIX)
    if sizes["ranks"] % sizes["attn_tp"]:
        raise ValueError(f"sizes {sizes}")
    return sizes


def _by_stage(replica: int, headers: list[dict], sizes: dict[str, int]) -> list[list[int]]:
    """[stage][rank] indices of the headers."""
    places = {(header["stage"], header["rank"]): i for i, header in enumerate(headers)}
    expected = [[(stage, rank) for rank in range(sizes["ranks"])] for stage in range(sizes["stages"])]
    if sorted(places) != list(chain(*expected)) or len(places) < len(headers):
        found = f"(stage, rank) {[(header['stage'], header['rank']) for header in headers]} of replica {replica}"
        want = f"one of each of {sizes['ranks']} ranks of {sizes['stages']} stages"
        raise MacsError("trace", found, want, "Copy the other hosts' files into the folder.")
    return [[places[place] for place in stage] for stage in expected]


def _layer_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LAYERS:
        raise ValueError(f"layers that are no list of 1 to {MAX_LAYERS}")
    return [checked_count(layer + 1, 1 << 20) - 1 for layer in value]


def _step(by_stage: list[list[dict]], layers: list[int], sizes: dict[str, int], budget: Budget) -> Step:
    """One pass; its lines by stage and rank."""
    stages = [_stage(lines, count, sizes, budget) for lines, count in zip(by_stage, layers, strict=True)]
    planned, gain, share, bound, rows, outcomes, experts = (np.concatenate(of) for of in zip(*stages, strict=True))
    if outcomes[:, REROUTED].sum() > outcomes[:, CLIPPED].sum():
        raise ValueError("counts that no plan makes")
    before, after = rows[:, 0], rows[:, 1]
    first = by_stage[0]
    tokens = sum(int(numbers(line["tokens"], (), 2**31)) for line in first)
    time = float(numbers(first[0]["time"], (), 1e12))
    return Step(time, tokens, planned, gain, share, bound, before, after, outcomes, experts)


def _stage(lines: list[dict], layers: int, sizes: dict[str, int], budget: Budget) -> tuple[np.ndarray, ...]:
    """planned, gain, visual_share, bound [l]; rows [l, 2, R] before and after, counts [l, 3, 2] by modality, rows as
    routed [l, 2, E] by modality, over all sources.
    """
    rows = np.zeros((layers, 2, sizes["ranks"]), dtype=np.int64)
    outcomes = np.zeros((layers, 3, 2), dtype=np.int64)
    budget.take(layers * 2 * sizes["experts"] * 4, "rows of experts")
    experts = np.zeros((layers, 2, sizes["experts"]), dtype=np.int32)
    for line in lines:
        if line["counts"] == "":  # a rank without tokens
            continue
        own = unpack(line["counts"], np.int32, (layers, 3, sizes["experts"], 2), budget)
        if own.min() < 0:
            raise ValueError("counts below 0")
        outcomes += own.sum(axis=2, dtype=np.int64)
        experts += (own[:, KEPT] + own[:, CLIPPED]).swapaxes(1, 2)
        rows += _rows_of_ranks(line, own, sizes["ranks"], budget)
    of_line = lines[0]
    planned = numbers(of_line.get("planned", [1] * layers), (layers,), 1) > 0  # older traces have planned ones alone
    gain = numbers(of_line.get("gain", [0] * layers), (layers,), 2**33)
    share, bound = (numbers(of_line[name], (layers,), top) for name, top in (("visual_share", 1), ("bound", 2**33)))
    if not planned.all():  # then a rank knows of its own tokens alone
        tokens = [float(numbers(line["tokens"], (), 2**31)) for line in lines]
        shares = np.stack([numbers(line["visual_share"], (layers,), 1) for line in lines])
        share = np.where(planned, share, np.average(shares, axis=0, weights=tokens) if sum(tokens) else share)
    return planned, gain, share, bound, rows, outcomes, experts


def _rows_of_ranks(line: dict, own: np.ndarray, ranks: int, budget: Budget) -> np.ndarray:
    """[l, 2, R] before and after of one source's counts [l, 3, E, 2]: as it says, where experts have replicas; else
    experts lie linearly.
    """
    of_experts = own.sum(axis=-1, dtype=np.int64)
    kept, clipped, rerouted = of_experts[:, KEPT], of_experts[:, CLIPPED], of_experts[:, REROUTED]
    before_and_after = np.stack([kept + clipped, kept + rerouted], axis=1)
    if "rows" not in line:
        return before_and_after.reshape(*before_and_after.shape[:2], ranks, -1).sum(axis=-1)
    rows = unpack(line["rows"], np.int32, (*before_and_after.shape[:2], ranks), budget)
    if rows.min() < 0 or (rows.sum(axis=-1) != before_and_after.sum(axis=-1)).any():
        raise ValueError("rows of ranks that are not those of experts")
    return rows


def _add_pictures(
    found: dict[tuple[int, str], Picture],
    replica: int,
    by_stage: list[list[dict]],
    layers: list[int],
    attn_tp: int,
    budget: Budget,
) -> None:
    """Puts the parts of one pass into their pictures: parts of chunks, of ranks that share a batch, and of stages."""
    starts = np.cumsum([0, *layers])
    for stage, lines in enumerate(by_stage):
        for rank, line in enumerate(lines):
            group = rank // attn_tp * attn_tp  # its first rank
            for part in line["pictures"]:
                key = (group, str(part["key"]))
                grid = tuple(checked_count(side, MAX_CELLS) for side in part["grid"])
                if key not in found:
                    if sum(of == group for of, _ in found) == MAX_PICTURES:
                        raise ValueError(f"more than {MAX_PICTURES} pictures of one rank")
                    found[key] = _blank(replica, group, (int(starts[-1]), *grid), budget)
                _add_part(found[key], part, slice(starts[stage], starts[stage + 1]), grid, budget)


def _blank(replica: int, rank: int, shape: tuple[int, int, int], budget: Budget) -> Picture:
    layers, rows, columns = shape
    if rows * columns > MAX_CELLS:
        raise ValueError(f"a picture of {rows} x {columns} tokens, more than {MAX_CELLS}")
    budget.take(layers * rows * columns * 6, f"a picture of {rows} x {columns} tokens")
    blank = np.zeros(shape, dtype=np.uint8)
    return Picture(replica, rank, None, np.full(shape, np.nan, dtype=np.float32), blank, blank.copy())


def _add_part(one: Picture, part: dict, layers: slice, grid: tuple[int, ...], budget: Budget) -> None:
    if one.clipped.shape[1:] != grid:
        raise ValueError(f"a picture of {grid} tokens, and of {one.clipped.shape[1:]}")
    first, cells = int(numbers(part["first"], (), MAX_CELLS)), grid[0] * grid[1]
    if part["jpeg"] is not None:
        one.jpeg = jpeg(part["jpeg"])
    count = layers.stop - layers.start
    level = unpack(part["importance"], np.uint8, (count, -1), budget, count * max(cells - first, 0))
    where = slice(first, first + level.shape[1])
    scale = numbers(part["scale"], (count,), 1e9).astype(np.float32)[:, None]
    one.importance.reshape(-1, cells)[layers, where] = level * (scale / 255)
    for name in ("clipped", "dropped"):
        one_of = getattr(one, name).reshape(-1, cells)
        one_of[layers, where] = unpack(part[name], np.uint8, level.shape, budget)


def _together(run: str, runs: list[str], groups: list[_Group]) -> Trace:
    first = groups[0]
    for group in groups[1:]:
        sizes = [[one.header[name] for name in ("ranks", "experts", "top_k")] + one.layers for one in (first, group)]
        if sizes[0] != sizes[1]:
            raise MacsError("trace", f"replicas {first.replica} and {group.replica} of other sizes", "one model", _FIX)
    return Trace(
        run=run,
        runs=runs,
        replicas=[group.replica for group in groups],
        ranks=first.header["ranks"],
        experts=first.header["experts"],
        top_k=first.header["top_k"],
        config=dict(first.header["config"]),
        layers=first.layers,
        steps=sorted((step for group in groups for step in group.steps), key=lambda step: step.time),
        pictures=_each_once(groups),
        full=any(group.full for group in groups),
    )


def _each_once(groups: list[_Group]) -> list[Picture]:
    """Every picture once, where most of it was recorded; groups of ranks record the same picture on their own."""
    best: dict[str, Picture] = {}
    for group in groups:
        for (_, key), picture in group.pictures.items():
            other = best.get(key)
            if other is None or picture.known.sum() > other.known.sum():
                best[key] = replace(picture, copies=1 if other is None else other.copies + 1)
            else:
                other.copies += 1
    return list(best.values())
