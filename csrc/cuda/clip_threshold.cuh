// clip_threshold as a device function of one cluster, for its own kernel and for the fused threshold_apply.
//
// Real arithmetic is IEEE double with every rounding spelled out (__dmul_rn and friends are never contracted), so that
// the bounds equal the CPU's to the bit; all else is integer.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.cuh"
#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

namespace cg = cooperative_groups;

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
    const double lean = __dmul_rn(__dmul_rn(p.rho, static_cast<double>(p.modality[expert])), __dsub_rn(visual_share, 0.5));
    const double scaled = __dmul_rn(base, __dadd_rn(1.0, lean));
    return scaled > p.c_min ? scaled : p.c_min;
  }
  static __device__ __forceinline__ int bound_of(double gamma, double rows, double units) {
    const double bound = floor(__dmul_rn(rows, units));
    if (isinf(gamma) || bound >= 2147483647.0) return 2147483647;
    return bound > 0.0 ? static_cast<int>(bound) : 0;
  }
};

__host__ __device__ inline size_t threshold_shared_bytes(const ClipThresholdParams& p) {
  // kept of the ranks (own block's, then the cluster's), levels of one rank
  return 2 * sizeof(Kept) * p.num_ranks + sizeof(Cell) * 2 * num_buckets(p.bucket_bits);
}

// Levels of one rank's bound into `levels` (block), after the shifts of its experts.
__device__ inline void gather_rank_levels(const ClipThresholdParams& p, const Capacity& capacity, int rank, Cell* levels) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int buckets = num_buckets(p.bucket_bits), local = p.num_experts / p.num_ranks;
  for (int l = threadIdx.x; l < 2 * buckets; l += blockDim.x) levels[l] = {0, 0};
  __syncthreads();
  for (int expert = rank * local + warp; expert < (rank + 1) * local; expert += num_warps) {
    const int32_t* group = p.group + static_cast<int64_t>(expert) * 2 * buckets;
    const int32_t* own = p.own + static_cast<int64_t>(expert) * 2 * buckets;
    int shift = 0;
    if (p.alpha > 0.0) {
      int load = 0;
#pragma unroll 8
      for (int cell = lane; cell < 2 * buckets; cell += kWarp) load += group[cell];
      load = __reduce_add_sync(kFullMask, load);
      const double rows = __ddiv_rn(static_cast<double>(load), capacity.units);
      shift = pressure_shift(rows, capacity.of_expert(p, expert), p.alpha, p.bucket_bits);
    }
    if (lane == 0) p.shift[expert] = shift;
    for (int text = 0; text < 2; ++text) {
      const int floor_level = text != 0 && p.protect_text ? buckets : 0;
      Cell lowest = {0, 0};
#pragma unroll 4
      for (int bucket = lane; bucket < buckets; bucket += kWarp) {
        const Cell cell = {group[text * buckets + bucket], own[text * buckets + bucket]};
        if (bucket <= shift) {  // all of these end on one level: add them up in the warp
          lowest.group += cell.group, lowest.own += cell.own;
        } else {
          if (cell.group != 0) atomicAdd(&levels[floor_level + bucket - shift].group, cell.group);
          if (cell.own != 0) atomicAdd(&levels[floor_level + bucket - shift].own, cell.own);
        }
      }
      lowest.group = __reduce_add_sync(kFullMask, lowest.group);
      lowest.own = __reduce_add_sync(kFullMask, lowest.own);
      if (lane == 0) {
        atomicAdd(&levels[floor_level].group, lowest.group);
        atomicAdd(&levels[floor_level].own, lowest.own);
      }
    }
  }
  __syncthreads();
}

// One lane: store a bound's cut, and count what it keeps for the rank (or, at index 0, for all).
__device__ __forceinline__ void store_cut(const ClipThresholdParams& p, int n, const Cut& cut, int bound, Kept* kept) {
  reinterpret_cast<int4*>(p.cut)[n] = make_int4(cut.level, cut.quota, static_cast<int>(cut.group_room), bound);
  if (cut.level < 0) return;
  const int rank = p.scope == Scope::kRank ? n : n / (p.num_experts / p.num_ranks);
  Kept& target = kept[p.reroute == Reroute::kLocal ? rank : 0];
  atomicAdd(&target.group, cut.kept.group);
  atomicAdd(&target.own, cut.kept.own);
}

