"""The bounded dispatch: its permutation against plain torch, its sizes, and DeepEP's normal mode with it."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reference import bounded_case
from reference.bounded_case import CASES, Case
from sglang_macs import ops
from sglang_macs.choices import NUM_SUMS
from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch import bounded
from sglang_macs.dispatch.bounded import TILE, Room, Sizes, room, spare_bytes
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep_bounded
from sglang_macs.engine.worker import Worker
from sglang_macs.errors import MacsError
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch

ROOT = Path(__file__).resolve().parent.parent
SIZES = Sizes(num_ranks=8, num_experts=128, top_k=8, hidden_size=2048)


# ---- The operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_rows_lie_by_expert_in_the_order_of_tokens(case: Case, format: str) -> None:
    for seed in range(3):
        bounded_case.check_permute(ops.bounded_permute, case, format, seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_come_back_weighted_and_summed(case: Case) -> None:
    for seed in range(3):
        bounded_case.check_gather(ops.bounded_gather, case, seed)


def test_what_has_no_row_is_counted_and_nothing_is_written_for_it() -> None:
    """A full buffer, an expert that does not exist, and a token that names one twice."""
    bounded_case.check_lost(ops.bounded_permute)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"topk_ids": torch.zeros(4, 2, dtype=torch.int32)}, "topk_ids: got dtype"),
        ({"tokens": torch.zeros(3, 64, dtype=torch.bfloat16)}, "tokens: got shape"),
        ({"rows": torch.zeros(256, 4, dtype=torch.bfloat16)}, "tokens: got shape"),
        ({"scales": torch.zeros(4, 1)}, "row_scales: expected with scales"),
        ({"num_experts": 2000}, "expert_end: got shape"),
        ({"workspace": torch.zeros(1, dtype=torch.int32)}, "workspace: got shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_refused(wrong: dict, message: str) -> None:
    arguments = bounded_case.arguments(Case(4, 2, 3, rows=256), "bf16", 0)
    with pytest.raises(ValueError, match=message):
        ops.bounded_permute(**(arguments | wrong))


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_rows_follow_the_bound() -> None:
    tokens, tiles = 65536, 16 * (TILE - 1)
    config = MacsConfig.from_preset("rank", gamma=1.05)
    assert room(config, SIZES, tokens, planned=True) == Room(tokens, (int(1.05 * tokens) + 1 + tiles) // TILE * TILE)
    worst = Room(tokens, (tokens * 8 + tiles) // TILE * TILE)
    assert room(config, SIZES, tokens, planned=False) == worst
    for preset in ({"preset": "rank", "gamma": math.inf}, {"preset": "paper"}, {"preset": "rank", "gamma": 9.0}):
        assert room(MacsConfig.from_preset(**preset), SIZES, tokens, planned=True) == worst


def test_a_rank_receives_no_more_tokens_than_rows() -> None:
    """On many ranks the bound is below the number of the group's tokens."""
    many = SIZES._replace(num_ranks=64)
    assert room(MacsConfig.from_preset("rank", gamma=1.0), many, 64 * 1024, planned=True).tokens == 8 * 1024 + 1


@pytest.mark.parametrize("scope", ["rank", "expert"])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 1.05, 4.0])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_no_plan_lets_more_rows_through(scope: str, gamma: float, tokens: int) -> None:
    """The thresholds' own bounds, of every rank or expert, against the room made for them."""
    sizes = Sizes(4, 16, 3, 128)
    config = MacsConfig.from_preset("rank" if scope == "rank" else "cai", gamma=gamma, scope=scope, c_min=3.0)
    own = torch.zeros(sizes.num_experts * 2 * config.buckets + NUM_SUMS, dtype=torch.int32)
    own[-4] = tokens * sizes.top_k  # N
    _, cut = bounded_case.plan(config, sizes).threshold(own, own)
    per_rank = cut[:, 3].long().view(sizes.num_ranks, -1).sum(dim=1).max()
    most = bounded.most_assignments(config, sizes, tokens, planned=True)
    assert min(int(per_rank), tokens * min(sizes.top_k, sizes.local)) <= most


