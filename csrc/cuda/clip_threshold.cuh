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

// Units per level of one bound, in shared memory. Without an exchange `own` is `group`.
struct Levels {
  int *group, *own;

  __device__ __forceinline__ Cell at(int level) const {
    const int units = group[level];
    return {units, own == group ? units : own[level]};
  }
};

// One warp: where `bound` cuts the levels, the highest first.
__device__ __forceinline__ Cut warp_find_cut(const Levels& levels, int num_levels, int bound) {
  const int lane = threadIdx.x % kWarp, share = num_levels / kWarp;  // num_levels: 32 or more, a power of two
  const int low = lane * share;
  Cell sum = {0, 0};
#pragma unroll 8
  for (int l = low; l < low + share; ++l) {
    const Cell cell = levels.at(l);
    sum.group += cell.group, sum.own += cell.own;
  }
  const Cell upto = {warp_inclusive_sum(sum.group), warp_inclusive_sum(sum.own)};
  const int total = __shfl_sync(kFullMask, upto.group, kWarp - 1);
  if (total <= bound) return {-1, 0, static_cast<int64_t>(bound) - total, {0, 0}};
  int above = total - upto.group;  // units over this lane's levels
  const bool here = above <= bound && above + sum.group > bound;
  Cut cut = {0, 0, 0, {0, 0}};
  if (here) {
    int level = low + share - 1, own_from = upto.own;
    Cell cell = levels.at(level);
    while (above + cell.group <= bound) {
      above += cell.group, own_from -= cell.own;
      cell = levels.at(--level);
    }
    const int remainder = bound - above;
    const int quota = cell.own == cell.group
                          ? remainder
                          : static_cast<int>(static_cast<int64_t>(remainder) * cell.own / cell.group);
    cut = {level, quota, 0, {static_cast<unsigned>(total - above), static_cast<unsigned>(own_from)}};
  }
  const int source = __ffs(__ballot_sync(kFullMask, here)) - 1;
  cut.level = __shfl_sync(kFullMask, cut.level, source);
  cut.quota = __shfl_sync(kFullMask, cut.quota, source);
  cut.kept.group = __shfl_sync(kFullMask, static_cast<unsigned>(cut.kept.group), source);
  cut.kept.own = __shfl_sync(kFullMask, static_cast<unsigned>(cut.kept.own), source);
  return cut;
}

struct Capacity {
  double all, base, visual_share, units;  // base, bound: rows; units: per row

  __device__ __forceinline__ explicit Capacity(const ClipThresholdParams& p, const int32_t* sums) {
    const int visual_weight = __ldcg(sums + 2), weight = __ldcg(sums + 3);
    all = __ldcg(sums);
    visual_share = weight == 0 ? 0.5 : __ddiv_rn(static_cast<double>(visual_weight), static_cast<double>(weight));
    base = __ddiv_rn(__dmul_rn(p.gamma, all), static_cast<double>(p.num_experts));
    units = static_cast<double>(units_per_row(p.load));
  }
  __device__ __forceinline__ double of_expert(const ClipThresholdParams& p, int modality) const {
    if (isinf(p.gamma)) return p.gamma;
    const double towards = __dmul_rn(p.rho, static_cast<double>(modality));
    const double lean = __dmul_rn(towards, __dsub_rn(visual_share, 0.5));
    const double scaled = __dmul_rn(base, __dadd_rn(1.0, lean));
    return scaled > p.c_min ? scaled : p.c_min;
  }
  __device__ __forceinline__ int of_rank(const ClipThresholdParams& p) const {
    return bound_of(p.gamma, __ddiv_rn(__dmul_rn(p.gamma, all), static_cast<double>(p.num_ranks)), units);
  }
  static __device__ __forceinline__ int bound_of(double gamma, double rows, double units) {
    const double bound = floor(__dmul_rn(rows, units));
    if (isinf(gamma) || bound >= 2147483647.0) return 2147483647;
    return bound > 0.0 ? static_cast<int>(bound) : 0;
  }
};

// Levels of as many bounds as a block works on at once: one (scope=rank), or one per warp.
__host__ __device__ inline size_t threshold_shared_bytes(const ClipThresholdParams& p, int num_warps) {
  const size_t bounds = p.scope == Scope::kRank ? 1 : num_warps;
  return bounds * 4 * num_buckets(p.bucket_bits) * sizeof(int);
}

