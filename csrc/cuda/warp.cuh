// What a whole warp works out together.
#pragma once
#include <cuda_runtime.h>

#include "launch.cuh"

namespace macs::cuda {

__device__ __forceinline__ int warp_inclusive_sum(int x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kFullMask, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

}  // namespace macs::cuda
