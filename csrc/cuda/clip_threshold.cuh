// The cuts as a device function of a block, for clip_threshold's own kernel and for the fused threshold_apply.
//
// Real arithmetic is IEEE double with every rounding spelled out (__dmul_rn and friends are never contracted), so that
// the bounds equal the CPU's to the bit; all else is integer.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.cuh"
#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

constexpr int kMaxPools = 1024;  // ranks

__host__ __device__ inline int num_bounds(Scope scope, int num_experts, int num_ranks) {
  return scope == Scope::kExpert ? num_experts : num_ranks;
}

// Own and group units at the levels that a cut bound keeps in full or in part.
struct Kept {
  unsigned long long group, own;
};

struct Cut {
  int level, quota;
  int64_t group_room;
  Kept kept;
};

struct Cell {
  int group, own;
};

__device__ __forceinline__ int warp_inclusive_sum(int x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kFullMask, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

// One warp: where `bound` cuts the levels, the highest first. `at(l)` yields the units at level l.
template <class At>
__device__ Cut warp_find_cut(const At& at, int num_levels, int bound) {
  const int lane = threadIdx.x % kWarp;
  const int share = (num_levels + kWarp - 1) / kWarp;
  const int low = min(lane * share, num_levels), high = min(low + share, num_levels);
  Cell sum = {0, 0};
  for (int l = low; l < high; ++l) {
    const Cell cell = at(l);
    sum.group += cell.group, sum.own += cell.own;
  }
  const Cell upto = {warp_inclusive_sum(sum.group), warp_inclusive_sum(sum.own)};
  const int total = __shfl_sync(kFullMask, upto.group, kWarp - 1);
  if (total <= bound) return {-1, 0, static_cast<int64_t>(bound) - total, {0, 0}};
  int above = total - upto.group;  // units over this lane's levels
  const bool here = above <= bound && above + sum.group > bound;
  Cut cut = {0, 0, 0, {0, 0}};
  if (here) {
    Cell cell = at(high - 1);
    int level = high - 1, own_from = upto.own;
    while (above + cell.group <= bound) {
      above += cell.group, own_from -= cell.own;
      cell = at(--level);
    }
    const int64_t quota = static_cast<int64_t>(bound - above) * cell.own / cell.group;
    cut = {level, static_cast<int>(quota), 0, {static_cast<unsigned>(total - above), static_cast<unsigned>(own_from)}};
  }
  const int source = __ffs(__ballot_sync(kFullMask, here)) - 1;
  cut.level = __shfl_sync(kFullMask, cut.level, source);
  cut.quota = __shfl_sync(kFullMask, cut.quota, source);
  cut.kept.group = __shfl_sync(kFullMask, cut.kept.group, source);
  cut.kept.own = __shfl_sync(kFullMask, cut.kept.own, source);
  return cut;
}

struct Capacity {
  double base, visual_share, units;

  __device__ __forceinline__ explicit Capacity(const ClipThresholdParams& p, const int32_t* sums) {
    const double all = sums[0], weight = sums[3];
    visual_share = sums[3] == 0 ? 0.5 : __ddiv_rn(static_cast<double>(sums[2]), weight);
    base = __ddiv_rn(__dmul_rn(p.gamma, all), static_cast<double>(p.num_experts));
    units = static_cast<double>(units_per_row(p.load));
  }
  __device__ __forceinline__ double of_expert(const ClipThresholdParams& p, int expert) const {
    if (isinf(p.gamma)) return p.gamma;
    const double towards = __dmul_rn(p.rho, static_cast<double>(p.modality[expert]));
    const double lean = __dmul_rn(towards, __dsub_rn(visual_share, 0.5));
    const double scaled = __dmul_rn(base, __dadd_rn(1.0, lean));
    return scaled > p.c_min ? scaled : p.c_min;
  }
  static __device__ __forceinline__ int bound_of(double gamma, double rows, double units) {
    const double bound = floor(__dmul_rn(rows, units));
    if (isinf(gamma) || bound >= 2147483647.0) return 2147483647;
    return bound > 0.0 ? static_cast<int>(bound) : 0;
  }
};

// Levels of one rank's bound, group's and own, and the shifts of its experts; a multiple of 16.
__host__ __device__ inline size_t threshold_shared_bytes(const ClipThresholdParams& p) {
  const size_t ints = 4 * num_buckets(p.bucket_bits) + p.num_experts / p.num_ranks;
  return (ints * sizeof(int) + 15) / 16 * 16;
}

// One warp: the shift of an expert, and what falls on its lowest levels (text and visual) into `levels`.
__device__ __forceinline__ int expert_shift(const ClipThresholdParams& p, const Capacity& capacity, int expert,
                                            int* group_levels, int* own_levels) {
  const int lane = threadIdx.x % kWarp, buckets = num_buckets(p.bucket_bits);
  const int32_t* group = p.group + static_cast<int64_t>(expert) * 2 * buckets;
  const int32_t* own = p.own + static_cast<int64_t>(expert) * 2 * buckets;
  int shift = 0;
  if (p.alpha > 0.0) {
    int load = 0;
#pragma unroll 8
    for (int cell = lane; cell < 2 * buckets; cell += kWarp) load += group[cell];
    const double most = capacity.of_expert(p, expert);
    load = __reduce_add_sync(kFullMask, load);
    const double rows = static_cast<double>(load) * (p.load == Load::kRows ? 1.0 : 1.0 / kWeightOne);  // exact
    shift = pressure_shift(rows, most, p.alpha, p.bucket_bits);
  }
  for (int text = 0; text < 2; ++text) {
    Cell lowest = {0, 0};
#pragma unroll 4
    for (int bucket = lane; bucket < buckets; bucket += kWarp) {  // loads first, all at once; most fall away
      const Cell cell = {group[text * buckets + bucket], own[text * buckets + bucket]};
      lowest.group += bucket <= shift ? cell.group : 0, lowest.own += bucket <= shift ? cell.own : 0;
    }
    lowest.group = __reduce_add_sync(kFullMask, lowest.group);
    lowest.own = __reduce_add_sync(kFullMask, lowest.own);
    const int level = text != 0 && p.protect_text ? buckets : 0;
    if (lane == 0) atomicAdd(&group_levels[level], lowest.group), atomicAdd(&own_levels[level], lowest.own);
  }
  if (lane == 0) p.shift[expert] = shift;
  return shift;
}

// Levels of one rank's bound (block): first the shifts of its experts, then every level above the lowest gathers its
// cells, one expert after the other.
__device__ inline void gather_rank_levels(const ClipThresholdParams& p, const Capacity& capacity, int rank,
                                          int* group_levels, int* own_levels, int* shifts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int buckets = num_buckets(p.bucket_bits), local = p.num_experts / p.num_ranks;
  const bool alone = p.own == p.group;  // without an exchange: read once
  for (int l = threadIdx.x; l < 2 * buckets; l += blockDim.x) group_levels[l] = own_levels[l] = 0;
  __syncthreads();
  for (int i = warp; i < local; i += num_warps) {
    const int shift = expert_shift(p, capacity, rank * local + i, group_levels, own_levels);
    if (lane == 0) shifts[i] = shift;
  }
  __syncthreads();
  // Experts are dealt to as many threads per level as there are.
  const int parts = max(1, static_cast<int>(blockDim.x) / (2 * buckets));
  const int part = threadIdx.x / (2 * buckets);
  const int first = parts > 1 ? threadIdx.x % (2 * buckets) : threadIdx.x;
  for (int l = first; l < 2 * buckets && part < parts; l += parts > 1 ? 2 * buckets : blockDim.x) {
    const int text = l / buckets, e = l % buckets;
    Cell sum = {0, 0};
#pragma unroll 8
    for (int i = part; i < local; i += parts) {
      const int bucket = e + shifts[i];
      const bool counts = e != 0 && bucket < buckets;
      const int cell = ((rank * local + i) * 2 + text) * buckets + min(bucket, buckets - 1);  // loaded in any case:
      const int group = p.group[cell], own = alone ? 0 : p.own[cell];                         // no branch in between
      sum.group += counts ? group : 0;
      sum.own += counts ? own : 0;
    }
    if (alone) sum.own = sum.group;
    const int level = e + (text != 0 && p.protect_text ? buckets : 0);
    if (sum.group != 0) atomicAdd(&group_levels[level], sum.group);
    if (sum.own != 0) atomicAdd(&own_levels[level], sum.own);
  }
  __syncthreads();
}

// Where a bound's losses and room are counted: with its rank, or all in one place.
__device__ __forceinline__ int pool_of(const ClipThresholdParams& p, int n) {
  if (p.reroute != Reroute::kLocal) return 0;
  return p.scope == Scope::kRank ? n : n / (p.num_experts / p.num_ranks);
}

// The own share of the group's room, given what the pool keeps.
__device__ __forceinline__ int room_share(const ClipThresholdParams& p, int64_t group_room, const Kept& pool) {
  if (p.reroute == Reroute::kNone || pool.group == 0) return 0;
  return static_cast<int>(static_cast<unsigned long long>(group_room) * pool.own / pool.group);
}

// This block's share of the bounds, round robin over `num_blocks`: `store(n, cut, bound)` is called by one thread each.
// Not inlined: its registers would weigh on the fused kernel's.
template <class Store>
__device__ __noinline__ void find_cuts(const ClipThresholdParams& p, unsigned char* shared, int block, int num_blocks,
                                       Store store) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int buckets = num_buckets(p.bucket_bits);
  int* const group_levels = reinterpret_cast<int*>(shared);
  int* const own_levels = group_levels + 2 * buckets;
  const int32_t* const sums = p.group + static_cast<int64_t>(p.num_experts) * 2 * buckets;
  const Capacity capacity(p, sums);
  if (p.scope == Scope::kRank) {
    const double rows = __ddiv_rn(__dmul_rn(p.gamma, static_cast<double>(sums[0])), static_cast<double>(p.num_ranks));
    const int bound = Capacity::bound_of(p.gamma, rows, capacity.units);
    for (int rank = block; rank < p.num_ranks; rank += num_blocks) {
      gather_rank_levels(p, capacity, rank, group_levels, own_levels, own_levels + 2 * buckets);
      if (warp == 0) {
        const Cut cut = warp_find_cut([&](int l) { return Cell{group_levels[l], own_levels[l]}; }, 2 * buckets, bound);
        if (lane == 0) store(rank, cut, bound);
      }
      __syncthreads();
    }
    return;
  }
  for (int expert = warp * num_blocks + block; expert < p.num_experts; expert += num_warps * num_blocks) {
    const int32_t* group = p.group + static_cast<int64_t>(expert) * 2 * buckets;
    const int32_t* own = p.own + static_cast<int64_t>(expert) * 2 * buckets;
    const int bound = Capacity::bound_of(p.gamma, capacity.of_expert(p, expert), capacity.units);
    const auto apart = [&](int l) { return Cell{group[l], own[l]}; };
    const auto together = [&](int l) { return Cell{group[l] + group[buckets + l], own[l] + own[buckets + l]}; };
    const Cut cut = p.protect_text ? warp_find_cut(apart, 2 * buckets, bound) : warp_find_cut(together, buckets, bound);
    if (lane == 0) {
      p.shift[expert] = 0;
      store(expert, cut, bound);
    }
  }
}

}  // namespace macs::cuda
