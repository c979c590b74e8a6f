"""`--macs-importance MODULE:FUNCTION`: its scores decide, bounds hold whatever it returns, and faults are named."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from reference import cases
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.fused import Sizes, unsupported
from sglang_macs.errors import MacsError
from sglang_macs.plan import importance
from sglang_macs.plan.plan import Plan, PlanResult
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.plans import configs, same_bits
from tests.support.ranks import run_ranks

NUMBERS = itertools.count()
PAGE = Path(__file__).resolve().parent.parent / "docs" / "guide" / "importance.md"


def by_gate(tokens: RoutedTokens) -> torch.Tensor:
    return tokens.topk_weights


def by_place(tokens: RoutedTokens) -> torch.Tensor:
    """[T]: what comes first is kept."""
    return 1 / (1 + torch.arange(len(tokens.topk_ids)))


def group_plans(group: cases.Group, config: MacsConfig, own: importance.Importance | None) -> list[PlanResult]:
    plan = Plan(config, group.num_experts, group.num_ranks, group.modality, group.routing, own_importance=own)
    alone = [plan(b.routed).own for b in group.batches]
    total = torch.stack(alone).sum(0, dtype=torch.int32)
    return [plan(b.routed, lambda histogram: histogram.copy_(total)) for b in group.batches]


def assert_equal(got: PlanResult, want: PlanResult, routed: RoutedTokens) -> None:
    for name in ("topk_ids", "own", "group", "cut", "counts"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    stayed = (got.topk_ids == routed.topk_ids) | (got.topk_ids < 0)
    assert same_bits(got.topk_weights[stayed], want.topk_weights[stayed])
    torch.testing.assert_close(got.topk_weights, want.topk_weights, rtol=1e-5, atol=0)


@cases.PROPERTY
@given(cases.groups(), configs(importance="gate"))
def test_the_gate_as_a_function_decides_as_the_gate(group: cases.Group, config: MacsConfig) -> None:
    want, got = group_plans(group, config, None), group_plans(group, config, by_gate)
    for b, mine, theirs in zip(group.batches, got, want, strict=True):
        assert_equal(mine, theirs, b.routed)


@cases.PROPERTY
@given(cases.groups(), configs(importance="entropy_gate", load="effective"))
def test_a_product_as_a_function_decides_as_the_product(group: cases.Group, config: MacsConfig) -> None:
    """The entropy weight stays what load and the visual share are made of."""
    plan = Plan(config, group.num_experts, group.num_ranks, group.modality, group.routing)

    def product(tokens: RoutedTokens) -> torch.Tensor:
        return plan.weight(tokens.hidden_states, tokens.segment, tokens.num_segments)[:, None] * tokens.topk_weights

    want, got = group_plans(group, config, None), group_plans(group, config, product)
    for b, mine, theirs in zip(group.batches, got, want, strict=True):
        assert_equal(mine, theirs, b.routed)


def test_what_is_scored_highest_is_kept() -> None:
    b = cases.named("imbalanced").batches[0]
    text = b.routed._replace(segment=torch.full_like(b.segment, -1), num_segments=0)
    config = MacsConfig.from_preset("rank", scope="expert", gamma=0.5, rho=0.0, reroute="none", min_tokens=0)
    result = Plan(config, 16, 4, own_importance=by_place)(text)
    for expert in range(16):
        token, _ = torch.where(text.topk_ids == expert)
        kept, _ = torch.where(result.topk_ids == expert)
        score = by_place(text)
        gone = token[~torch.isin(token, kept)]
        if len(kept) and len(gone):
            octave = torch.tensor(2.0**-3)  # of 8 buckets
            assert score[kept].min() >= score[gone].max() * (1 - octave)
    assert (result.topk_ids < 0).sum() > 0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30])
def test_bounds_hold_at_any_score(odd: float) -> None:
    group = cases.named("imbalanced")
    config = MacsConfig.from_preset("rank", gamma=1.0, min_tokens=0)
    results = group_plans(group, config, lambda tokens: torch.full_like(tokens.topk_weights, odd))
    bound = int(results[0].cut[0, 3])
    ids = torch.cat([r.topk_ids for r in results])
    rows = torch.bincount(ids[ids >= 0] // (group.num_experts // group.num_ranks), minlength=group.num_ranks)
    assert int(rows.max()) <= bound


def _plan_alone(rank: int, world: int) -> tuple[list[int], int, int]:
    """Unequal ranks, each with its own function; the last one has no tokens, and may not be asked."""
    group = cases.named("imbalanced")
    b = group.batches[0].routed
    tokens = 0 if rank == world - 1 else len(b.topk_ids) - 7 * rank
    parts = RoutedTokens(*(x[:tokens] for x in b[:5]), b.num_segments)
    functions: list[Callable] = [by_gate, by_place, lambda given: torch.full_like(given.topk_weights, math.nan), None]
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0), 16, 4, own_importance=functions[rank] or pytest.fail)
    result = plan(parts, dist.all_reduce)
    kept = result.topk_ids[result.topk_ids >= 0]
    rows = torch.bincount(kept // 4, minlength=4)
    dist.all_reduce(rows)
    return rows.tolist(), int(result.cut[0, 3]), int(result.counts[1].sum())


def test_unequal_ranks_with_unequal_functions_keep_the_bound() -> None:
    found = run_ranks(4, _plan_alone)
    assert len({(tuple(rows), bound) for rows, bound, _ in found}) == 1, "all ranks see one group"
    rows, bound, _ = found[0]
    assert max(rows) <= bound and sum(clipped for _, _, clipped in found) > 0


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda t: None, "got NoneType"),
        (lambda t: t.topk_weights[:-1], "got torch.float32 [39, 4] on cpu"),
        (lambda t: t.topk_weights[:, 1:], "got torch.float32 [40, 3] on cpu"),
        (lambda t: t.topk_ids, "got torch.int64 [40, 4] on cpu"),
        (lambda t: t.topk_weights.to("meta"), "on meta"),
    ],
)
def test_scores_of_another_form_are_refused_in_one_line(returned: Callable, got: str) -> None:
    b = cases.named("imbalanced").batches[0]
    plan = Plan(MacsConfig.from_preset("rank"), 16, 4, own_importance=returned)
    with pytest.raises(MacsError, match=r"^--macs-importance: got") as error:
        plan(b.routed)
    assert got in str(error.value) and "expected floating-point numbers [40, 4] or [40] on cpu" in str(error.value)


def test_logits_that_nothing_is_re_routed_by_are_not_read() -> None:
    """They are of logical experts where ids may be physical."""
    routed = cases.named("imbalanced").batches[0].routed
    plan = Plan(MacsConfig.from_preset("rank", gamma=0.8, reroute="none"), 16, 4, own_importance=by_gate)
    result = plan(routed._replace(router_logits=routed.router_logits[:, :2]))
    assert same_bits(result.topk_weights, routed.topk_weights.masked_fill(result.topk_ids < 0, 0.0))
    assert (result.topk_ids < 0).any()


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Writes a module of its own name, and returns that."""

    def write(text: str) -> str:
        name = f"own_importance_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_the_configuration_finds_the_function_by_its_name(module) -> None:
    name = module("def score(tokens):\n    return tokens.topk_weights[:, 0]\n")
    config = MacsConfig.from_preset("rank", gamma=0.7, importance=f"{name}:score")
    assert config.has_own_importance and not config.needs_entropy(has_profile=False)
    assert MacsConfig.from_json(config.to_json()) == config
    group = cases.named("imbalanced")
    want = group_plans(group, replace(config, importance="gate"), lambda tokens: tokens.topk_weights[:, 0])
    for b, mine, theirs in zip(group.batches, group_plans(group, config, None), want, strict=True):
        assert_equal(mine, theirs, b.routed)


