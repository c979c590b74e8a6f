// The own share of a group's headroom (docs/design/method.md 5): what a rank may re-route to bounds that are not exceeded.
//
// Bounds form pools: those of a rank where assignments stay on theirs, else all. Of a pool's headroom a rank gets the part
// that it has of the units at the levels that the pool's cuts keep in full or in part.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "macs/params.h"
#include "threshold.cuh"

namespace macs::cuda {

__host__ __device__ inline int num_pools(const Policy& policy) {
  return policy.reroute == Reroute::kLocal ? policy.num_ranks : 1;
}

__device__ __forceinline__ int pool_of(const Policy& policy, int n) {
  if (policy.reroute != Reroute::kLocal) return 0;
  return policy.scope == Scope::kRank ? n : n / (policy.num_experts / policy.num_ranks);
}

// Of one bound. `pool`: what the cuts of its pool keep.
__device__ __forceinline__ int own_headroom(const Policy& policy, int64_t group_headroom, const Kept& pool) {
  if (policy.reroute == Reroute::kNone || pool.group == 0) return 0;
  if (pool.own == pool.group) return static_cast<int>(group_headroom);
  return static_cast<int>(static_cast<unsigned long long>(group_headroom) * pool.own / pool.group);
}

// One warp: that of a pool's bounds [first, end).
__device__ __forceinline__ void warp_share_headroom(const Policy& policy, const RawCut* raw, int first, int end,
                                                    int* headroom) {
  const int lane = threadIdx.x % kWarp;
  unsigned group = 0, own = 0;  // all units of a group fit into 31 bits
#pragma unroll 1
  for (int n = first + lane; n < end; n += kWarp) {
    const bool cut = raw[n].cut.x >= 0;
    group += cut ? static_cast<unsigned>(raw[n].kept.group) : 0;
    own += cut ? static_cast<unsigned>(raw[n].kept.own) : 0;
  }
  const Kept kept = {__reduce_add_sync(kFullMask, group), __reduce_add_sync(kFullMask, own)};
#pragma unroll 1
  for (int n = first + lane; n < end; n += kWarp) headroom[n] = own_headroom(policy, raw[n].cut.z, kept);
}

// A whole block, a warp per pool, before a barrier.
__device__ __forceinline__ void block_share_headroom(const Policy& policy, const RawCut* raw, int num_bounds,
                                                     int* headroom) {
  const int pools = num_pools(policy), size = pools == 1 ? num_bounds : num_bounds / pools;
#pragma unroll 1
  for (int pool = threadIdx.x / kWarp; pool < pools; pool += blockDim.x / kWarp) {
    warp_share_headroom(policy, raw, pool * size, (pool + 1) * size, headroom);
  }
}

}  // namespace macs::cuda
