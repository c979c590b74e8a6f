// An assignment's cell, and the four sums behind the cells.
#pragma once
#include <cuda_runtime.h>

#include "assignments.cuh"
#include "launch.cuh"
#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

__device__ __forceinline__ void add_to_cell(const LoadHistogramParams& p, const Slot& slot) {
  if (slot.expert < 0) return;
  const int row = slot.expert * 2 + (slot.text() ? 1 : 0);
  const int cell = row * num_buckets(p.in.policy.bucket_bits) + bucket_of_slot(p.in, slot);
  atomicAdd(p.histogram + cell, load_units(p.in.policy.load, slot.weight));
}

// The four sums of a warp in registers, then of the block, then one addition each.
struct Sums {
  unsigned all = 0, visual = 0, visual_weight = 0, weight = 0;

  __device__ __forceinline__ void add(const Slot& slot, bool leader, bool token_counts) {
    if (slot.expert >= 0) {
      all += 1;
      visual += slot.text() ? 0 : 1;
    }
    if (leader && token_counts) {
      const unsigned fixed = fixed_weight(slot.weight);
      weight += fixed;
      visual_weight += slot.text() ? 0 : fixed;
    }
  }

  // The whole block.
  __device__ __forceinline__ void flush(const LoadHistogramParams& p) const {
    const int64_t cells = static_cast<int64_t>(p.in.policy.num_experts) * 2 * num_buckets(p.in.policy.bucket_bits);
    __shared__ unsigned block[kNumSums];
    if (threadIdx.x < kNumSums) block[threadIdx.x] = 0;
    __syncthreads();
    const unsigned sums[kNumSums] = {all, visual, visual_weight, weight};
#pragma unroll
    for (int i = 0; i < kNumSums; ++i) {
      const unsigned sum = __reduce_add_sync(kFullMask, sums[i]);
      if (threadIdx.x % kWarp == 0) atomicAdd(&block[i], sum);
    }
    __syncthreads();
    if (threadIdx.x < kNumSums && block[threadIdx.x] != 0) {
      atomicAdd(reinterpret_cast<unsigned*>(p.histogram + cells) + threadIdx.x, block[threadIdx.x]);
    }
  }
};

}  // namespace macs::cuda
