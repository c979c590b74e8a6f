"""What the generators promise is what comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import cases


@pytest.mark.parametrize("imbalance", [1.0, 1.25, 2.0, 4.0])
def test_rank_imbalance_is_the_chosen_one(imbalance: float) -> None:
    b = cases.batch(
        cases.generator(0), num_tokens=320, num_experts=32, top_k=4, num_ranks=8, imbalance=imbalance, visual_share=0.3
    )
    rows = torch.bincount(b.topk_ids.flatten(), minlength=32).view(8, 4).sum(1)
    assert rows.sum() == 320 * 4
    assert rows[0] / rows.float().mean() == pytest.approx(imbalance)
    assert rows[1:].max() - rows[1:].min() <= 4
    assert (b.segment >= 0).sum() == 96


@cases.PROPERTY
@given(cases.groups())
def test_batches_are_valid(group: cases.Group) -> None:
    for b in group.batches:
        for ids, weights in zip(b.topk_ids.tolist(), b.topk_weights.tolist(), strict=True):
            chosen = [i for i in ids if i >= 0]
            assert len(chosen) == len(set(chosen))
            assert all(i < group.num_experts for i in chosen)
            assert all((w > 0) == (i >= 0) for i, w in zip(ids, weights, strict=True))
        assert set(b.segment.tolist()) <= {-1, *range(b.num_segments)}


@cases.PROPERTY
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any))
def test_assign_deals_the_exact_rows(rows: list[int]) -> None:
    rows = [*rows, -sum(rows) % 12]  # whole tokens
    ids = cases.assign(rows, 12, cases.generator(1))
    assert torch.bincount(ids.flatten(), minlength=len(rows)).tolist() == rows
    assert all(len(set(token)) == len(token) for token in ids.tolist())


def test_empty_share_and_ties() -> None:
    b = cases.batch(cases.generator(2), num_tokens=50, num_experts=8, top_k=4, empty_share=0.25, ties=True)
    assert (b.topk_ids < 0).sum() == 50
    assert b.hidden_states.unique().numel() == 1
    assert b.router_logits.unique().numel() == 1


def test_concat_keeps_segments_apart() -> None:
    parts = [cases.batch(cases.generator(s), num_tokens=12, num_experts=4, top_k=2) for s in (0, 1)]
    joined = cases.concat(parts)
    assert joined.num_segments == 4
    assert set(joined.segment.tolist()) == {-1, 0, 1, 2, 3}
    assert torch.equal(joined.topk_ids, torch.cat([p.topk_ids for p in parts]))
