"""The operators on a GPU: the CPU's bits where they are integers, close where they are not, and never a host wait.

They test what CUDA tensors get (`ops.cuda_backend`): the extension's kernels, or Triton's where it has none.
`MACS_CUDA_BACKEND=triton make test-gpu` tests Triton's beside an extension that has them.
"""

import os

import pytest
import torch
import torch.distributed as dist

from reference import bounded_case
from sglang_macs import ops
from sglang_macs.choices import NUM_SUMS
from sglang_macs.comm.peer_all_reduce import PeerAllReduce
from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import plan_cost
from sglang_macs.dispatch.acting import Acting
from sglang_macs.dispatch.bounded import BoundedDispatch, Received
from sglang_macs.dispatch.fused import FusedDispatch, Sizes
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe.stats import Stats
from sglang_macs.plan.batch import Batch, forward
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.routing import Routing
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.gpu_batches import EXPERTS, RANKS, batch, to_gpu

pytestmark = pytest.mark.gpu
PRESETS = {
    "rank": {"preset": "rank", "gamma": 1.05},
    "rank, no text protection": {"preset": "rank", "gamma": 1.0, "protect_text": False},
    "paper": {"preset": "paper", "gamma": 0.7},
    "paper, global": {"preset": "paper", "gamma": 0.6, "reroute": "global"},
    "cai": {"preset": "cai", "gamma": 1.0},
    "infinite": {"preset": "rank", "gamma": float("inf")},
}


def test_the_operators_are_those_asked_for():
    assert ops.cuda_backend() in ("cuda", "triton")
    assert ops.cuda_backend() == os.environ.get("MACS_CUDA_BACKEND", ops.cuda_backend())
    registered = torch._C._dispatch_dump("sglang_macs::clip_apply").splitlines()
    active = next(line for line in registered if line.startswith("CUDA:"))
    assert ("ops/triton" in active) == (ops.cuda_backend() == "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "hidden_size"), [(0, 64), (1, 2048), (777, 2048), (300, 7168), (50, 99)], ids=str)
def test_entropies_and_weights_agree_with_the_cpu(tokens, hidden_size, dtype):
    hidden, _, _, _, segment = batch(tokens, 2, tokens + hidden_size, dtype, hidden_size)
    entropy = ops.entropy_score(hidden, segment)
    on_gpu = ops.entropy_score(*to_gpu(hidden, segment))
    torch.testing.assert_close(on_gpu.cpu(), entropy, rtol=0, atol=2e-5)
    weight = ops.entropy_weight(entropy.cuda(), segment.cuda(), 1, 1.0)
    torch.testing.assert_close(weight.cpu(), ops.entropy_weight(entropy, segment, 1, 1.0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 8), (1, 1), (130, 8), (5000, 8)], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_decisions_are_the_cpus_to_the_bit(name, tokens, top_k, ids_dtype):
    config = MacsConfig.from_preset(**PRESETS[name])
    modality = torch.randint(-1, 2, (EXPERTS,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    cpu, gpu = Plan(config, EXPERTS, RANKS, modality), Plan(config, EXPERTS, RANKS, modality.cuda())
    hidden, ids, weights, logits, segment = batch(tokens, top_k, tokens)
    ids = ids.to(ids_dtype)
    weight = cpu.weight(hidden, segment, 1)  # the same on both sides: everything behind it is integer
    own = cpu.histogram(ids, weights, weight, segment)
    own_gpu = gpu.histogram(*to_gpu(ids, weights, weight, segment))
    assert torch.equal(own_gpu.cpu(), own)
    shift, cut = cpu.threshold(own, own + own)
    shift_gpu, cut_gpu = gpu.threshold(own_gpu, own_gpu + own_gpu)
    assert torch.equal(shift_gpu.cpu(), shift) and torch.equal(cut_gpu.cpu(), cut)
    expected = cpu.apply(ids, weights, weight, segment, logits, shift, cut)
    got = gpu.apply(*to_gpu(ids, weights, weight, segment, logits), shift_gpu, cut_gpu)
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[2].cpu(), expected[2])
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-5, atol=0)
    if tokens == 5000 and name != "infinite":
        assert int(expected[2][1].sum()) > 0, "a case that clips nothing proves nothing"


ROUTERS = {
    "biased groups": ("sigmoid", True, 8, 4),
    "groups": ("softmax", False, 4, 1),
    "biased": ("sqrtsoftplus", True, 1, 1),
    "sqrtsoftplus": ("sqrtsoftplus", False, 1, 1),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 130, 5000], ids=str)
