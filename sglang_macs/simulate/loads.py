"""Expert loads of a model: rows per layer, batch, modality and expert."""

import json
from dataclasses import dataclass
from importlib import resources

import numpy as np

from .. import files
from ..errors import MacsError

SCHEMA = "sglang-macs/loads/1"
MOST_LAYERS, MOST_ROWS = 256, 1e12
VISUAL, TEXT = 0, 1
PUBLISHED = "qwen3vl_30b_a3b.json"
# Spread of an expert's share from batch to batch. At 0.38 the published rows of layers 0 and 3 give the maximum over
# mean of the ranks that the same study saw on single batches (1.166 and 1.296); without it they give 1.08 and 1.25.
PUBLISHED_NOISE = 0.38
PUBLISHED_VISUAL_SHARE = 0.9


@dataclass(frozen=True)
class Loads:
    """Where a model's tokens go.

    rows: [L, B, 2, E], visual and text rows of each expert in B recorded batches; only proportions matter.
    noise: coefficient of variation of an expert's share between batches, 0 where the batches themselves are recorded.
    """

    source: str
    top_k: int
    rows: np.ndarray
    noise: float = 0.0

    @property
    def num_layers(self) -> int:
        return self.rows.shape[0]

    @property
    def num_experts(self) -> int:
        return self.rows.shape[3]

    def sample(self, batches: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """[L, batches, 2, E] i64: rows of random batches; each layer's add up to tokens * top_k."""
        layers, recorded, _, experts = self.rows.shape
        share = self.rows[:, np.arange(batches) % recorded].astype(float)
        if self.noise > 1e-6:  # less shows in no batch, and its square is soon 0
            shape = 1 / self.noise**2
            share *= rng.gamma(shape, 1 / shape, (layers, batches, 1, experts))
        share = share.reshape(layers, batches, -1)
        share /= share.sum(-1, keepdims=True)
        return rng.multinomial(tokens * self.top_k, share).reshape(layers, batches, 2, experts)


def max_over_mean(rows: np.ndarray, num_ranks: int) -> np.ndarray:
    """[...]: maximum over mean of the ranks' rows, for rows [..., E] placed linearly."""
    per_rank = rows.reshape(*rows.shape[:-1], num_ranks, -1).sum(-1)
    return per_rank.max(-1) / per_rank.mean(-1)


def noise_of(rows: np.ndarray, num_ranks: int, uneven: np.ndarray, seed: int = 0) -> float:
    """The spread of an expert's share between batches that makes the sums of many, rows [L, E], as uneven over
    `num_ranks` ranks as the batches were one by one, `uneven` [L] on average.
    """
    rng, spreads = np.random.default_rng(seed), np.linspace(0.05, 1.5, 30)
    drawn = [rng.gamma(1 / spread**2, spread**2, (64, *rows.shape)) for spread in spreads]
    found = [max_over_mean(rows, num_ranks), *(max_over_mean(rows * one, num_ranks).mean(0) for one in drawn)]
    return float([0.0, *spreads][int(np.argmin([np.abs(one - uneven).mean() for one in found]))])


def load(path: str) -> Loads:
    """Reads loads from a JSON file. Raises MacsError for a missing, truncated or foreign one.

    {"schema": "sglang-macs/loads/1", "source": "...", "top_k": K,
     "layers": {"0": [[[visual rows of each expert], [text rows of each expert]], ... one pair a batch]}}
    """
    try:
        raw = json.loads(files.read(path, "--loads"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']!r}")
        rows = np.array([raw["layers"][name] for name in sorted(raw["layers"], key=int)], dtype=float)
        found = Loads(str(raw["source"]), int(raw["top_k"]), rows)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, MacsError):
            raise
        raise MacsError(
            "--loads", f"{path} ({error})", f"JSON of {SCHEMA}", "docs/guide/simulate.md has the format."
        ) from error
    return checked(found, "--loads", path)


def checked(loads: Loads, what: str, path: str) -> Loads:
    """`loads`, if they can be some. Raises MacsError, in which `what` and `path` name them."""
    rows = loads.rows
    if rows.ndim != 4 or rows.shape[2] != 2 or not rows.size or len(rows) > MOST_LAYERS:
        raise MacsError(what, f"{path} with rows of shape {rows.shape}", "[layers, batches, 2, experts]")
    if not ((rows >= 0) & (rows <= MOST_ROWS)).all():  # NaN fails
        raise MacsError(what, f"{path} with rows beyond 0 to {MOST_ROWS:g}", "numbers of rows")
    if (rows.sum((2, 3)) == 0).any():
        raise MacsError(what, f"{path} with a batch without rows", "rows in every layer and batch")
    if not 1 <= loads.top_k <= rows.shape[3]:
        raise MacsError(what, f"{path} with top-{loads.top_k} of {rows.shape[3]} experts", "1 to all of them")
    return loads


def published(visual_share: float = PUBLISHED_VISUAL_SHARE, seed: int = 0) -> Loads:
    """Qwen3-VL-30B-A3B, 48 layers, after a public study (the package's JSON names it).

    Layers 0 and 3 have their published rows of each expert. For the others only the maximum over mean of eight ranks is
    published: they get the rows of layer 0 or 3, dealt to the experts so that eight ranks come out that uneven.
    """
    raw = json.loads(resources.files(__package__).joinpath(PUBLISHED).read_text(encoding="utf-8"))
    known = {int(k): np.array(v, float) for k, v in raw["expert_rows_by_layer"].items() if k != "note"}
    targets = np.array(raw["rank_max_over_mean_ep8"]["per_layer_mean"])
    rng = np.random.default_rng(seed)
    dealt = _dealt(list(known.values()), targets, rng)
    layers = [known.get(layer, rows) for layer, rows in enumerate(dealt)]
    split = [_by_modality(rows, visual_share, raw["modality_total_variation"], rng) for rows in layers]
    return Loads(raw["source"], raw["top_k"], np.array(split)[:, None], PUBLISHED_NOISE)


def _dealt(shapes: list[np.ndarray], targets: np.ndarray, rng: np.random.Generator, pool: int = 4096) -> np.ndarray:
    """[len(targets), E]: permutations of `shapes` whose eight ranks are as uneven, on noisy batches, as `targets`."""
    experts = len(shapes[0])
    shape = 1 / PUBLISHED_NOISE**2
    noise = rng.gamma(shape, 1 / shape, (48, experts))
    # Half at random, half with the full experts drawn to the front: the upper targets are rare among the former.
    pull = np.where(np.arange(pool) % 2, rng.uniform(0, 1.0, pool), 0.0)[:, None]
    rows = np.array(shapes)[rng.integers(0, len(shapes), pool)]
    order = np.argsort(-(pull * np.log(rows) + rng.gumbel(size=rows.shape)), axis=1)
    rows = np.take_along_axis(rows, order, 1)
    uneven = np.mean([max_over_mean(rows * n, 8) for n in noise], axis=0)
    return rows[[np.abs(uneven - target).argmin() for target in targets]]


def _by_modality(rows: np.ndarray, visual_share: float, variation: float, rng: np.random.Generator) -> np.ndarray:
    """[2, E]: rows [E] split so that visual and text tokens differ over the experts by the total `variation`."""
    share, text = rows / rows.sum(), 1 - visual_share
    taste = rng.normal(size=len(rows))

    def split(strength: float) -> tuple[np.ndarray, np.ndarray]:
        by_text = np.minimum(share * np.exp(strength * taste), share / max(text, 1e-9))
        by_text /= by_text.sum()
        by_text = np.minimum(by_text, share / max(text, 1e-9))  # no expert has more text than rows
        return np.maximum(share - text * by_text, 0), text * by_text

    def distance(strength: float) -> float:
        visual, textual = split(strength)
        return 0.5 * np.abs(visual / visual.sum() - textual / textual.sum()).sum()

    if not 1e-9 < visual_share < 1 - 1e-9:  # one modality has no rows to tell it from the other by
        return np.array([rows * visual_share, rows * text])
    strengths = np.linspace(0, 8, 81)
    best = min(strengths, key=lambda s: abs(distance(s) - variation))
    return np.array(split(best)) * rows.sum()
