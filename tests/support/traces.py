"""Recorded traces without a server: real plans on made-up batches, written by `Recorder` as scheduler ranks would."""

from contextlib import ExitStack
from pathlib import Path

import torch

from sglang_macs.config import MacsConfig
from sglang_macs.observe.recorder import Place, Recorder, Shown
from sglang_macs.observe.trace import file_name
from sglang_macs.plan.plan import Plan, PlanResult
from sglang_macs.plan.tokens import RoutedTokens

EXPERTS, RANKS, TOP_K, LAYERS = 8, 2, 2, (0, 2, 5)
ROWS, COLUMNS, SIDE = 4, 6, 4  # tokens of the picture, pixels of a patch; 2 x 2 patches a token
KEY = 1_234_567
RUN = "20261130T120000Z-0000"


def config(folder: Path, **options) -> MacsConfig:
    return MacsConfig.from_preset(**{"preset": "rank", "gamma": 1.0, "trace": str(folder), **options})


def picture() -> torch.Tensor:
    """[height, width, 3] f32 that names its own pixels: red grows downwards, green to the right; one corner is blue."""
    height, width = ROWS * 2 * SIDE, COLUMNS * 2 * SIDE
    pixels = torch.zeros(height, width, 3)
    pixels[..., 0] = torch.linspace(0, 1, height).unsqueeze(1)
    pixels[..., 1] = torch.linspace(0, 1, width)
    pixels[:SIDE, :SIDE, 2] = 1.0
    return pixels


def patches() -> torch.Tensor:
    """[patches, values] of `picture()` in the order of Qwen's processors, normalised to -1 ... 1, each frame twice."""
    cut = (picture() * 2 - 1).view(ROWS, 2, SIDE, COLUMNS, 2, SIDE, 3)  # [row, i, y, column, j, x, colour]
    cut = cut.permute(0, 3, 1, 4, 6, 2, 5)  # [row, column, i, j, colour, y, x]
    return cut.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(ROWS * COLUMNS * 4, -1)


def shown(row: int = 3, first: int = 0, count: int = ROWS * COLUMNS, key: int = KEY) -> Shown:
    return Shown(key, row, first, count, ROWS * COLUMNS, (1, ROWS * 2, COLUMNS * 2), patches())


def record(
    folder: Path,
    passes: int = 3,
    tokens: tuple[int, ...] = (40, 30),
    parts: list[list[Shown]] | None = None,
    run: str = RUN,
    replica: int = 0,
    stages: int = 1,
    **options,
) -> list[list[list[PlanResult]]]:
    """Writes a trace of `passes` forward passes; returns the plans, [pass][layer][rank].

    Rank 0 has a picture, `parts[pass]` (by default whole, from row 3 on, in the first pass); every rank `tokens` rows.
    stages: the last layer is recorded by the second of two.
    """
    settings = config(folder, **options)
    recorders = [
        [Recorder(settings, Place(rank, stage, replica, stages), run) for rank in range(RANKS)]
        for stage in range(stages)
    ]
    plan = Plan(settings, EXPERTS, RANKS)
    parts = [[shown()] if i == 0 else [] for i in range(passes)] if parts is None else parts
    return [_pass(i + 1000 * replica, plan, recorders, tokens, parts[i]) for i in range(passes)]


def _pass(number: int, plan: Plan, recorders: list[list[Recorder]], tokens: tuple[int, ...], parts: list[Shown]):
    results = []
    with ExitStack() as passes:
        for stage in recorders:
            for rank, recorder in enumerate(stage):
                passes.enter_context(recorder.forward_pass(parts if rank == 0 else [], 0))
        for layer in LAYERS:
            batches = [
                batch(count, 100 * number + 10 * layer + rank, parts if rank == 0 else [])
                for rank, count in enumerate(tokens)
            ]
            group_sum = _replace_by(sum(_histogram(plan, batch) for batch in batches))
            plans = [plan(RoutedTokens(**batch), group_sum) for batch in batches]
            stage = recorders[-1] if layer == LAYERS[-1] else recorders[0]
            for recorder, one, result in zip(stage, batches, plans, strict=True):
                recorder.add(layer, RANKS, one["topk_ids"], one["topk_weights"], result)
            results.append(plans)
    return results


def rank_file(folder: Path, rank: int, run: str = RUN) -> Path:
    return folder / file_name(run, 0, 0, rank)


def _replace_by(group: torch.Tensor):
    """An all-reduce whose sum is known."""
    return lambda tensor: tensor.copy_(group)


def _histogram(plan: Plan, batch: dict) -> torch.Tensor:
    weight = plan.weight(batch["hidden_states"], batch["segment"], batch["num_segments"])
    return plan.histogram(batch["topk_ids"], batch["topk_weights"], weight, batch["segment"])


def batch(count: int, seed: int, parts: list[Shown]) -> dict:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, EXPERTS, generator=g) + torch.linspace(0.5, 0, EXPERTS)
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    segment = torch.full((count,), -1, dtype=torch.int32)
    for part in parts:
        segment[part.row : part.row + part.count] = 0
    hidden = torch.randn(count, 64, generator=g) * (1 + torch.rand(count, 1, generator=g))
    return {
        "hidden_states": hidden,
        "topk_ids": ids,
        "topk_weights": weights,
        "router_logits": logits,
        "segment": segment,
        "num_segments": 1,
    }