__device__ __forceinline__ Levels levels_of(const ClipThresholdParams& p, int* shared, int i) {
  const int num_levels = 2 * num_buckets(p.bucket_bits);
  int* const group = shared + i * 2 * num_levels;
  return {group, p.own == p.group ? group : group + num_levels};
}

// Before find_cuts, and before a barrier of the block.
__device__ __forceinline__ void clear_levels(const ClipThresholdParams& p, int* shared) {
  const int words = static_cast<int>(threshold_shared_bytes(p, blockDim.x / kWarp) / sizeof(int));
  for (int i = threadIdx.x; i < words; i += blockDim.x) shared[i] = 0;
}

// Four neighbouring cells of an expert, all visual or all text.
struct Quad {
  int4 group, own;

  __device__ __forceinline__ int group_units() const { return group.x + group.y + group.z + group.w; }
};

constexpr int kQuads = 2;  // per lane in registers: all cells of an expert up to B = 128; more are read twice

__device__ __forceinline__ int4 load_quad(const int32_t* cells) {
  if (reinterpret_cast<uintptr_t>(cells) % sizeof(int4) == 0) return __ldcg(reinterpret_cast<const int4*>(cells));
  return make_int4(__ldcg(cells), __ldcg(cells + 1), __ldcg(cells + 2), __ldcg(cells + 3));
}

// `first`: of its four cells among the expert's 2 B.
__device__ __forceinline__ Quad load_quad(const ClipThresholdParams& p, int expert, int first) {
  const int cells = 2 * num_buckets(p.bucket_bits);
  Quad quad = {make_int4(0, 0, 0, 0), make_int4(0, 0, 0, 0)};
  if (expert >= p.num_experts || first >= cells) return quad;
  const int64_t at = static_cast<int64_t>(expert) * cells + first;
  quad.group = load_quad(p.group + at);
  if (p.own != p.group) quad.own = load_quad(p.own + at);
  return quad;
}

// The cells of one expert, spread over a warp.
struct ExpertCells {
  int expert, modality;
  Quad quads[kQuads];

  static __device__ __forceinline__ int first_of(int quad) {
    return (quad * kWarp + static_cast<int>(threadIdx.x) % kWarp) * 4;
  }
  static __device__ __forceinline__ int num_quads(const ClipThresholdParams& p) {
    return max(kQuads, 2 * num_buckets(p.bucket_bits) / (4 * kWarp));
  }
  __device__ __forceinline__ ExpertCells(const ClipThresholdParams& p, int of) : expert(of) {
    modality = expert < p.num_experts ? __ldg(p.modality + expert) : 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quads[i] = load_quad(p, expert, first_of(i));
  }
  __device__ __forceinline__ int load(const ClipThresholdParams& p) const {
    int units = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) units += quads[i].group_units();
    for (int i = kQuads; i < num_quads(p); ++i) units += load_quad(p, expert, first_of(i)).group_units();
    return __reduce_add_sync(kFullMask, units);
  }

  // Adds all cells to their levels. Most of a shifted expert's fall on the lowest one: added up before.
  __device__ __forceinline__ void add_to(const ClipThresholdParams& p, const Levels& levels, int shift) const {
    const int buckets = num_buckets(p.bucket_bits);
    Cell lowest[2] = {};  // visual, text
    const auto add = [&](const Quad& quad, int first) {
      const bool text = first >= buckets;
      const int top = text && p.protect_text ? buckets : 0;
      const int e = first - (text ? buckets : 0) - shift;
      const int group[4] = {quad.group.x, quad.group.y, quad.group.z, quad.group.w};
      const int own[4] = {quad.own.x, quad.own.y, quad.own.z, quad.own.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool low = e + i <= 0;
        if (text) {
          lowest[1].group += low ? group[i] : 0, lowest[1].own += low ? own[i] : 0;
        } else {
          lowest[0].group += low ? group[i] : 0, lowest[0].own += low ? own[i] : 0;
        }
        if (!low && group[i] != 0) atomicAdd(levels.group + top + e + i, group[i]);
        if (!low && own[i] != 0) atomicAdd(levels.own + top + e + i, own[i]);
      }
    };
#pragma unroll
    for (int i = 0; i < kQuads; ++i) add(quads[i], first_of(i));
    for (int i = kQuads; i < num_quads(p); ++i) {
      if (first_of(i) < 2 * buckets) add(load_quad(p, expert, first_of(i)), first_of(i));
    }
#pragma unroll
    for (int text = 0; text < 2; ++text) {
      const int level = text != 0 && p.protect_text ? buckets : 0;
      const int group = __reduce_add_sync(kFullMask, lowest[text].group);
      const int own = p.own == p.group ? 0 : __reduce_add_sync(kFullMask, lowest[text].own);
      if (threadIdx.x % kWarp == 0 && group != 0) atomicAdd(levels.group + level, group);
      if (threadIdx.x % kWarp == 0 && own != 0) atomicAdd(levels.own + level, own);
    }
  }
};

