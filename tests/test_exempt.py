"""Requests that ask to be left alone: every rank knows of them, nothing of theirs moves, what they cost is counted."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.cpu import MacsDispatcher
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import exempt, set_state, worker
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan

EXPERTS, TOP_K, HIDDEN, RANKS = 12, 3, 16, 4


@pytest.fixture
def process(monkeypatch):
    made = worker.Worker(MacsConfig.from_preset("rank").on("cpu"))
    monkeypatch.setattr(worker, "_current", made)
    monkeypatch.setattr(exempt, "_here", False)
    return made


def request(custom: object = None, extra_key: str | None = None) -> SimpleNamespace:
    """One of SGLang's requests, as its constructor has left it."""
    made = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom), extra_key=extra_key)
    exempt._req_init(None, made)
    return made


OFF = {"macs": "off", "__req__": None}


@pytest.mark.parametrize(
    ("custom", "granted"),
    [(OFF, True), (None, False), ({}, False), ({"macs": "on"}, False), ({"macs": None}, False), ("off", False)],
)
def test_a_request_is_exempt_if_it_says_so(process, custom, granted):
    assert request(custom).macs_exempt is granted


def test_an_unknown_value_is_told_of(process, monkeypatch):
    said = []
    monkeypatch.setattr(exempt, "say_once", said.append)
    assert not request({"macs": False}).macs_exempt and len(said) == 1


def test_nobody_is_exempt_where_the_launch_says_so(process):
    process.config = MacsConfig.from_preset("rank", exempt=False)
    assert not request(OFF).macs_exempt and request(OFF).extra_key is None


def test_exempt_requests_share_prefixes_with_each_other_alone(process):
    keys = [request(custom, key).extra_key for custom in (OFF, None) for key in (None, "a", "macs-off/", "macs-off/a")]
    assert len(set(keys)) == len(keys)
    assert request(OFF, "a").extra_key == request(OFF, "a").extra_key and request(None, "a").extra_key == "a"


def a_batch(mode: str, exempts: list[bool], lengths: list[int]) -> tuple[SimpleNamespace, SimpleNamespace]:
    kind = {"is_extend": lambda: mode != "DECODE", "is_target_verify": lambda: mode == "TARGET_VERIFY"}
    reqs = [SimpleNamespace(macs_exempt=one) for one in exempts]
    spec = SimpleNamespace(draft_token_num=4)
    return (
        SimpleNamespace(reqs=reqs, extend_lens=lengths),
        SimpleNamespace(forward_mode=SimpleNamespace(**kind), spec_info=spec),
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("EXTEND", ((0, 5), (8, 9))), ("DECODE", ((0, 1), (2, 3))), ("TARGET_VERIFY", ((0, 4), (8, 12)))],
)
def test_where_the_tokens_of_exempt_requests_lie(mode, expected):
    assert exempt.spans_of(*a_batch(mode, [True, False, True], [5, 3, 1])) == expected
    assert exempt.spans_of(*a_batch(mode, [False] * 3, [5, 3, 1])) == ()


def test_every_rank_is_told_who_has_exempt_requests(process):
    told = []
    for reqs in ([True, False], [False], None):
        local = None if reqs is None else SimpleNamespace(reqs=[SimpleNamespace(macs_exempt=one) for one in reqs])
        fields = exempt._prepare_sync(lambda *_: set_state._local_tensor(lambda _: torch.zeros(9), None), local)
        told.append(fields)
    told.append(set_state._fallback_tensor(lambda _: torch.zeros(9), None))
    told = torch.stack(told).long()
    assert set_state.exempts_of(told) == [True, False, False, False] and set_state.received_by_all(told) == 0


# ---- Between ranks -----------------------------------------------------------------------------------------------


def a_tenant(rank: int) -> tuple[torch.Tensor, ...]:
    """The same 8 tokens on a rank in every trial."""
    g = torch.Generator().manual_seed(1000 + rank)
    hidden, logits = torch.randn(8, HIDDEN, generator=g), torch.randn(8, EXPERTS, generator=g)
    return hidden, *reversed(torch.softmax(logits, -1).topk(TOP_K)), logits