def test_routers_order_candidates_as_on_the_cpu(name, dtype, tokens):
    scoring, biased, *groups = ROUTERS[name]
    bias = 0.3 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2)) if biased else None
    hidden, ids, weights, logits, segment = batch(tokens, 8, tokens + 3)
    logits = logits.to(dtype)
    selection = ops.selection_score(logits, bias, scoring, *groups)
    on_gpu = ops.selection_score(logits.cuda(), None if bias is None else bias.cuda(), scoring, *groups)
    torch.testing.assert_close(on_gpu.cpu(), selection, rtol=1e-6, atol=1e-6)
    routing = Routing(scoring, bias, *groups)
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0), EXPERTS, RANKS, routing=routing)
    weight = plan.weight(hidden, segment, 1)
    own = plan.histogram(ids, weights, weight, segment)
    shift, cut = plan.threshold(own, own)
    inputs = ids, weights, weight, segment, logits.float(), shift, cut
    order = selection if routing.needs_selection else None  # the same on both sides: equals stay equals
    want = ops.clip_apply(*inputs, plan.policy, selection=order)
    got = ops.clip_apply(*to_gpu(*inputs), plan.policy, selection=None if order is None else order.cuda())
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[2].cpu(), want[2])
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-5, atol=0)
    assert tokens < 5000 or int(want[2][2].sum()) > 0, "a case that re-routes nothing proves nothing"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("num_segments", [0, 1, 3], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 130, 5000], ids=str)
def test_the_fused_halves_give_the_operators_bits(name, num_segments, tokens):
    plan = Plan(MacsConfig.from_preset(**PRESETS[name]), EXPERTS, RANKS)
    hidden, ids, weights, logits, segment = batch(tokens, 8, 100 + tokens)
    image = torch.arange(tokens, dtype=torch.int32) % max(num_segments, 1)
    segment = torch.where(segment < 0, segment, image) if num_segments else torch.full_like(segment, -1)
    hidden, ids, weights, logits, segment = to_gpu(hidden, ids, weights, logits, segment)
    other = plan.histogram(ids, weights, plan.weight(hidden, segment, num_segments), segment).roll(256)

    def all_reduce(own):
        own.add_(other)

    weight = plan.weight(hidden, segment, num_segments)
    own = plan.histogram(ids, weights, weight, segment)
    shift, cut = plan.threshold(own, own + other)
    expected = plan.apply(ids, weights, weight, segment, logits, shift, cut)
    for _ in range(3):
        poison = [torch.full((1 << 20,), 0x7F7F7F7F, dtype=torch.int32, device="cuda") for _ in range(4)]
        del poison  # what the outputs are made of now holds it
        result = plan(RoutedTokens(hidden, ids, weights, logits, segment, num_segments), all_reduce)
        assert torch.equal(result.weight, weight) and torch.equal(result.own, own) and torch.equal(result.cut, cut)
        got = (result.topk_ids, result.topk_weights, result.counts)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["rank", "paper, global"])
def test_the_plan_repeats_to_the_bit(name):
    plan = Plan(MacsConfig.from_preset(**PRESETS[name]), EXPERTS, RANKS)
    hidden, ids, weights, logits, segment = to_gpu(*batch(3000, 8, 5))
    segment = torch.where(segment < 0, segment, (torch.arange(3000, device="cuda") % 7).int())
    tokens = RoutedTokens(hidden, ids, weights, logits, segment, 7)
    first = plan(tokens)
    for _ in range(20):
        again = plan(tokens)
        for field in ("topk_ids", "topk_weights", "weight", "own", "cut", "counts"):
            assert torch.equal(getattr(again, field), getattr(first, field)), field


