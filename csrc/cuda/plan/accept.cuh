// Places in (token, slot) order, up to a limit: the quota of a cut (docs/design/method.md 4), and the headroom that proposals
// compete for (5).
//
// Two passes. The first adds up units per (warp, bound), which `scan_warps` turns into those of the warps before; the
// second hands the places out, a warp's 32 assignments at a time.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "../warp.cuh"

namespace macs::cuda {

// A whole block, between two of its barriers. `units`: [warps, NB], `stride` apart, of each warp; then of the warps before
// it. One lane of each bound calls found(n, units of all warps).
template <class Found>
__device__ __forceinline__ void scan_warps(int* units, int stride, int num_bounds, Found found) {
  const int lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
#pragma unroll 1
  for (int n = threadIdx.x / kWarp; n < num_bounds; n += num_warps) {
    int* const mine = units + lane * stride + n;
    const int here = lane < num_warps ? *mine : 0;
    const int upto = warp_inclusive_sum(here);
    if (lane < num_warps) *mine = upto - here;
    if (lane == kWarp - 1) found(n, upto);
  }
}

// One warp, in lane order: whether the sum of the bound's units, own included, stays within its limit. `running`: [NB] of
// this warp, what the bounds have been asked for so far.
__device__ __forceinline__ bool accept_in_order(bool pending, int bound, int units, bool rows, int* running,
                                                int64_t limit) {
  const unsigned active = __ballot_sync(kFullMask, pending);
  if (active == 0) return false;
  const int lane = threadIdx.x % kWarp;
  bool accepted = false;
  if (pending) {
    const unsigned peers = __match_any_sync(active, bound);
    const unsigned lower = peers & ((1u << lane) - 1u);
    int sum = units;
    if (rows) {
      sum += __popc(lower);
    } else {
#pragma unroll 1
      for (unsigned left = active; left != 0; left &= left - 1) {
        const int source = __ffs(left) - 1;
        const int other = __shfl_sync(active, units, source);
        if ((lower >> source & 1u) != 0) sum += other;
      }
    }
    sum += running[bound];
    __syncwarp(active);
    if (lane == kWarp - 1 - __clz(peers)) running[bound] = sum;
    accepted = sum <= limit;
  }
  __syncwarp();
  return accepted;
}

}  // namespace macs::cuda