def others(rank: int, trial: int) -> tuple[torch.Tensor, ...]:
    """Load that leans on other experts in every trial, and of another size on every rank: none on rank 1."""
    g = torch.Generator().manual_seed(trial * 31 + rank)
    count = 0 if rank == 1 else int(torch.randint(20, 90, (1,), generator=g))
    lean = 3 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(trial))
    hidden, logits = torch.randn(count, HIDDEN, generator=g), torch.randn(count, EXPERTS, generator=g) + lean
    return hidden, *reversed(torch.softmax(logits, -1).topk(TOP_K)), logits


PRESETS = ({"preset": "rank"}, {"preset": "paper"}, {"preset": "cai"}, {"preset": "rank", "exchange": "local"})


def _trials(rank: int, world: int, trials: int, tenants: tuple[int, ...]) -> list[dict]:
    return [_of_preset(rank, world, options, trials, tenants) for options in PRESETS]


def _of_preset(rank: int, world: int, options: dict, trials: int, tenants: tuple[int, ...]) -> dict:
    """Of each trial: what the tenant's tokens got, alone and beside others."""
    config, counters = MacsConfig.from_preset(gamma=1.0, verify=True, **options), Stats()
    dispatcher = MacsDispatcher(LayerPlanner(0, Plan(config, EXPERTS, world), dist.group.WORLD, counters))
    own = a_tenant(rank) if rank in tenants else tuple(part[:0] for part in a_tenant(rank))
    count, found = len(own[0]), {"alone": [], "beside": []}

    def serve(tokens: tuple[torch.Tensor, ...], skip: str = "") -> torch.Tensor:
        segment = torch.where(torch.arange(len(tokens[0])) % 4 < 3, 0, -1).int()
        segment[:count] = batch.LEFT_ALONE
        with batch.forward(batch.Batch(segment, 1, skip, leaves_alone=True, measured=True)):
            rows, local = dispatcher.dispatch(*tokens)
        return dispatcher.combine(rows * (local + 1 + rank * EXPERTS // world).unsqueeze(1))

    for trial in range(trials):
        together = tuple(torch.cat(pair) for pair in zip(own, others(rank, trial), strict=True))
        found["alone"].append(serve(own, "off")[:count])
        found["beside"].append(serve(together)[:count])
    return found | {"stats": counters.snapshot()}


def test_no_load_of_others_moves_an_exempt_request_and_others_keep_their_bounds():
    """40 trials; one rank has neither the tenant nor others, one the tenant alone."""
    by_rank = run_ranks(RANKS, _trials, 40, (0, 1, 3))
    for of_preset in zip(*by_rank, strict=True):
        for found in of_preset:
            assert all(map(torch.equal, found["alone"], found["beside"]))
            assert found["stats"]["checks"]["bound"] == 40 and not any(found["stats"]["violations"].values())
        assert sum(found["stats"]["own"]["clipped_visual"] for found in of_preset) > 0, "others are clipped"


def test_it_is_counted_when_exempt_rows_take_a_rank_over_the_bound_of_all(process):
    config, counters = MacsConfig.from_preset("rank", gamma=1.0, verify=True), Stats()
    one = LayerPlanner(0, Plan(config, 4, 2), None, counters)
    one.all_reduce = lambda tensor: None
    ids = torch.tensor([[0], [1], [2], [3], [0], [1]], dtype=torch.int32)
    weights, hidden = torch.ones(6, 1), torch.randn(6, 8)

    def serve(exempt_rows: slice) -> None:
        segment = torch.full((6,), batch.TEXT, dtype=torch.int32)
        segment[exempt_rows] = batch.LEFT_ALONE
        with batch.forward(batch.Batch(segment, 1, "", leaves_alone=True, measured=True)):
            one.measure(ids, one(hidden, ids, weights, None))

    serve(slice(4, 6))  # four rows on two ranks, and two exempt ones, both on rank 0: 4 of 6
    serve(slice(0, 4))  # four exempt ones, even; of the two others, both on rank 0, one is clipped
    layer = counters.snapshot()["layers"]["0"]
    assert (layer["exceeded"], layer["dispatches"]) == (1, 2)
    assert not any(counters.snapshot()["violations"].values())


def test_tokens_of_exempt_requests_are_counted(process):
    ranks = batch.RankBatches((100, 100), (True, True), (False, False), (True, False))
    for tokens, skip in ((7, ""), (0, ""), (9, "off")):
        process.decide(batch.Batch(None, 0, skip, ranks.group_tokens, exempt_tokens=tokens))
    assert process.state()["exempt_tokens"] == 7