// One thread per bound of this block: the group's room becomes the own share of it.
__device__ __forceinline__ void share_room(const ClipThresholdParams& p, int n, const Kept* kept) {
  int4* cut = reinterpret_cast<int4*>(p.cut) + n;
  const int rank = p.scope == Scope::kRank ? n : n / (p.num_experts / p.num_ranks);
  const Kept& total = kept[p.reroute == Reroute::kLocal ? rank : 0];
  const unsigned long long room = static_cast<unsigned>(cut->z);
  cut->z = p.reroute == Reroute::kNone || total.group == 0 ? 0 : static_cast<int>(room * total.own / total.group);
}

// The whole operator; every thread of the cluster takes part. Ends before the last cluster barrier of the caller:
// other blocks may still read this block's `shared`, and `shift` and `cut` are visible to the cluster only after it.
static __device__ __noinline__ void cluster_clip_threshold(const ClipThresholdParams& p, unsigned char* shared) {
  const cg::cluster_group cluster = cg::this_cluster();
  const int block = cluster.block_rank(), num_blocks = cluster.num_blocks();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int buckets = num_buckets(p.bucket_bits);
  Kept* const kept = reinterpret_cast<Kept*>(shared);
  Kept* const kept_by_all = kept + p.num_ranks;
  Cell* const levels = reinterpret_cast<Cell*>(kept_by_all + p.num_ranks);
  for (int r = threadIdx.x; r < p.num_ranks; r += blockDim.x) kept[r] = {0, 0};
  const Capacity capacity(p, p.group + static_cast<int64_t>(p.num_experts) * 2 * buckets);
  __syncthreads();
  const int bounds = num_bounds(p.scope, p.num_experts, p.num_ranks);
  const int step = p.scope == Scope::kRank ? num_blocks : num_blocks * num_warps;
  const int first = p.scope == Scope::kRank ? block : warp * num_blocks + block;
  if (p.scope == Scope::kRank) {
    const double all = p.group[static_cast<int64_t>(p.num_experts) * 2 * buckets];
    const double rows = __ddiv_rn(__dmul_rn(p.gamma, all), static_cast<double>(p.num_ranks));
    const int bound = Capacity::bound_of(p.gamma, rows, capacity.units);
    for (int rank = first; rank < bounds; rank += step) {
      gather_rank_levels(p, capacity, rank, levels);
      if (warp == 0) {
        const Cut cut = warp_find_cut([&](int l) { return levels[l]; }, 2 * buckets, bound);
        if (lane == 0) store_cut(p, rank, cut, bound, kept);
      }
      __syncthreads();
    }
  } else {
    for (int expert = first; expert < bounds; expert += step) {
      const int32_t* group = p.group + static_cast<int64_t>(expert) * 2 * buckets;
      const int32_t* own = p.own + static_cast<int64_t>(expert) * 2 * buckets;
      const int bound = Capacity::bound_of(p.gamma, capacity.of_expert(p, expert), capacity.units);
      const auto apart = [&](int l) { return Cell{group[l], own[l]}; };
      const auto together = [&](int l) { return Cell{group[l] + group[buckets + l], own[l] + own[buckets + l]}; };
      const Cut cut = p.protect_text ? warp_find_cut(apart, 2 * buckets, bound) : warp_find_cut(together, buckets, bound);
      if (lane == 0) {
        p.shift[expert] = 0;
        store_cut(p, expert, cut, bound, kept);
      }
    }
  }
  cluster.sync();
  for (int r = threadIdx.x; r < p.num_ranks; r += blockDim.x) {
    Kept sum = {0, 0};
    for (int b = 0; b < num_blocks; ++b) {
      const Kept other = *cluster.map_shared_rank(kept + r, b);
      sum.group += other.group, sum.own += other.own;
    }
    kept_by_all[r] = sum;
  }
  __syncthreads();
  if (p.scope == Scope::kRank ? threadIdx.x == 0 : lane == 0) {
    for (int n = first; n < bounds; n += step) share_room(p, n, kept_by_all);
  }
}

}  // namespace macs::cuda
