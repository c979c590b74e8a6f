// Where bounds cut (docs/design/method.md 3 and 4): bounds, the shift of an expert over its capacity, cut level and own quota.
//
// A block finds the cuts of its share of the bounds out of histograms, for clip_threshold and threshold_apply alike. The fused
// dispatch has no histograms: it counts the assignments of exceeded bounds (fused_cut.cuh), and shares the arithmetic.
//
// Real arithmetic is IEEE double with every rounding spelled out (__dmul_rn and friends are never contracted), so that
// the bounds equal the CPU's to the bit; all else is integer.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "../warp.cuh"
#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

// Own and group units at the levels that a cut bound keeps in full or in part.
struct Kept {
  unsigned long long group, own;
};

struct Cut {
  int level, quota;
  int64_t group_headroom;
  Kept kept;
};

// A bound's cut before the headroom is shared out (headroom.cuh).
struct alignas(32) RawCut {
  int4 cut;  // level, quota, headroom of the group, bound
  Kept kept;

  static __device__ __forceinline__ RawCut of(const Cut& cut, int bound) {
    return {make_int4(cut.level, cut.quota, static_cast<int>(cut.group_headroom), bound), cut.kept};
  }
};

// The own part of the units that the group keeps at the cut level. group, own: units at it.
__device__ __forceinline__ int own_quota(int64_t kept, int group, int own) {
  return static_cast<int>(own == group ? kept : kept * own / group);
}

struct Cell {
  int group, own;
};

// Units per level of one bound, in shared memory. Without an exchange `own` is `group`.
struct Levels {
  int *group, *own;
};

// One warp: where `bound` cuts the levels, the highest first. A lane takes up to kShare levels (their number / 32).
template <int kShare>
__device__ __forceinline__ Cut warp_find_cut(const Levels& levels, int num_levels, int bound) {
  const int lane = threadIdx.x % kWarp, share = num_levels / kWarp, low = lane * share;
  int group[kShare], own[kShare];
  Cell sum = {0, 0};
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    group[i] = i < share ? levels.group[low + i] : 0;
    sum.group += group[i];
  }
  const bool alone = levels.own == levels.group;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    own[i] = group[i];
    if (!alone) own[i] = i < share ? levels.own[low + i] : 0;
    sum.own += own[i];
  }
  Cell upto = {warp_inclusive_sum(sum.group), 0};
  upto.own = alone ? upto.group : warp_inclusive_sum(sum.own);
  const int total = __shfl_sync(kFullMask, upto.group, kWarp - 1);
  if (total <= bound) return {-1, 0, static_cast<int64_t>(bound) - total, {0, 0}};
  int above = total - upto.group;  // units over this lane's levels, then over those passed
  bool here = false;
  Cut cut = {0, 0, 0, {0, 0}};
  if (above <= bound && above + sum.group > bound) {
    Cell at = {0, 0};
#pragma unroll
    for (int i = kShare - 1; i >= 0; --i) {
      if (!here && above + group[i] > bound) here = true, at = {group[i], own[i]}, cut.level = low + i;
      if (!here) above += group[i], upto.own -= own[i];
    }
    cut.quota = own_quota(bound - above, at.group, at.own);
    cut.kept = {static_cast<unsigned>(total - above), static_cast<unsigned>(upto.own)};
  }
  const int source = __ffs(__ballot_sync(kFullMask, here)) - 1;
  cut.level = __shfl_sync(kFullMask, cut.level, source);
  cut.quota = __shfl_sync(kFullMask, cut.quota, source);
  cut.kept.group = __shfl_sync(kFullMask, static_cast<unsigned>(cut.kept.group), source);
  cut.kept.own = __shfl_sync(kFullMask, static_cast<unsigned>(cut.kept.own), source);
  return cut;
}

// Correctly rounded, as a division; by a power of two it is a multiplication.
__device__ __forceinline__ double divide(double x, int n) {
  if ((n & (n - 1)) == 0) return __dmul_rn(x, __hiloint2double((1024 - __ffs(n)) << 20, 0));
  return __ddiv_rn(x, static_cast<double>(n));
}

struct Capacity {
  double all, base, visual_share, units;  // base, bound: rows; units: per row

