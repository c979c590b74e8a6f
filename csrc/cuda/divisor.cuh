// Division by a number that the host knows.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace macs::cuda {

// Divides numbers by one that the host knows, where their product is below 2^32: one multiplication instead of twenty
// instructions.
struct Divisor {
  uint32_t magic;  // 2^32 over the divisor, rounded up; 0: by one

  static Divisor of(int divisor) {
    return {divisor == 1 ? 0u : static_cast<uint32_t>((0xffffffffull + divisor) / divisor)};
  }
  __device__ __forceinline__ int divide(int x) const {
    return magic == 0 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), magic));
  }
};

}  // namespace macs::cuda