@pytest.mark.parametrize("text", ["gates", "a:", ":b", "a:b:c", "a.:b", "a b:c", "a:b()", "1:2"])
def test_a_name_that_can_be_none_is_refused(text: str) -> None:
    with pytest.raises(MacsError, match=r"--macs-importance: got .* expected one of entropy, gate, entropy_gate"):
        MacsConfig.from_preset("rank", importance=text)


def test_a_function_that_is_not_there_is_refused_in_one_line(module) -> None:
    broken, empty = module("raise OSError('no GPU here')\n"), module("score = 3\n")
    for name, words in (
        ("nowhere_at_all:score", "got no module nowhere_at_all"),
        ("nowhere.at.all:score", "got no module nowhere.at.all"),
        (f"{broken}:score", rf"got OSError \(no GPU here\) on importing {broken}"),
        (f"{empty}:score", f"got no function score in {empty}"),
        (f"{empty}:other", f"got no function other in {empty}"),
    ):
        with pytest.raises(MacsError, match=rf"^--macs-importance: {words}") as error:
            importance.load(name)
        assert "\n" not in str(error.value)
    importance.check(f"{broken}:score")  # a launcher looks for the module and does not run it


def test_the_fused_dispatch_leaves_it_to_others() -> None:
    sizes = Sizes(num_ranks=2, num_experts=16, top_k=4, max_tokens=64, hidden_size=2048)
    for name, refused in (("entropy_gate", False), ("own:score", True)):
        config = MacsConfig.from_preset("rank", importance=name)
        assert ("--macs-importance own:score" in unsupported(config, sizes)) == refused


def example() -> str:
    """The module on the page."""
    (block,) = re.findall(r"(?:^ {4}.*\n|^\n)+", PAGE.read_text(encoding="utf-8").split("`own.py`", 1)[1], re.M)[:1]
    return textwrap.dedent(block)


@cases.PROPERTY
@given(st.integers(0, 2**16))
def test_the_example_on_the_page_scores_every_assignment(seed: int) -> None:
    scope: dict = {}
    exec(example(), scope)
    b = cases.batch(cases.generator(seed), **cases.NAMED["imbalanced"])
    scores = importance.scores(scope["by_change"], b.routed)
    assert scores.shape == b.topk_ids.shape and scores.isfinite().all()