  // sums: N, N_visual, W_visual, W of the group. `mix`: the last two are asked for.
  __device__ __forceinline__ Capacity(const ClipThresholdParams& p, const int4& sums, bool mix = true) {
    all = sums.x;
    const bool even = !mix || p.policy.rho == 0.0 || sums.w == 0;
    visual_share = even ? 0.5 : __ddiv_rn(static_cast<double>(sums.z), static_cast<double>(sums.w));
    base = divide(__dmul_rn(p.policy.gamma, all), p.policy.num_experts);
    units = static_cast<double>(units_per_row(p.policy.load));
  }
  __device__ __forceinline__ double of_expert(const ClipThresholdParams& p, int modality) const {
    if (isinf(p.policy.gamma)) return p.policy.gamma;
    const double towards = __dmul_rn(p.policy.rho, static_cast<double>(modality));
    const double lean = __dmul_rn(towards, __dsub_rn(visual_share, 0.5));
    const double scaled = __dmul_rn(base, __dadd_rn(1.0, lean));
    return scaled > p.policy.c_min ? scaled : p.policy.c_min;
  }
  __device__ __forceinline__ int of_rank(const ClipThresholdParams& p) const {
    return bound_of(p.policy.gamma, divide(__dmul_rn(p.policy.gamma, all), p.policy.num_ranks), units);
  }
  static __device__ __forceinline__ int bound_of(double gamma, double rows, double units) {
    const double bound = floor(__dmul_rn(rows, units));
    if (isinf(gamma) || bound >= 2147483647.0) return 2147483647;
    return bound > 0.0 ? static_cast<int>(bound) : 0;
  }
};

// Levels of as many bounds as a block works on at once: one (scope=rank), or one per warp.
__host__ __device__ inline size_t threshold_shared_bytes(const ClipThresholdParams& p, int num_warps) {
  const size_t bounds = p.policy.scope == Scope::kRank ? 1 : num_warps;
  return bounds * 4 * num_buckets(p.policy.bucket_bits) * sizeof(int);
}

__device__ __forceinline__ Levels levels_of(const ClipThresholdParams& p, int* shared, int i) {
  const int num_levels = 2 * num_buckets(p.policy.bucket_bits);
  int* const group = shared + i * 2 * num_levels;
  return {group, p.own == p.group ? group : group + num_levels};
}

// Before find_cuts, and before a barrier of the block.
__device__ __forceinline__ void clear_levels(const ClipThresholdParams& p, int* shared) {
  const int words = static_cast<int>(threshold_shared_bytes(p, blockDim.x / kWarp) / sizeof(int));
#pragma unroll 1
  for (int i = threadIdx.x; i < words; i += blockDim.x) shared[i] = 0;
}

template <bool kAligned>
__device__ __forceinline__ int4 load_four(const int32_t* cells) {
  if (kAligned) return __ldcg(reinterpret_cast<const int4*>(cells));
  return make_int4(__ldcg(cells), __ldcg(cells + 1), __ldcg(cells + 2), __ldcg(cells + 3));
}

// The cells of one expert, spread over a warp: four neighbours per lane out of each 128. kQuads: 2 up to B = 128, else 4.
template <int kQuads, bool kAligned>
struct ExpertCells {
  int expert, modality;
  int4 group[kQuads], own[kQuads];

  static __device__ __forceinline__ int first_of(int quad) {
    return (quad * kWarp + static_cast<int>(threadIdx.x) % kWarp) * 4;
  }

  // No expert at all: `of` = E.
  __device__ __forceinline__ ExpertCells(const ClipThresholdParams& p, int of) : expert(of), modality(0) {
    const int cells = 2 * num_buckets(p.policy.bucket_bits);
    if (expert < p.policy.num_experts) modality = __ldg(p.modality + expert);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      group[i] = own[i] = make_int4(0, 0, 0, 0);
      if (expert >= p.policy.num_experts || first_of(i) >= cells) continue;
      const int at = expert * cells + first_of(i);
      group[i] = load_four<kAligned>(p.group + at);
      if (p.own != p.group) own[i] = load_four<kAligned>(p.own + at);
    }
  }

  __device__ __forceinline__ int load() const {
    int units = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) units += group[i].x + group[i].y + group[i].z + group[i].w;
    return __reduce_add_sync(kFullMask, units);
  }

  __device__ __forceinline__ void add_to(const ClipThresholdParams& p, const Levels& levels, int shift) const {
    add(p, group, levels.group, shift);
    if (levels.own != levels.group) add(p, own, levels.own, shift);
  }

 private:
  // Most of a shifted expert's cells fall on the lowest level: added up before.
  static __device__ __forceinline__ void add(const ClipThresholdParams& p, const int4 (&quads)[kQuads], int* levels,
                                             int shift) {
    const int buckets = num_buckets(p.policy.bucket_bits), top = p.policy.protect_text ? buckets : 0;
    int visual = 0, text = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const bool is_text = first_of(i) >= buckets;
      const int e = first_of(i) - (is_text ? buckets : 0) - shift;
      int* const target = levels + (is_text ? top : 0) + e;
      const int units[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
      int lowest = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        lowest += e + j < 0 ? units[j] : 0;
        if (e + j >= 0 && units[j] != 0) atomicAdd(target + j, units[j]);
      }
      visual += is_text ? 0 : lowest, text += is_text ? lowest : 0;
    }
    if (shift == 0) return;
    visual = __reduce_add_sync(kFullMask, visual), text = __reduce_add_sync(kFullMask, text);
    if (threadIdx.x % kWarp == 0 && visual != 0) atomicAdd(levels, visual);
    if (threadIdx.x % kWarp == 0 && text != 0) atomicAdd(levels + top, text);
  }
};