def test_the_whole_plan_never_makes_the_host_wait_and_can_be_captured():
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0), EXPERTS, RANKS)
    first, second = ([t.cuda() for t in batch(512, 8, seed)] for seed in (1, 2))

    def run(tensors):
        return plan(RoutedTokens(*tensors, 1))

    run(first)  # loads the modules
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [run(first).topk_ids, run(second).topk_ids]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = [t.clone() for t in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(static)
    for source, want in zip((first, second), expected, strict=True):
        for t, s in zip(static, source, strict=True):
            t.copy_(s)
        result.topk_ids.fill_(-7)
        graph.replay()
        assert torch.equal(result.topk_ids, want)
    assert int((expected[0] < 0).sum()) > 0


class AloneInGroup(LayerPlanner):
    def all_reduce(self, tensor):
        pass


@pytest.mark.parametrize("verify", [False, True])
def test_counting_never_makes_the_host_wait_and_is_right_across_streams(verify):
    """Passes on two streams in turn, each held up by what a pass would compute; a reader on a third."""
    config = MacsConfig.from_preset("rank", gamma=1.0 if verify else float("inf"), verify=verify)
    counters, batches = Stats(), [to_gpu(*batch(256, 8, seed)) for seed in range(5)]
    planners = [AloneInGroup(i, Plan(config, EXPERTS, RANKS), None, counters) for i in range(len(batches))]

    def serve(layers: int) -> list:
        torch.cuda._sleep(10_000_000)
        seen = []
        for i in (layer % len(batches) for layer in range(layers)):
            hidden, ids, weights, logits, segment = batches[i]
            with forward(Batch(segment, 1, "", group_tokens=256, measured=verify)):
                planned = planners[i](hidden, ids, weights, logits)
                own = planners[i].recount(ids, planned)
                planners[i].prove(planned, own, own)
                seen = [*seen, planned.result.counts][: len(batches)]
        for _ in range(100):  # what the passes themselves put where the plans let go
            torch.full_like(seen[0], 1_000_000)
        return seen

    of_batch = [counts.long().sum(1).cpu() for counts in serve(70)]  # the first time also loads the modules
    torch.cuda.set_sync_debug_mode("error")
    streams, reader, copies = [torch.cuda.Stream() for _ in range(2)], torch.cuda.Stream(), []
    try:
        for turn in range(6):
            with torch.cuda.stream(streams[turn % 2]):
                serve(50)
            with torch.cuda.stream(reader):
                copies.append((counters.to_host(), torch.cuda.Event()))
                copies[-1][1].record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = sum(of_batch) * 14
    for turn, (copy, arrived) in enumerate(copies):
        arrived.synchronize()
        got, count = copy.snapshot(), 120 + 50 * turn
        want = want + sum(of_batch) * 10
        kept, clipped, rerouted = want.tolist()
        assert got["planned"] == got["checks"]["bound"] == count and got["violations"]["bound"] == 0
        assert [got["own"][f"assignments_{m}"] for m in ("visual", "text")] == [kept[i] + clipped[i] for i in (0, 1)]
        assert [got["own"][f"rerouted_{m}"] for m in ("visual", "text")] == rerouted
        layers = got["layers"].values()
        assert sum(sum(layer["rows_before"]) for layer in layers) == sum(kept) + sum(clipped)
        assert sum(layer["dispatches"] for layer in layers) == count and (sum(clipped) > 0) == verify
    assert counters.snapshot() == {**got, "plan_seconds": counters.plan_seconds}


def test_layers_are_left_alone_as_on_a_cpu_and_loads_come_without_a_wait():
    """Layer by layer more skewed; batches of two sizes. The decisions follow from integers, so they are the same."""
    config, decided = MacsConfig.from_preset("rank", gamma=1.05), {}
    for device in ("cpu", "cuda"):
        acting, counters = Acting(), Stats()
        acting.rows_that_pay = 60
        planners = [AloneInGroup(i, Plan(config, EXPERTS, RANKS), None, counters, acting=acting) for i in range(4)]
        decided[device] = []
        for number in range(12):
            tokens = 256 if number % 3 else 1024
            now = acting.decide(Batch(skip="", group_tokens=tokens))
            decided[device].append((now.no_gain, now.gain))
            batches = [[t.to(device) for t in batch(tokens, 8, number, skew=skew)] for skew in (0, 0.3, 0.6, 2.0)]
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first pass loads the modules
            try:
                with forward(now):
                    for planner, (hidden, ids, weights, logits, _) in zip(planners, batches, strict=True):
                        planner(hidden, ids, weights, logits)
                acting.end_pass()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert decided["cuda"] == decided["cpu"] and len({no_gain for no_gain, _ in decided["cpu"]}) > 2


@pytest.mark.parametrize("launched", ["waiting", "ahead", "graph"])
def test_what_pays_is_measured(launched):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        planner = AloneInGroup(0, Plan(MacsConfig.from_preset(), EXPERTS, RANKS), None, Stats())
        sizes = plan_cost.ExpertSizes(2048, 768, 8)
        rows = plan_cost.rows_that_pay(planner, sizes, torch.device("cuda"), dist.group.WORLD, launched)
        assert rows > plan_cost.row_seconds(sizes, torch.device("cuda")) > 0
    finally:
        dist.destroy_process_group()


def fused_alone(config: MacsConfig, sizes: Sizes) -> FusedDispatch:
    """Of one rank, over memory of its own."""
    num_blocks = torch.cuda.get_device_properties(0).multi_processor_count
    own, _ = ops.allocate_shared(FusedDispatch.region_bytes(sizes, num_blocks))
    return FusedDispatch(config, sizes, PeerMemory(0, own, [own.data_ptr()]), num_blocks)


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="the fused dispatch exists in CUDA only")
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_the_fused_dispatch_decides_as_the_plan_and_its_sums_are_those_of_the_rows(format):
    """One rank; more of them, faults and every shape: benchmarks/gpu/check_fused.py."""
    config = MacsConfig.from_preset("paper", load="rows", gamma=0.6, reroute="global", dispatch="fused")
    sizes = Sizes(num_ranks=1, num_experts=EXPERTS, top_k=8, max_tokens=130, hidden_size=2048)
    fused = fused_alone(config, sizes)
    plan = Plan(config, EXPERTS, 1)
    for step, tokens in enumerate((130, 0, 1, 77)):
        hidden, ids, weights, logits, segment = to_gpu(*batch(tokens, 8, step, hidden_size=2048))
        routed = RoutedTokens(hidden, ids, weights, logits, segment, 1)
        want, got = plan(routed), fused.send(plan, 3, format, routed)
        rows, scales, received = fused.receive()
        for name in ("topk_ids", "topk_weights", "weight", "cut", "counts"):
            assert torch.equal(getattr(got, name), getattr(want, name)), (name, tokens)
        assert torch.equal(got.group, want.group[-NUM_SUMS:])
        assert torch.equal(received, (want.counts[0] + want.counts[2]).sum(1, dtype=torch.int32))
        values = rows.float() * (1.0 if scales is None else scales.repeat_interleave(128, 2))
        fused.offer(values.bfloat16(), got.topk_ids, got.topk_weights)
        combined = fused.combine(got.topk_ids, got.topk_weights).float()
        kept = (got.topk_weights * (got.topk_ids >= 0)).sum(1, keepdim=True)
        torch.testing.assert_close(combined, hidden.float() * kept, rtol=0.1 if format == "fp8" else 0.02, atol=0.02)
    torch.cuda.synchronize()
    fused.check()
    torch.cuda.synchronize()
    fused.check()


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="the fused dispatch exists in CUDA only")
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_carried_rows_come_back_in_every_replay_of_a_graph(format):
    """As SGLang decodes: one graph, batches of any size in it, padded with ids of -1; experts write to the region."""
    most, replays = 32, 6
    sizes = Sizes(num_ranks=1, num_experts=EXPERTS, top_k=8, max_tokens=most, hidden_size=2048)
    fused = fused_alone(MacsConfig.from_preset("paper", dispatch="fused"), sizes)
    hidden, ids, weights, *_ = to_gpu(*batch(most, 8, 0, hidden_size=2048))

    def layer() -> torch.Tensor:
        fused.carry(3, format, hidden, ids, awaits=True)
        rows, scales, _ = fused.receive()
        outputs = torch.empty(rows.shape, dtype=torch.bfloat16, device="cuda")
        assert fused.holds(rows) and fused.lend(outputs)
        outputs.copy_(rows.float() * (1.0 if scales is None else scales.repeat_interleave(128, 2)))
        return fused.combine(ids, weights, outputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        combined = layer()
    for step in range(replays):
        fresh = to_gpu(*batch(most, 8, 1 + step, hidden_size=2048))
        for held, new in zip((hidden, ids, weights), fresh, strict=False):
            held.copy_(new)
        ids[(7 * step) % most :] = -1  # once all of it
        graph.replay()
        kept = (weights * (ids >= 0)).sum(1, keepdim=True)
        torch.cuda.synchronize()
        tolerance = {"rtol": 0.1 if format == "fp8" else 0.02, "atol": 0.02}
        torch.testing.assert_close(combined.float(), hidden.float() * kept, **tolerance)
    assert fused.epoch() == 1 + replays, "epochs are counted on the device"
    fused.check()
    torch.cuda.synchronize()
    fused.check()


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="the bounded permutation exists in CUDA only")
@pytest.mark.parametrize("case", bounded_case.CASES, ids=str)
def test_the_bounded_permutation_gives_the_cpus_bits(case):
    """Rows, scales and ends as plain torch has them; sums as the CPU operator."""
    for seed in range(5):
        for format in ("bf16", "fp8"):
            bounded_case.check_permute(ops.bounded_permute, case, format, seed, "cuda")
        bounded_case.check_gather(ops.bounded_gather, case, seed, "cuda", reference=ops.bounded_gather)
    bounded_case.check_lost(ops.bounded_permute, "cuda")


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="the bounded permutation exists in CUDA only")
def test_a_bounded_dispatch_never_makes_the_host_wait():
    """From what DeepEP delivers to the tokens that it combines, and the look at the fault."""
    shared = BoundedDispatch(MacsConfig.from_preset("rank"), print)
    ids = bounded_case.topk_ids(bounded_case.CASES[4], 1).cuda()
    tokens = torch.randn(len(ids), 256, device="cuda").bfloat16()
    weights = torch.rand(ids.shape, device="cuda")
    received = Received(tokens, None, ids, weights, 16, 4096, shared.workspace(ids.device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            rows, _, index = received.permute()
            combined = received.gather(rows, index.place)
            shared.check()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    came = (ids >= 0).any(dim=1)
    expected = tokens.float() * (weights * (ids >= 0)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(combined[came].float(), expected[came], rtol=0.01, atol=0.01)


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="the sum over peers exists in CUDA only")
def test_ranks_sum_over_each_others_memory():
    """Three ranks on streams of their own; between processes: benchmarks/gpu/overhead.py."""
    ranks, size, rounds = 3, 33000, 20
    regions = [
        torch.zeros(ops.peer_reduce_layout(ranks, size).bytes, dtype=torch.uint8, device="cuda") for _ in range(ranks)
    ]
    addresses = [region.data_ptr() for region in regions]
    sums = [PeerAllReduce(PeerMemory(rank, regions[rank], addresses), size) for rank in range(ranks)]
    own = [[torch.randint(-(2**31), 2**31 - 1, (size,), device="cuda").int() for _ in sums] for _ in range(rounds)]
    expected = [torch.stack(of_round).sum(0, dtype=torch.int32) for of_round in own]
    torch.cuda.synchronize()
    for rank, stream in enumerate(torch.cuda.Stream() for _ in sums):
        with torch.cuda.stream(stream):
            for of_round in own:
                sums[rank](of_round[rank])
    torch.cuda.synchronize()
    for of_round, total in zip(own, expected, strict=True):
        assert all(torch.equal(values, total) for values in of_round)
    for one in sums:
        one.check()
        torch.cuda.synchronize()
        one.check()


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="the sum over peers exists in CUDA only")
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 100, 3000], ids=str)
def test_a_plan_and_its_exchange_over_peers_are_one_call(tokens, logits_dtype):
    """Two ranks on streams of their own; the bits of a plan around an all-reduce, logits cast before."""
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0), EXPERTS, 2)
    size = ops.peer_reduce_layout(2, plan.histogram_size).bytes
    regions = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    addresses = [region.data_ptr() for region in regions]
    sums = [PeerAllReduce(PeerMemory(i, regions[i], addresses), plan.histogram_size) for i in range(2)]
    batches = [to_gpu(*batch(tokens, 8, seed)) for seed in range(2)]
    batches = [(*b[:3], b[3].to(logits_dtype), b[4]) for b in batches]
    total = torch.stack([plan(RoutedTokens(*b, 1)).own for b in batches]).sum(0, dtype=torch.int32)
    exact = [RoutedTokens(*b[:3], b[3].float(), b[4], 1) for b in batches]
    want = [plan(tokens, lambda group: group.copy_(total)) for tokens in exact]
    torch.cuda.synchronize()
    for _ in range(3):
        got = []
        for i, stream in enumerate(torch.cuda.Stream() for _ in range(2)):
            with torch.cuda.stream(stream):
                got.append(plan(RoutedTokens(*batches[i], 1), sums[i]))
        torch.cuda.synchronize()
        for one, expected in zip(got, want, strict=True):
            for name, mine, theirs in zip(one._fields, one, expected, strict=True):
                assert mine is theirs is None or torch.equal(mine, theirs), name
