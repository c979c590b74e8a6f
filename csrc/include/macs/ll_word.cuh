// LL words, after NCCL's low-latency protocol: a value of 32 bits and the epoch that it is of, in one word of 64 bits that is
// stored at once. Whoever sees the epoch has the value: no fence, no flag.
//
// An epoch is what sender and receiver count alike: the dispatches of a group, the launches of a kernel, the prefixes of one.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace macs::cuda {

__device__ __forceinline__ uint64_t make_ll_word(uint32_t value, uint32_t epoch) {
  return static_cast<uint64_t>(epoch) << 32 | value;
}
__device__ __forceinline__ uint32_t value_of(uint64_t word) { return static_cast<uint32_t>(word); }
__device__ __forceinline__ uint32_t epoch_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
// Of this epoch exactly: a word that nobody wrote for half of all epochs must not pass for a new one.
__device__ __forceinline__ bool is_of(uint64_t word, uint32_t epoch) { return epoch_of(word) == epoch; }

}  // namespace macs::cuda