template <class Cells>
__device__ __forceinline__ int expert_shift(const ClipThresholdParams& p, const Capacity& capacity, const Cells& cells) {
  if (p.policy.scope != Scope::kRank || !(p.policy.alpha > 0.0)) return 0;
  const bool in_rows = p.policy.load == Load::kRows;
  const double rows = static_cast<double>(cells.load()) * (in_rows ? 1.0 : 1.0 / kWeightOne);  // exact
  return pressure_shift(rows, capacity.of_expert(p, cells.modality), p.policy.alpha, p.policy.bucket_bits);
}

// This block's share of the bounds, round robin over `num_blocks`: a rank at a time, or an expert per warp. Levels are
// cleared before. Whole warps call `sink.shift(expert, shift)` for every expert and `sink.cut(n, cut, bound)` for every
// bound. kAligned: the histograms, to 16 bytes. per_rank: experts.
template <int kQuads, bool kAligned, class Sink>
__device__ __forceinline__ void find_cuts_of(const ClipThresholdParams& p, int per_rank, int* shared, int block,
                                             int num_blocks, const Sink& sink) {
  using Cells = ExpertCells<kQuads, kAligned>;
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int num_levels = 2 * num_buckets(p.policy.bucket_bits);
  const bool by_rank = p.policy.scope == Scope::kRank;
  const int experts = p.policy.num_experts, together = by_rank ? per_rank : num_warps;
  const Levels levels = levels_of(p, shared, by_rank ? 0 : warp);
  int rank = block;
  for (int first = block * together; first < experts; first += num_blocks * together, rank += num_blocks) {
    const int end = min(first + together, experts);
    Cells next(p, first + warp < end ? first + warp : experts);
    const Capacity capacity(p, load_four<kAligned>(p.group + experts * num_levels));
    int bound = capacity.of_rank(p);
    for (int expert = first + warp; expert < end; expert += num_warps) {
      const Cells cells = next;
      next = Cells(p, expert + num_warps < end ? expert + num_warps : experts);
      if (!by_rank) bound = Capacity::bound_of(p.policy.gamma, capacity.of_expert(p, cells.modality), capacity.units);
      const int shift = expert_shift(p, capacity, cells);
      sink.shift(expert, shift);
      cells.add_to(p, levels, shift);
    }
    __syncthreads();
    if (by_rank ? warp == 0 : first + warp < end) {
      sink.cut(by_rank ? rank : first + warp, warp_find_cut<4 * kQuads>(levels, num_levels, bound), bound);
    }
    if (first + num_blocks * together < experts) {
      __syncthreads();
      clear_levels(p, shared);
      __syncthreads();
    }
  }
}

__host__ __device__ inline bool aligned_histograms(const ClipThresholdParams& p) {
  return (reinterpret_cast<uintptr_t>(p.own) | reinterpret_cast<uintptr_t>(p.group)) % sizeof(int4) == 0;
}

template <class Sink>
__device__ __forceinline__ void find_cuts(const ClipThresholdParams& p, int per_rank, int* shared, int block,
                                          int num_blocks, const Sink& sink) {
  if (aligned_histograms(p) && num_buckets(p.policy.bucket_bits) <= 128) {
    find_cuts_of<2, true>(p, per_rank, shared, block, num_blocks, sink);
  } else {
    find_cuts_of<4, false>(p, per_rank, shared, block, num_blocks, sink);
  }
}

}  // namespace macs::cuda
