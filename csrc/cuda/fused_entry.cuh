// An assignment as the ranks of a group tell each other of it: everything that decides its fate, in 32 bits.
#pragma once
#include <cstdint>

#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

struct Entry {
  uint32_t bits;  // 0: an empty slot

  // fixed: the token's weight in units of 1 / 256. leads: the first assignment of its token, which counts the token.
  static __device__ __forceinline__ Entry of(int expert, int bucket, bool text, bool leads, int fixed) {
    return {kPresent | static_cast<uint32_t>(expert) | static_cast<uint32_t>(bucket) << 10 |
            static_cast<uint32_t>(text) << 18 | static_cast<uint32_t>(leads) << 19 |
            static_cast<uint32_t>(fixed) << 20};
  }
  __device__ __forceinline__ bool present() const { return (bits & kPresent) != 0; }
  __device__ __forceinline__ int expert() const { return static_cast<int>(bits & 0x3ffu); }
  __device__ __forceinline__ int bucket() const { return static_cast<int>(bits >> 10 & 0xffu); }
  __device__ __forceinline__ bool text() const { return (bits >> 18 & 1u) != 0; }
  __device__ __forceinline__ bool leads() const { return (bits >> 19 & 1u) != 0; }
  __device__ __forceinline__ int fixed() const { return static_cast<int>(bits >> 20 & 0x1ffu); }
  __device__ __forceinline__ int units(Load load) const { return load == Load::kRows ? 1 : fixed(); }

 private:
  static constexpr uint32_t kPresent = 1u << 31;
};

}  // namespace macs::cuda
