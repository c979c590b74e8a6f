"""The integer arithmetic of csrc/include/macs/level.h in Triton, the reading of assignments, and their counting.

Settings are constexpr: `BITS` is m of B = 2^(4 + m) buckets, `EFFECTIVE` load=effective, `IMPORTANCE` as in the schema.
"""

import triton
import triton.language as tl


@triton.jit
def fixed_weight(weight):
    """max(1, rint(256 weight)), half to even; 256 weight and its remainder are exact in f32."""
    scaled = weight * 256.0
    floor = scaled.to(tl.int32)
    rest = scaled - floor.to(tl.float32)
    up = (rest > 0.5) | ((rest == 0.5) & ((floor & 1) == 1))
    return tl.maximum(floor + up.to(tl.int32), 1)


@triton.jit
def load_units(weight, EFFECTIVE: tl.constexpr):
    if EFFECTIVE:
        return fixed_weight(weight)
    else:
        return tl.full(weight.shape, 1, tl.int32)


@triton.jit
def importance_of(weight, gate, IMPORTANCE: tl.constexpr):
    if IMPORTANCE == 0:
        return weight
    elif IMPORTANCE == 1:
        return gate
    else:
        return weight * gate


@triton.jit
def bucket_of(importance, BITS: tl.constexpr):
    bucket = (importance.to(tl.int32, bitcast=True) >> (23 - BITS)) - ((127 - 16) << BITS)
    bucket = tl.minimum(tl.maximum(bucket, 0), (16 << BITS) - 1)
    return tl.where(importance > 0, bucket, 0)


@triton.jit
def level_of(bucket, shift, text, PROTECT_TEXT: tl.constexpr, BITS: tl.constexpr):
    level = tl.maximum(bucket - shift, 0)
    if PROTECT_TEXT:
        level += tl.where(text, 16 << BITS, 0)
    return level


@triton.jit
def cut_level(units, level, top, first):
    """The highest level at which the units from it up are more than `top`; first - 1 if none is."""
    from_here_up = tl.sum(units) - tl.cumsum(units, 0) + units
    return tl.max(tl.where(from_here_up > top, level, first - 1))


@triton.jit
def load_assignments(index, inside, ids, gates, weight, segment, TOP_K: tl.constexpr):
    """(expert, gate, weight, text) of the flat slots `index` = token * K + slot; expert -1 outside."""
    token = index // TOP_K
    expert = tl.load(ids + index, mask=inside, other=-1).to(tl.int32)
    gate = tl.load(gates + index, mask=inside, other=0.0)
    token_weight = tl.load(weight + token, mask=inside, other=0.0)
    text = tl.load(segment + token, mask=inside, other=-1) < 0
    return expert, gate, token_weight, text


@triton.jit
def logical_of(ids, logical):
    """Experts of ids, -1 of -1; `logical` None: ids are experts."""
    if logical is None:
        return ids
    else:
        return tl.load(logical + ids, mask=ids >= 0, other=-1)


@triton.jit
def store_before(totals, base, n, before, num_blocks, BLOCK: tl.constexpr):
    """base[n, block] = before + the sum of totals[n] over the blocks in front, in steps of BLOCK."""
    so_far = tl.full([], 0, tl.int32) + before
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < num_blocks
        place = n * num_blocks + block
        units = tl.load(totals + place, mask=inside, other=0)
        tl.store(base + place, so_far + tl.cumsum(units, 0) - units, mask=inside)
        so_far += tl.sum(units)
