// The rank that a block plays for, near at hand.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "macs/fused.h"

namespace macs::cuda {

// All threads: the description of the block's rank into shared memory. Where it comes from is known only to the launch (its
// parameters, or an array of all ranks), so that everybody who read a field there would wait for memory, every time.
template <class Params>
__device__ __forceinline__ const FusedRank& describe_rank(const Params& p, FusedRank& here) {
  constexpr unsigned kWords = sizeof(FusedRank) / sizeof(uint32_t);
  uint32_t* const words = reinterpret_cast<uint32_t*>(&here);
  if (threadIdx.x < kWords) {
    if (p.many == nullptr) {
      words[threadIdx.x] = reinterpret_cast<const uint32_t*>(&p.one)[threadIdx.x];
    } else {
      words[threadIdx.x] = __ldg(reinterpret_cast<const uint32_t*>(p.many + blockIdx.y) + threadIdx.x);
    }
  }
  __syncthreads();
  return here;
}

}  // namespace macs::cuda