def test_there_are_more_rows_than_experts() -> None:
    """By which the grouped GEMM tells ends of experts from experts of rows."""
    for local in (1, 127, 128, 129, 1024):
        sizes = Sizes(2, 2 * local, 1, 128)
        assert room(MacsConfig.from_preset("rank"), sizes, 1, planned=True).rows > local


# ---- Between DeepEP and the runner -----------------------------------------------------------------------------------


class Impl:
    """SGLang's normal-mode implementation: what it asks its buffer for."""

    use_fp8 = use_nvfp4 = use_mxfp4 = use_mxfp8 = False
    async_finish = True

    def __init__(self, domains: int = 1) -> None:
        self.domains, self.asked = domains, []

    def dispatch(self, x, *, topk_idx, num_worst_tokens=0):
        self.asked.append(num_worst_tokens)
        received = num_worst_tokens or len(x)
        return x.new_zeros(received, x.shape[1]), None, topk_idx.new_full((received, 2), -1), torch.zeros(received, 2)

    def _get_buffer(self):
        runtime = SimpleNamespace(get_num_rdma_ranks=lambda: self.domains)
        return SimpleNamespace(dispatch=self.dispatch, get_dispatch_layout=None, runtime=runtime, combine=None)

    def dispatch_b(self, x, ids):
        return (*self._get_buffer().dispatch(x, topk_idx=ids), [])


def dispatched(
    now: batch.Batch, monkeypatch, impl: Impl, attn_tp: int = 1, **options
) -> tuple[object, Stats, list[str]]:
    said, counters = [], Stats()
    config = MacsConfig.from_preset(**({"preset": "rank", "gamma": 1.0} | options))
    planner = LayerPlanner(0, bounded_case.plan(config, Sizes(2, 8, 2, 16)), None, counters, attn_tp=(0, attn_tp))
    shared = bounded.BoundedDispatch(config, said.append, stream=lambda: SimpleNamespace())
    sizes = Sizes(2, 8, 2, 16)
    bounded.BoundedNormal(impl, shared, planner, sizes, lambda output, received: received)
    with batch.forward(now):
        for _ in range(2):
            output = impl.dispatch_b(torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64))
    assert impl._get_buffer().combine is None, "combine gets DeepEP's own buffer"
    return output, counters, said


def test_rows_left_alone_take_the_room_of_a_batch_without_a_bound(monkeypatch) -> None:
    """Decoded rows beside a prefill: the bound speaks of the others alone."""
    rows = {}
    for alone in (False, True):
        now = batch.Batch(skip="", group_tokens=1000, leaves_alone=alone)
        rows[alone] = dispatched(now, monkeypatch, Impl(), gamma=1.0)[0].rows
    assert rows[True] == bounded.room(MacsConfig.from_preset("rank"), Sizes(2, 8, 2, 16), 1000, planned=False).rows
    assert rows[False] < rows[True]


def test_layers_left_alone_have_no_bound(monkeypatch) -> None:
    """In the pass of others that are planned."""
    impl, planned = Impl(), batch.Batch(skip="", group_tokens=1000)
    rows = dispatched(planned, monkeypatch, impl, gamma=1.0)[0].rows
    alone = batch.Batch(skip="", group_tokens=1000, no_gain=frozenset([0]))
    received, _, said = dispatched(alone, monkeypatch, impl, gamma=1.0)
    assert received.rows == bounded.room(MacsConfig.from_preset(), Sizes(2, 8, 2, 16), 1000, planned=False).rows > rows
    assert len(said) == 1 and "for unplanned batches" in said[0]
    shared = bounded.BoundedDispatch(MacsConfig.from_preset("rank", gamma=1.0), said.append)
    with batch.forward(planned):
        rooms = [shared.room(Sizes(2, 8, 2, 16), 1, "bf16", 1, planned) for planned in (True, False, True)]
    assert [found.rows for found in rooms] == [rows, received.rows, rows]