__device__ __forceinline__ int expert_shift(const ClipThresholdParams& p, const Capacity& capacity,
                                            const ExpertCells& cells) {
  if (p.scope != Scope::kRank || !(p.alpha > 0.0)) return 0;
  const double rows = static_cast<double>(cells.load(p)) * (p.load == Load::kRows ? 1.0 : 1.0 / kWeightOne);  // exact
  return pressure_shift(rows, capacity.of_expert(p, cells.modality), p.alpha, p.bucket_bits);
}

// Where a bound's losses and room are counted: with its rank, or all in one place.
__device__ __forceinline__ int pool_of(const ClipThresholdParams& p, int n) {
  if (p.reroute != Reroute::kLocal) return 0;
  return p.scope == Scope::kRank ? n : n / (p.num_experts / p.num_ranks);
}

// The own share of the group's room, given what the pool keeps.
__device__ __forceinline__ int room_share(const ClipThresholdParams& p, int64_t group_room, const Kept& pool) {
  if (p.reroute == Reroute::kNone || pool.group == 0) return 0;
  if (pool.own == pool.group) return static_cast<int>(group_room);
  return static_cast<int>(static_cast<unsigned long long>(group_room) * pool.own / pool.group);
}

// This block's share of the bounds, round robin over `num_blocks`; levels cleared before. Whole warps call
// `sink.shift(expert, shift)` for every expert and `sink.cut(n, cut, bound)` for every bound.
template <class Sink>
__device__ __forceinline__ void find_cuts(const ClipThresholdParams& p, int* shared, int block, int num_blocks,
                                          const Sink& sink) {
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp, num_levels = 2 * num_buckets(p.bucket_bits);
  const int local = p.num_experts / p.num_ranks;
  const int32_t* const sums = p.group + static_cast<int64_t>(p.num_experts) * num_levels;
  if (p.scope == Scope::kRank) {
    for (int rank = block; rank < p.num_ranks; rank += num_blocks) {
      const Levels levels = levels_of(p, shared, 0);
      ExpertCells next(p, warp < local ? rank * local + warp : p.num_experts);  // loads before the arithmetic
      const Capacity capacity(p, sums);
      const int bound = capacity.of_rank(p);
      for (int i = warp; i < local; i += num_warps) {
        const ExpertCells cells = next;
        next = ExpertCells(p, i + num_warps < local ? cells.expert + num_warps : p.num_experts);
        const int shift = expert_shift(p, capacity, cells);
        sink.shift(cells.expert, shift);
        cells.add_to(p, levels, shift);
      }
      __syncthreads();
      if (warp == 0) sink.cut(rank, warp_find_cut(levels, num_levels, bound), bound);
      if (rank + num_blocks < p.num_ranks) {
        __syncthreads();
        clear_levels(p, shared);
        __syncthreads();
      }
    }
    return;
  }
  const Levels levels = levels_of(p, shared, warp);
  for (int expert = warp * num_blocks + block; expert < p.num_experts; expert += num_warps * num_blocks) {
    const ExpertCells cells(p, expert);
    const Capacity capacity(p, sums);
    const int bound = Capacity::bound_of(p.gamma, capacity.of_expert(p, cells.modality), capacity.units);
    sink.shift(expert, 0);
    cells.add_to(p, levels, 0);
    __syncwarp();
    sink.cut(expert, warp_find_cut(levels, num_levels, bound), bound);
    __syncwarp();
    for (int l = threadIdx.x % kWarp; l < 2 * num_levels; l += kWarp) levels.group[l] = 0;
    __syncwarp();
  }
}

}  // namespace macs::cuda
