"""SGLang's own DeepEP V2 implementation over support.elastic, three unequal ranks: what tests/test_deepep_v2.py reads.

Prints one line of JSON, by way: "bounded", "counted" (too large for a bound), "decode".
"""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from sglang.srt.layers.moe.moe_runner.base import PermuteMethodPool
from sglang.srt.layers.moe.token_dispatcher import deepep_v2 as sglang_v2

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import bounded
from sglang_macs.dispatch.bounded import BoundedDispatch, Sizes
from sglang_macs.dispatch.bounded_v2 import BoundedV2
from sglang_macs.engine import deepep_v2
from sglang_macs.plan import batch
from tests.support.elastic import ElasticBuffer, World

TOKENS, CAPACITY = (0, 5, 70), 128  # of each rank; the second: of a rank's buffer
SIZES = Sizes(num_ranks=3, num_experts=12, top_k=3, hidden_size=256)


def inputs(seed: int) -> list[tuple]:
    """Of each rank, as a plan leaves them at gamma 1.0: no rank gets more than its share, the rest goes nowhere."""
    generator = torch.Generator().manual_seed(seed)
    assignments = sum(TOKENS) * SIZES.top_k
    left, made = [assignments // SIZES.num_ranks] * SIZES.num_ranks, []
    for tokens in TOKENS:
        hidden = torch.randn(tokens, SIZES.hidden_size, generator=generator).bfloat16()
        ids = torch.rand(tokens, SIZES.num_experts, generator=generator).argsort(dim=1)[:, : SIZES.top_k]
        ids[::2, 0] = 0  # most want the first expert: rank 0 is over its bound
        ids[1:5] = 1  # not distinct, and gone below: tokens of none at all
        weights = torch.rand(tokens, SIZES.top_k, generator=generator)
        for token, slot in torch.ones_like(ids).nonzero().tolist():
            rank = int(ids[token, slot]) // SIZES.local
            if not left[rank] or 1 <= token < 5:
                ids[token, slot] = -1
            else:
                left[rank] -= 1
        made.append((hidden, ids, weights))
    return made


def implementation(world: World, rank: int):
    """(SGLang's, its buffer)."""
    format = SimpleNamespace(ue8m0=False, tma_aligned=False)
    own = (None, SIZES.top_k, SIZES.num_experts, SIZES.local, SIZES.hidden_size, format, CAPACITY, False)
    impl, buffer = sglang_v2._DeepEPv2Impl(*own), ElasticBuffer(world, rank, CAPACITY)
    impl._get_buffer = lambda: buffer
    return impl, buffer


def experts(given, rank: int) -> torch.Tensor:
    """Expert e multiplies by e + 1, and touches no row that is not its own: layout is ends, or each row's expert."""
    rows, layout = given.hidden_states, given.m_indices
    outputs = torch.full_like(rows, torch.nan)
    if len(layout) == len(rows):
        for row, expert in enumerate(layout.tolist()):
            if expert >= 0:
                outputs[row] = rows[row] * (rank * SIZES.local + expert + 1)
        return outputs
    start = 0
    for expert, end in enumerate(layout.tolist()):
        outputs[start:end] = rows[start:end] * (rank * SIZES.local + expert + 1)
        start = -(-end // 128) * 128
    return outputs


def layer(way: str, world: World, rank: int, given: tuple, shared: BoundedDispatch) -> dict:
    impl, buffer = implementation(world, rank)
    counted = []
    planner = SimpleNamespace(attn_tp=(0, 1), plans=lambda: True, count_bounded=lambda: counted.append(1))
    BoundedV2(impl, shared, planner, SIZES, lambda: way != "decode", Output._make)
    hidden, ids, weights = given
    output = impl.dispatch(hidden, SimpleNamespace(topk_ids=ids, topk_weights=weights))
    found = {"calls": buffer.calls, "bounded": len(counted), "rows": len(output.hidden_states)}
    if way == "decode":
        return found | {"masked": output.use_masked_gemm}
    state, format = {}, output.format.value
    if way == "bounded":
        runner = PermuteMethodPool.get_pre_permute(format, "deep_gemm")(output, None, None, state)
    else:  # SGLang's own needs a GPU to mark the rows of each expert
        layout = torch.full((len(output.hidden_states),), -1, dtype=torch.int32)
        ends, start = output.psum_num_recv_tokens_per_expert.tolist(), 0
        for expert, end in enumerate(ends):
            layout[start:end], start = expert, -(-end // 128) * 128
        runner = SimpleNamespace(hidden_states=output.hidden_states, m_indices=layout)
        state |= {"topk_weights": output.topk_weights, "deepep_v2_expanded": True}
    outputs = SimpleNamespace(hidden_states=experts(runner, rank))
    config = SimpleNamespace(no_combine=False)
    combined = impl.combine(PermuteMethodPool.get_post_permute("deep_gemm", format)(outputs, None, config, state))
    factors = ((ids + 1) * (ids >= 0) * weights).sum(dim=1, keepdim=True)
    wanted = hidden.float() * factors
    error = (combined.float() - wanted).abs().max() / wanted.abs().max() if len(hidden) else torch.zeros(())
    return found | {"error": float(error), "shape": list(combined.shape)}


def dispatched(way: str) -> dict:
    sglang_v2.get_is_extend_in_batch = lambda: way != "decode"
    bounded.SPARE_BYTES = 0 if way == "counted" else 2 << 30
    world, given, said = World(SIZES.num_ranks), inputs(seed=3), []
    shared = BoundedDispatch(MacsConfig.from_preset("rank", gamma=1.0), said.append)
    now = batch.Batch(skip="" if way != "decode" else "decode", group_tokens=sum(TOKENS), most_tokens=max(TOKENS))
    with batch.forward(now), ThreadPoolExecutor(SIZES.num_ranks) as pool:
        ranks = [pool.submit(layer, way, world, rank, given[rank], shared) for rank in range(SIZES.num_ranks)]
        found = [rank.result() for rank in ranks]
    planned = [sum(int((ids // SIZES.local == rank).sum()) for _, ids, _ in given) for rank in range(SIZES.num_ranks)]
    bound = bounded.room(shared.config, SIZES, sum(TOKENS), planned=True).rows
    return {"ranks": found, "received": world.received, "planned": planned, "bound": bound}


Output = deepep_v2.output_class()
sglang_v2.use_deepep_v2 = True  # DeepEP itself is for GPUs
sglang_v2._DeepEPv2Impl._masked_token_capacity = lambda *sizes: 128
deepep_v2.register_expanded()
print("FOUND", json.dumps({way: dispatched(way) for way in ("bounded", "counted", "decode")}))