@pytest.mark.parametrize("gamma", [1.1, math.inf])
def test_every_layer_is_planned_where_only_a_bound_spares_the_count(gamma: float) -> None:
    """Infinite gamma, which balances replicas, gives none."""
    process = Worker(MacsConfig.from_preset("rank", gamma=gamma).on("cpu"))
    process.bounded = bounded.BoundedDispatch(process.config, print)
    process.acting.decide = lambda now, every_layer: batch.Batch(skip="", halves=(every_layer,))
    for sizes, tokens, far in ((Sizes(2, 128, 8, 2048), 2 * 16384, False), (Sizes(8, 256, 8, 7168), 8 * 8192, True)):
        process.bounded.join(sizes, 1)
        needed = far and gamma < math.inf
        assert process.decide(batch.Batch(skip="", group_tokens=tokens)).halves == (needed,)


def test_a_device_that_is_unfit_on_one_rank_is_unfit_for_all() -> None:
    shared, said = (
        bounded.BoundedDispatch(MacsConfig.from_preset(), print, "compute capability 8.0"),
        Sizes(2, 8, 2, 16),
    )
    with batch.forward(batch.Batch(skip="", group_tokens=1000)):
        assert shared.room(said, 1, "bf16", 1) is None


def test_deepep_is_told_how_many_tokens_can_come(monkeypatch) -> None:
    impl = Impl()
    received, counters, said = dispatched(batch.Batch(skip="", group_tokens=1000), monkeypatch, impl)
    assert impl.asked == [1000, 1000] and counters.bounded == 2
    assert not impl.async_finish, "memory of many layers would be taken"
    assert (received.num_experts, received.rows) == (4, (1001 + 4 * (TILE - 1)) // TILE * TILE)
    assert len(said) == 1 and "for planned batches in normal mode: row buffers for 1.00 times the mean" in said[0]
    rows, scales, index = received.permute()
    assert rows.shape == (received.rows, 16) and scales is None and (index.expert_end == 0).all()
    assert received.permute()[2].place.data_ptr() == index.place.data_ptr(), "one workspace for all layers"


def test_a_count_never_meets_dispatches_without_one(monkeypatch) -> None:
    """DeepEP's host takes the first count that any queued dispatch writes for its own. Both are one rank's layers: the
    GPU is waited for once, before the first layer that counts.
    """
    order = []
    impls = [Impl(), Impl()]
    shared = bounded.BoundedDispatch(MacsConfig.from_preset("rank", gamma=1.0), order.append, stream=lambda: stream)
    stream = SimpleNamespace(synchronize=lambda: order.append("waited"))
    for layer, impl in enumerate(impls):
        planner = LayerPlanner(layer, bounded_case.plan(shared.config, Sizes(2, 8, 2, 16)), None, Stats())
        bounded.BoundedNormal(impl, shared, planner, Sizes(2, 8, 2, 16), lambda output, received: received)
        impl.asked = order
    x, ids = torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
    for skip in ("", "draft", "", "small", "outside", "outside"):
        with batch.forward(batch.Batch(skip=skip, group_tokens=1000)):
            for impl in impls:
                impl.dispatch_b(x, ids)
    counts, uncounted = [0, 0], [1000, 1000]
    done = [x for x in order if not str(x).startswith("no count")]  # the log's lines
    assert done == [*uncounted, "waited", *counts, *uncounted, *uncounted, "waited", *counts, *counts]


def test_padding_of_ranks_that_share_a_batch_has_room(monkeypatch) -> None:
    impl = Impl()
    dispatched(batch.Batch(skip="", group_tokens=999), monkeypatch, impl, attn_tp=2)
    assert impl.asked == [1000, 1000]


@pytest.mark.parametrize("skip", ["decode", "small"])
def test_batches_that_are_not_planned_have_no_bound_and_are_not_counted_either(monkeypatch, skip: str) -> None:
    """A rank may be padded to the fullest one's tokens."""
    impl = Impl()
    received, counters, _ = dispatched(batch.Batch(skip=skip, group_tokens=30, most_tokens=29), monkeypatch, impl)
    assert impl.asked == [58, 58] and counters.bounded == 2
    assert received.rows == bounded.room(MacsConfig.from_preset("rank"), Sizes(2, 8, 2, 16), 58, planned=False).rows


@pytest.mark.parametrize("skip", ["draft", "outside"])
def test_other_batches_go_deepeps_own_way(monkeypatch, skip: str) -> None:
    impl = Impl()
    output, counters, said = dispatched(batch.Batch(skip=skip, group_tokens=1000), monkeypatch, impl)
    assert impl.asked == [0, 0] and counters.bounded == 0 and not said and isinstance(output, tuple)


def test_with_macs_off_there_is_room_for_the_worst_case(monkeypatch) -> None:
    impl = Impl()
    off = {"preset": "off", "gamma": math.inf}
    received, *_ = dispatched(batch.Batch(skip="off", group_tokens=1000), monkeypatch, impl, **off)
    assert impl.asked == [1000, 1000] and received.rows == (2000 + 4 * (TILE - 1)) // TILE * TILE


def test_what_cannot_be_bounded_is_said_once(monkeypatch) -> None:
    now = batch.Batch(skip="", group_tokens=1000)
    for impl, why in ((Impl(domains=2), "spans 2 NVLink domains"), (Impl(), "neither bf16 nor FP8")):
        impl.use_mxfp8 = impl.domains == 1
        _, counters, said = dispatched(now, monkeypatch, impl)
        assert impl.asked == [0, 0] and counters.bounded == 0 and len(said) == 1 and why in said[0]
    monkeypatch.setattr(bounded, "SPARE_BYTES", 1000)
    _, counters, said = dispatched(now, monkeypatch, Impl(), gamma=math.inf)
    assert counters.bounded == 0 and "beyond the mean load" in said[0]


def test_the_worst_case_has_a_limit() -> None:
    """Two ranks of a 30B model hold it, eight of a 671B one do not."""
    infinite = MacsConfig.from_preset("rank", gamma=math.inf)
    for sizes, tokens, fits in ((Sizes(2, 128, 8, 2048), 2 * 16384, True), (Sizes(8, 256, 8, 7168), 8 * 8192, False)):
        rows = room(infinite, sizes, tokens, planned=True).rows
        assert (spare_bytes(sizes, tokens, rows) <= bounded.SPARE_BYTES) == fits


REGISTERED = """
from types import SimpleNamespace
import torch
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep_bounded
from sglang_macs.dispatch.bounded import Received, Workspace
deepep_bounded.register_permutation()
from sglang.srt.layers.moe.moe_runner.base import PermuteMethodPool as pool
ids = torch.tensor([[0, 2], [2, -1], [-1, -1]])
tokens, weights = torch.randn(3, 64).bfloat16(), torch.rand(3, 2)
received = Received(tokens, None, ids, weights, 4, 512, Workspace(torch.device("cpu")))
state, kept = {}, tokens.clone()
given = pool.get_pre_permute("macs_bounded", "deep_gemm")(SimpleNamespace(received=received), None, None, state)
assert (given.m_indices.tolist(), given.use_masked_gemm) == ([1, 128, 130, 256], False)
assert (state["all_tokens"], state["hidden_states_shape"]) == (512, (3, 64))
output = SimpleNamespace(hidden_states=given.hidden_states)
combined = pool.get_post_permute("deep_gemm", "macs_bounded")(output, None, None, state)
assert combined.format.value == "deepep_normal" and combined.hidden_states.shape == (3, 64)
sums = kept[:2].float() * (weights * (ids >= 0)).sum(1, keepdim=True)[:2]
torch.testing.assert_close(combined.hidden_states[:2].float(), sums, rtol=0.01, atol=0.01)
print("carried")
"""


def test_sglangs_runner_finds_the_permutation() -> None:
    """In SGLang's own registry, in a process of its own: what is registered there stays."""
    env = {**os.environ, **environment(1)}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(ROOT)])
    done = subprocess.run([sys.executable, "-c", REGISTERED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("carried"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("scale", "lies_so"),
    [
        (torch.empty(16, 256).t(), True),  # [M, H / 128], as `Received.permute` makes them
        (torch.empty(256, 16), False),
        (torch.empty(16, 255).t(), False),
        (torch.empty(16, 260).t()[:256], False),
        (torch.empty(16 * 256 + 1)[1:].view(16, 256).t(), False),
    ],
)
def test_scales_are_copied_unless_they_lie_as_deepgemm_reads_them(scale: torch.Tensor, lies_so: bool) -> None:
    copy = torch.empty(1)
    assert deepep_bounded._align_scale(lambda given: copy, scale) is (scale if lies_so else copy)


def test_the_grouped_gemm_is_told_the_ends_alone_by_a_bounded_dispatch(monkeypatch) -> None:
    calls = []
    gemm = SimpleNamespace(gemm=lambda *given, **more: calls.append(("ends", given[3], more)))
    monkeypatch.setitem(sys.modules, "deep_gemm", gemm)
    around = deepep_bounded._grouped_gemm("gemm")
    monkeypatch.setattr(deepep_bounded, "_as_for_the_largest_batch", lambda *given: given)

    def original(a, b, out, layout, **more) -> None:
        calls.append(("rows", layout, more))

    out, ends = torch.empty(256, 8), torch.zeros(4, dtype=torch.int32)
    of_rows = torch.zeros(256, dtype=torch.int32)
    around(original, None, None, out, of_rows, recipe_a=None)
    around(original, None, None, out, ends, recipe_a=None, recipe_b=(1, 128))
    assert calls[0] == ("rows", of_rows, {"recipe_a": None})
    assert calls[1] == ("ends", ends, {"use_psum_layout": True, "recipe_b": (1, 128)})


def test_the_grouped_gemm_is_one_kernel_for_all_sizes(monkeypatch) -> None:
    """The number of rows by which DeepGEMM chooses is that of the largest batch; the memory is the batch's own."""
    config, sizes = MacsConfig.from_preset("rank", gamma=1.05), Sizes(2, 8, 2, 256)
    shared = bounded.BoundedDispatch(config, print)
    shared.expect(sizes, 1500)
    largest = room(config, sizes, 2 * bounded.size_class(1500), planned=False).rows
    assert shared.most_rows == largest
    monkeypatch.setattr(deepep_bounded.worker, "current", lambda: SimpleNamespace(bounded=shared))
    for rows in (640, largest):
        values, out = torch.rand(rows, 256), torch.rand(rows, 64)
        given, result = deepep_bounded._as_for_the_largest_batch(values, out)
        assert (given.shape, result.shape) == ((largest, 256), (largest, 64))
        assert given.data_ptr() == values.data_ptr() and torch.equal(given[:rows], values)
        result[:rows].fill_(3.0)
        assert (out == 3.0).all()
    beyond = torch.empty(largest + 128, 64)
    assert deepep_bounded._as_for_the_largest_batch(beyond, beyond)[1] is beyond
    fp8 = (torch.empty(640, 256), torch.empty(2, 640).t())
    assert deepep_bounded._as_for_the_largest_batch(fp8, out)[0] is fp8


def test_lost_rows_are_a_fault() -> None:
    shared = bounded.BoundedDispatch(MacsConfig.from_preset("rank"), print)
    shared.check()
    shared.workspace(torch.device("cpu"))
    shared._watch = SimpleNamespace(look=lambda lost: int(lost) or None)  # without a GPU nothing is on its way
    shared.check()
    shared.workspace(torch.device("cpu")).lost.fill_(3)
    with pytest.raises(MacsError, match="3 assignments that found no row"):
        shared.check()
