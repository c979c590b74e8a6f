"""clip_apply (docs/design/method.md 5).

A slot asks for an *id*: an expert, or with places a copy of one, whose rank is its bound.

Every ordered acceptance, that at the cut levels and those of the rounds, is the same three steps over blocks of BLOCK
flat slots (token * K + slot):

1. who asks writes round * (number of ids) + id into `wanted`, which never counts in a later round, and adds its units
   to `totals[bound, block]`;
2. `_prefix_kernel` makes of these what the blocks before ask for, and takes a copy of what may be given;
3. `_accept_kernel` hands out the places within a block and clears its totals.

Round 0 is that of the assignments at a cut level, which ask for their own id. A slot is unplaced where it had an
expert and has none now. No kernel reads what it writes: Triton orders nothing between its threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .level import bucket_of, importance_of, level_of, load_assignments, load_units, logical_of, store_before
from .places import Places, read_optional

BLOCK = 128  # slots; a block compares every pair of them
PREFIX_BLOCK = 1024
TOKENS = 4  # that one program looks for candidates for


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _clip_kernel(
    ids, gates, weight, segment, logical, shift, cut, new_ids, new_weights, wanted, totals, num_slots, num_blocks,
    TOP_K: tl.constexpr, IDS_PER_BOUND: tl.constexpr, BITS: tl.constexpr, EFFECTIVE: tl.constexpr,
    IMPORTANCE: tl.constexpr, PROTECT_TEXT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep what is above its bound's level, clip what is below, let what is at the level ask for its own id."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_slots
    own_id, gate, w, text = load_assignments(index, inside, ids, gates, weight, segment, TOP_K)
    expert = logical_of(own_id, logical)
    used = own_id >= 0
    bound = own_id // IDS_PER_BOUND
    bucket = bucket_of(importance_of(w, gate, IMPORTANCE), BITS)
    level = level_of(bucket, tl.load(shift + expert, mask=used, other=0), text, PROTECT_TEXT, BITS)
    threshold = tl.load(cut + bound * 4, mask=used, other=-1)
    stays = (level > threshold) | (own_id < 0)
    asks = (level == threshold) & used
    tl.store(new_ids + index, tl.where(stays, own_id, -1), mask=inside)
    tl.store(new_weights + index, tl.where(stays, gate, 0.0), mask=inside)
    tl.store(wanted + index, tl.where(asks, own_id, -1), mask=inside)
    tl.atomic_add(totals + bound * num_blocks + block, load_units(w, EFFECTIVE), mask=asks, sem="relaxed")


@triton.jit(do_not_specialize=["num_blocks"])
def _prefix_kernel(totals, base, left, limit, num_blocks, BLOCK: tl.constexpr):
    """One program per bound: base [NB, blocks] = units asked for before each block."""
    bound = tl.program_id(0)
    tl.store(limit + bound, tl.load(left + bound))
    store_before(totals, base, bound, 0, num_blocks, BLOCK)


@triton.jit
def _softplus(x):
    z = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(z < 1e-5, z - z * z / 2, tl.log(1.0 + z))


@triton.jit
def _rerouted_weight(index, new_id, accepted, ids, gates, logits, logical, TOP_K: tl.constexpr,
                     NUM_EXPERTS: tl.constexpr, SCORING: tl.constexpr):  # fmt: skip
    """The new expert's own router probability under the scaling of the token's greatest gate, the first of equals."""
    token = index // TOP_K
    reference = tl.full(index.shape, -1, tl.int32)
    greatest = tl.zeros(index.shape, tl.float32)
    for slot in range(TOP_K):
        other = tl.load(ids + token * TOP_K + slot, mask=accepted, other=-1).to(tl.int32)
        gate = tl.load(gates + token * TOP_K + slot, mask=accepted, other=0.0)
        better = (other >= 0) & ((reference < 0) | (gate > greatest))
        reference = tl.where(better, other, reference)
        greatest = tl.where(better, gate, greatest)
    row = logits + token.to(tl.int64) * NUM_EXPERTS
    new_id, reference = tl.where(accepted, new_id, -1), tl.where(accepted, reference, -1)
    to = tl.load(row + logical_of(new_id, logical), mask=accepted, other=0.0).to(tl.float64)
    origin = tl.load(row + logical_of(reference, logical), mask=accepted, other=0.0).to(tl.float64)
    if SCORING == 0:
        ratio = tl.exp(to - origin)
    elif SCORING == 1:
        ratio = (1.0 + tl.exp(-origin)) / (1.0 + tl.exp(-to))
    else:
        ratio = tl.sqrt(_softplus(to) / _softplus(origin))
    return tl.where(greatest == 0.0, greatest, (greatest.to(tl.float64) * ratio).to(tl.float32))


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "turn"])
def _accept_kernel(
    ids, gates, weight, logits, logical, wanted, base, limit, left, totals, new_ids, new_weights,
    num_slots, num_blocks, turn,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_IDS: tl.constexpr, IDS_PER_BOUND: tl.constexpr,
    EFFECTIVE: tl.constexpr, REROUTES: tl.constexpr, SCORING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grant what is asked for while the running sum of a bound's units, itself included, stays within its limit."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    asked = tl.load(wanted + index, mask=index < num_slots, other=-1) - turn * NUM_IDS
    if tl.max(asked) >= 0:
        asks = asked >= 0
        bound = tl.where(asks, asked // IDS_PER_BOUND, -1)
        units = load_units(tl.load(weight + index // TOP_K, mask=asks, other=0.0), EFFECTIVE)
        not_after = (bound[None, :] == bound[:, None]) & (index[None, :] <= index[:, None])
        running = tl.sum(tl.where(not_after, units[None, :], 0), 1)
        running += tl.load(base + bound * num_blocks + block, mask=asks, other=0)
        accepted = asks & (running <= tl.load(limit + bound, mask=asks, other=0))
        if REROUTES:
            given = ids, gates, logits, logical
            gate = _rerouted_weight(index, asked, accepted, *given, TOP_K, NUM_EXPERTS, SCORING)
        else:
            gate = tl.load(gates + index, mask=accepted, other=0.0)
        tl.store(new_ids + index, asked, mask=accepted)
        tl.store(new_weights + index, gate, mask=accepted)
        tl.store(totals + bound * num_blocks + block, tl.zeros([BLOCK], tl.int32), mask=asks)
        tl.atomic_add(left + bound, -units, mask=accepted, sem="relaxed")


@triton.jit
def _expert_at(ids, index, inside, logical):
    return logical_of(tl.load(ids + index, mask=inside, other=-1).to(tl.int32), logical)


@triton.jit
def _id_of(expert, home, exists):
    """By which a slot asks for an expert."""
    if home is None:
        return expert
    else:
        return tl.load(home + expert, mask=exists, other=0)


@triton.jit
def _home_kernel(room, first, rank, physical, home, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """home [E]: of each expert the copy on the rank with most room, on the lowest among equals."""
    expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = expert < NUM_EXPERTS
    begin = tl.load(first + expert, mask=inside, other=0)
    count = tl.load(first + expert + 1, mask=inside, other=0) - begin
    best = tl.full([BLOCK], 0, tl.int32)
    most = tl.full([BLOCK], -1, tl.int32)
    for i in range(tl.max(count)):
        here = i < count
        on = tl.load(rank + begin + i, mask=here, other=0)
        there = tl.load(room + on, mask=here, other=-1)
        best = tl.where(there > most, tl.load(physical + begin + i, mask=here, other=0), best)
        most = tl.maximum(most, there)
    tl.store(home + expert, best, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "turn"])
def _propose_kernel(
    ids, weight, order, logical, home, new_ids, wanted, totals, room, num_tokens, num_blocks, turn,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_IDS: tl.constexpr, IDS_PER_BOUND: tl.constexpr,
    EXPERTS_PER_RANK: tl.constexpr, EFFECTIVE: tl.constexpr, LOCAL: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every unplaced slot, in slot order, asks for the best candidate that its token's slots before it have left."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)[None, :]
    inside = (token[:, None] < num_tokens) & (slot < TOP_K)
    index = token[:, None] * TOP_K + slot
    is_unplaced = (tl.load(ids + index, mask=inside, other=-1) >= 0) & (
        tl.load(new_ids + index, mask=inside, other=-1) < 0
    )
    if tl.max(is_unplaced.to(tl.int32)) > 0:
        here = token < num_tokens
        units = load_units(tl.load(weight + token, mask=here, other=0.0), EFFECTIVE)
        candidate = tl.arange(0, EXPERTS)[None, :]
        exists = here[:, None] & (candidate < NUM_EXPERTS)
        place = token.to(tl.int64)[:, None] * NUM_EXPERTS + candidate
        score = tl.load(order + place, mask=exists, other=float("-inf"))
        own_id = _id_of(candidate, home, candidate < NUM_EXPERTS)
        room_there = tl.load(room + own_id // IDS_PER_BOUND, mask=candidate < NUM_EXPERTS, other=0)
        open_ = (tl.abs(score) < float("inf")) & (room_there >= units[:, None])
        for k in range(TOP_K):
            before = _expert_at(ids, token * TOP_K + k, here, logical)
            now = _expert_at(new_ids, token * TOP_K + k, here, logical)
            open_ = open_ & (candidate != before[:, None]) & (candidate != now[:, None])
        for k in range(TOP_K):
            before = _expert_at(ids, token * TOP_K + k, here, logical)
            now = _expert_at(new_ids, token * TOP_K + k, here, logical)
            allowed = open_ & ((before >= 0) & (now < 0))[:, None]
            if LOCAL:
                allowed = allowed & (candidate // EXPERTS_PER_RANK == (before // EXPERTS_PER_RANK)[:, None])
            masked = tl.where(allowed, score, float("-inf"))
            finds = tl.max(masked, 1) > float("-inf")
            choice = tl.argmax(masked, 1)  # the first of equals
            open_ = open_ & ((candidate != choice[:, None]) | (finds == 0)[:, None])
            asked = token * TOP_K + k
            new_id = _id_of(choice, home, finds)
            tl.store(wanted + asked, turn * NUM_IDS + new_id, mask=finds)
            total = totals + new_id // IDS_PER_BOUND * num_blocks + asked // BLOCK
            tl.atomic_add(total, units, mask=finds, sem="relaxed")


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(ids, new_ids, segment, logical, counts, num_slots, TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """counts [3 or 4, E, 2]: originals that stay, originals that do not, experts that came instead; with places,
    originals that stay at another copy.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_slots
    old_id = tl.load(ids + index, mask=inside, other=-1).to(tl.int32)
    new_id = tl.load(new_ids + index, mask=inside, other=-1).to(tl.int32)
    before, now = logical_of(old_id, logical), logical_of(new_id, logical)
    text = (tl.load(segment + index // TOP_K, mask=inside, other=-1) < 0).to(tl.int32)
    one = tl.full([BLOCK], 1, tl.int32)
    lost = (before != now).to(tl.int32)
    tl.atomic_add(counts + (lost * NUM_EXPERTS + before) * 2 + text, one, mask=before >= 0, sem="relaxed")
    came = (before != now) & (now >= 0)
    tl.atomic_add(counts + (2 * NUM_EXPERTS + now) * 2 + text, one, mask=came, sem="relaxed")
    if logical is not None:
        moved = (before == now) & (old_id != new_id)
        tl.atomic_add(counts + (3 * NUM_EXPERTS + now) * 2 + text, one, mask=moved, sem="relaxed")


def clip_apply(
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight: Tensor,
    segment: Tensor,
    router_logits: Tensor | None,
    shift: Tensor,
    cut: Tensor,
    policy: list[float],
    places: Tensor | None = None,
    chosen: Tensor | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    p, placed = read_optional(policy, places, topk_ids)
    num_experts, effective = p.num_experts, p.load == 1
    checks.assignments(topk_ids, topk_weights, weight, segment)
    checks.chosen_ids(topk_ids, chosen, placed is not None)
    checks.clips(topk_ids, router_logits, shift, cut, p, selection)
    ids, gates, weight, segment = (t.contiguous() for t in (topk_ids, topk_weights, weight, segment))
    sent = ids if chosen is None else chosen.contiguous()
    shift, cut = shift.contiguous(), cut.contiguous()
    logits = None if router_logits is None else router_logits.contiguous()
    order = logits if selection is None else selection.contiguous()
    num_tokens, top_k = ids.shape
    num_bounds, num_slots = len(cut), ids.numel()
    num_blocks = triton.cdiv(num_slots, BLOCK)
    num_ids, logical = (placed.num_physical, placed.logical) if placed else (num_experts, None)
    per_bound = num_ids // num_bounds

    new_ids, new_weights = torch.empty_like(ids), torch.empty_like(gates)
    counts = shift.new_zeros(4 if placed else 3, num_experts, 2)
    wanted = shift.new_empty(num_slots)
    totals, base = shift.new_zeros(num_bounds, num_blocks), shift.new_empty(num_bounds, num_blocks)
    limit = shift.new_empty(num_bounds)

    def accept(turn: int, left: Tensor) -> None:
        _prefix_kernel[(num_bounds,)](totals, base, left, limit, num_blocks, PREFIX_BLOCK)
        _accept_kernel[(num_blocks,)](
            ids, gates, weight, logits, logical, wanted, base, limit, left, totals, new_ids, new_weights,
            num_slots, num_blocks, turn,
            top_k, num_experts, num_ids, per_bound, effective, turn > 0, p.scoring, BLOCK, num_warps=8,
        )  # fmt: skip

    _clip_kernel[(num_blocks,)](
        sent, gates, weight, segment, logical, shift, cut, new_ids, new_weights, wanted, totals, num_slots, num_blocks,
        top_k, per_bound, p.bucket_bits, effective, p.importance, p.protect_text, BLOCK,
    )  # fmt: skip
    quota, room = cut.t()[1:3].clone(memory_format=torch.contiguous_format)  # a copy: what is given is taken off
    accept(0, quota)
    if p.reroute != 0 and logits is not None:
        for turn in range(1, p.reroute_rounds + 1):
            _propose_kernel[(triton.cdiv(num_tokens, TOKENS),)](
                ids, weight, order, logical, _homes(room, placed), new_ids, wanted, totals, room,
                num_tokens, num_blocks, turn,
                top_k, num_experts, num_ids, per_bound, num_experts // p.num_ranks, effective, p.reroute == 1,
                TOKENS, triton.next_power_of_2(top_k), triton.next_power_of_2(num_experts), BLOCK,
            )  # fmt: skip
            accept(turn, room)
    _count_kernel[(num_blocks,)](ids, new_ids, segment, logical, counts, num_slots, top_k, num_experts, BLOCK)
    return new_ids, new_weights, counts


def _homes(room: Tensor, placed: Places | None) -> Tensor | None:
    """[E] i32, by which id each expert is asked for in a round that begins with this room; None: by its own."""
    if placed is None:
        return None
    home = torch.empty_like(placed.row)
    grid = (triton.cdiv(len(home), BLOCK),)
    _home_kernel[grid](room, placed.first, placed.rank, placed.physical, home, len(home), BLOCK)
    return home
