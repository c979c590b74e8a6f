"""Requests that ask to be left alone: every rank knows of them, nothing of theirs moves, what they cost is counted."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.cpu import MacsDispatcher
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import exempt, set_state, worker
from sglang_macs.observe.stats import Stats, rows_of
from sglang_macs.plan import batch, importance
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.ranks import run_ranks

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
    """Of each trial: what the tenant's tokens got, alone and beside others; rows that came, and those of the tenant."""
    config, counters = MacsConfig.from_preset(gamma=1.0, verify=True, **options), Stats()
    dispatcher = MacsDispatcher(LayerPlanner(0, Plan(config, EXPERTS, world), dist.group.WORLD, counters))
    own = a_tenant(rank) if rank in tenants else tuple(part[:0] for part in a_tenant(rank))
    count, found = len(own[0]), {"alone": [], "beside": [], "rows": []}

    def serve(tokens: tuple[torch.Tensor, ...], skip: str = "") -> tuple[torch.Tensor, int]:
        segment = torch.where(torch.arange(len(tokens[0])) % 4 < 3, 0, -1).int()
        segment[:count] = batch.LEFT_ALONE
        with batch.forward(batch.Batch(segment, 1, skip, leaves_alone=True, makes_room=True, measured=True)):
            rows, local = dispatcher.dispatch(*tokens)
        out = dispatcher.combine(rows * (local + 1 + rank * EXPERTS // world).unsqueeze(1))
        return out[:count], len(rows)

    for trial in range(trials):
        together = tuple(torch.cat(pair) for pair in zip(own, others(rank, trial), strict=True))
        alone, of_tenant = serve(own, "off")
        beside, came = serve(together)
        found["alone"].append(alone)
        found["beside"].append(beside)
        found["rows"].append((len(together[0]) * TOP_K, came, of_tenant))
    return found | {"stats": counters.snapshot()}


def test_no_load_of_others_moves_an_exempt_request_and_others_make_room_for_it():
    """40 trials; one rank has neither the tenant nor others, one the tenant alone."""
    by_rank = run_ranks(RANKS, _trials, 40, (0, 1, 3))
    for options, of_preset in zip(PRESETS, zip(*by_rank, strict=True), strict=True):
        for found in of_preset:
            assert all(map(torch.equal, found["alone"], found["beside"]))
            assert found["stats"]["checks"]["bound"] == 40 and not any(found["stats"]["violations"].values())
        assert sum(found["stats"]["own"]["clipped_visual"] for found in of_preset) > 0, "others are clipped"
        if options == {"preset": "rank"}:
            rows = torch.tensor([found["rows"] for found in of_preset])  # [ranks, trials, 3]
            bound = rows[..., 0].sum(dim=0) // RANKS
            assert (rows[..., 1] <= torch.maximum(bound, rows[..., 2])).all()
            assert (rows[..., 1] == bound).any() and (rows[..., 2] < bound).all()


@pytest.mark.parametrize("exchange", ["group", "local"])
@pytest.mark.parametrize("preset", ["rank", "paper", "cai"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_what_exempt_rows_take_the_others_give_up(preset, exchange, share):
    """On one rank's plan: the bound holds for all rows, or none of the others is left on it."""
    g = torch.Generator().manual_seed(3)
    config = MacsConfig.from_preset(preset, gamma=0.9, exchange=exchange)
    lean = 2 * torch.randn(EXPERTS, generator=g)
    hidden, logits = torch.randn(64, HIDDEN, generator=g), torch.randn(64, EXPERTS, generator=g) + lean
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    taken = torch.rand(64, generator=g) < share
    segment = torch.where(torch.arange(64) % 4 < 3, 0, -1).int().masked_fill(taken, batch.TEXT)
    result = Plan(config, EXPERTS, RANKS)(RoutedTokens(hidden, ids, weights, logits, segment, 1), None, taken)
    assert (result.topk_ids[taken] == -1).all() and (result.topk_ids != ids)[~taken].any() == (share < 1)
    unit = torch.ones(64) if config.load == "rows" else (result.weight * 256).round().clamp(min=1)
    unit = unit.long().unsqueeze(1).expand(ids.shape)
    others, exempt_units = (
        rows_of(kept, EXPERTS, unit).view(len(result.cut), -1).sum(dim=1)
        for kept in (result.topk_ids, ids.masked_fill(~taken.unsqueeze(1), -1))
    )
    bound = result.cut[:, 3]
    assert ((others + exempt_units <= bound) | (others == 0)).all()
    assert share < 1 or (exempt_units > bound).any()


def test_it_is_counted_when_exempt_rows_alone_are_over_a_bound(process):
    config, counters = MacsConfig.from_preset("rank", gamma=1.0, verify=True), Stats()
    one = LayerPlanner(0, Plan(config, 4, 2), None, counters)
    one.all_reduce = lambda tensor: None
    ids = torch.tensor([[0], [1], [2], [3], [0], [1]], dtype=torch.int32)
    weights, hidden = torch.rand(6, 1) / 2, torch.randn(6, 8)

    def serve(*exempt_rows: int) -> list[int]:
        segment = torch.full((6,), batch.TEXT, dtype=torch.int32)
        segment[list(exempt_rows)] = batch.LEFT_ALONE
        with batch.forward(batch.Batch(segment, 1, "", leaves_alone=True, makes_room=True, measured=True)):
            planned = one(hidden, ids, weights, None)
            one.measure(ids, planned)
        return planned.topk_ids.flatten().tolist()

    assert sum(i in (0, 1) for i in serve(0, 1)) == 3  # bounds of three: two exempt, one of the two others
    assert sum(i in (0, 1) for i in serve(0, 1, 4)) == 3
    assert sum(i in (0, 1) for i in serve(0, 1, 4, 5)) == 4  # all that rank 0 has
    layer = counters.snapshot()["layers"]["0"]
    assert (layer["exceeded"], layer["dispatches"]) == (1, 3)
    assert counters.snapshot()["checks"]["bound"] == 3 and not any(counters.snapshot()["violations"].values())


def test_tokens_of_exempt_requests_are_counted(process):
    ranks = batch.RankBatches((100, 100), (True, True), (False, False), (True, False))
    for tokens, skip in ((7, ""), (0, ""), (9, "off")):
        process.decide(batch.Batch(None, 0, skip, ranks.group_tokens, exempt_tokens=tokens))
    assert process.state()["exempt_tokens"] == 7


@pytest.mark.parametrize("buckets", [32, 64, 128, 256])
def test_nobody_else_is_in_the_highest_bucket(buckets):
    greatest = importance.below_highest(buckets)
    above = float(torch.nextafter(torch.tensor(greatest), torch.tensor(2.0)))
    weights = torch.tensor([[greatest, above, 1e9, torch.inf]])
    plan = Plan(MacsConfig.from_preset("rank", buckets=buckets), 4, 1)
    ids, segment = torch.arange(4, dtype=torch.int32).view(1, 4), torch.zeros(1, dtype=torch.int32)
    cells = plan.histogram(ids, weights, torch.ones(1), segment)[: plan.cells - 4].view(4, 2, buckets)
    assert cells[:, 0].argmax(dim=1).tolist() == [buckets - 2, buckets - 1, buckets - 1, buckets - 1]


def test_text_gives_no_more_than_exempt_rows_take_where_all_text_is_as_important():
    """Preset paper: text weighs 1, whatever its gate."""
    config = MacsConfig.from_preset("paper", gamma=1.0, reroute="none")
    ids = torch.tensor([[0]] * 6 + [[1]] * 2, dtype=torch.int32)  # bounds of four
    taken, segment = torch.arange(8) == 0, torch.full((8,), batch.TEXT, dtype=torch.int32)
    tokens = RoutedTokens(torch.randn(8, HIDDEN), ids, torch.full((8, 1), 0.5), None, segment, 0)
    sent = Plan(config, 2, 1)(tokens, None, taken).topk_ids.flatten().tolist()
    assert sent == [-1, 0, 0, 0, -1, -1, 1, 1]
