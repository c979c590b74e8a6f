"""--macs-cache exact: whose tokens were clipped is known on all ranks that share a batch, and kept out of the cache."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import prefix_cache, worker
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch, clipped
from sglang_macs.plan.clipped import Clipped
from sglang_macs.plan.plan import Plan
from tests.support.ranks import run_ranks


def noted(*layers: tuple[list[int], int | None]) -> Clipped:
    """Of layers, each with what its tokens are sent to (they were routed to expert 0), and of which half."""
    made = Clipped()
    for sent, half in layers:
        ids = torch.tensor(sent).view(-1, 1)
        made.add(half, torch.zeros_like(ids), ids)
    return made


def alone(made: Clipped, tokens: int, halves=()) -> list[bool] | None:
    found = made.of_tokens(tokens, halves, (0, 1), None)
    return None if found is None else found.tolist()


def test_a_token_that_lost_an_assignment_in_any_layer_is_known():
    assert alone(noted(([0, 1, 0, 0], None), ([0, 0, 0, -1], None)), 3) == [False, True, False]  # padded by one
    assert alone(noted(), 3) is None
    halves = ((0, 2), (2, 5))
    assert alone(noted(([0, 1], 0), ([2, 0, 0, 0], 1), ([0, 0], 0)), 5, halves) == [False, True, True, False, False]


def test_where_rows_are_not_the_batch_s_everything_counts_as_clipped():
    assert alone(noted(([0, 0], None)), 3) == [True] * 3


def test_requests_are_those_of_their_tokens():
    assert clipped.requests([2, 1, 3], torch.tensor([0, 0, 1, 0, 0, 1, 1]).bool()) == [False, True, True]
    assert clipped.requests([], torch.zeros(0).bool()) == []


def _shared(rank: int, world: int) -> list[list[bool] | None]:
    mine = ([0, 0, 1], [0, 0, 0])[rank]  # six rows of five tokens: rank 1 clips nothing
    return [
        noted((mine, None)).of_tokens(5, (), (rank, world), dist.all_reduce).tolist(),
        noted().of_tokens(5, (), (rank, world), dist.all_reduce),
    ]


def test_ranks_that_share_a_batch_know_alike():
    assert run_ranks(2, _shared) == [[[False, False, True, False, False], None]] * 2


@pytest.mark.parametrize("cache", ["exact", "clipped"])
def test_a_planned_pass_notes_what_its_layers_have_clipped(cache):
    config = MacsConfig.from_preset("rank", gamma=1.0, cache=cache, act="always").on("cpu")
    process = worker.Worker(config)
    now = process.decide(batch.Batch(None, 0, "", 16))
    assert process.decide(batch.Batch(None, 0, "off", 16)).clipped is None
    one = LayerPlanner(0, Plan(config, 4, 2), None, Stats())
    one.all_reduce = lambda tensor: None
    ids = torch.tensor([[0], [1], [0], [2]], dtype=torch.int32)  # bounds of two: a row of rank 0 goes
    with batch.forward(now):
        sent = one(torch.randn(4, 8), ids, torch.tensor([[0.9], [0.8], [0.1], [0.9]]), None).topk_ids
    assert sent.tolist() == [[0], [1], [-1], [2]]
    assert (now.clipped is None) == (cache == "clipped")
    assert cache == "clipped" or alone(now.clipped, 4) == [False, False, True, False]


def test_a_clipped_request_stays_out_of_the_cache(monkeypatch):
    process = worker.Worker(MacsConfig.from_preset("rank", cache="exact").on("cpu"))
    monkeypatch.setattr(worker, "_current", process)
    reqs = [SimpleNamespace(skip_radix_cache_insert=False) for _ in range(2)]
    output = SimpleNamespace(
        macs_clipped=prefix_cache._Pass(reqs, [2, 2], torch.tensor([False, False, True, False]), None)
    )
    for _ in range(2):  # of a second chunk
        prefix_cache.settle(SimpleNamespace(logits_output=output))
    assert [req.skip_radix_cache_insert for req in reqs] == [False, True] and process.stats.uncached == 1
    prefix_cache.settle(SimpleNamespace(logits_output=None))


@pytest.mark.parametrize("cache", ["exact", "clipped"])
def test_a_chunk_is_not_inserted_before_it_is_known(monkeypatch, cache):
    process = worker.Worker(MacsConfig.from_preset("rank", cache=cache).on("cpu"))
    monkeypatch.setattr(worker, "_current", process)
    pool = SimpleNamespace(req_to_token=torch.arange(20, dtype=torch.int32).view(2, 10))
    req = SimpleNamespace(
        skip_radix_cache_insert=False,
        prefix_indices=torch.zeros(0),
        kv=SimpleNamespace(req_pool_idx=1),
        extend_range=SimpleNamespace(end=3),
    )
    seen = []
    prefix_cache._stash_chunked_request(
        lambda _, req: seen.append(req.skip_radix_cache_insert), SimpleNamespace(req_to_token_pool=pool), req
    )
    assert seen == [cache == "exact"] and not req.skip_radix_cache_insert
    assert req.prefix_indices.tolist() == ([10, 11, 12] if cache == "exact" else [])
