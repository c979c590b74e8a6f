// Messages between the blocks of a cluster: words stored into another block's shared memory, whose barrier there counts
// the bytes that have come.
//
// The receiver waits for data, not for blocks, and nothing orders global memory: barrier.cluster with its release and
// acquire waits for a round trip to L2, and this does not.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "macs/ptx.cuh"

namespace macs::cuda {

// Lies at the same place in every block, in shared memory. `init` by one thread, then a cluster barrier, then messages.
// A phase begins with `expect` (one thread; messages may come before it) and ends when that many bytes are in. Messages
// of the next phase must not come before that: alternate between two inboxes.
class Inbox {
 public:
  __device__ __forceinline__ void init() {
    mbarrier_init(&barrier_);
    fence_mbarrier_init();
  }
  __device__ __forceinline__ void expect(int bytes) { mbarrier_arrive_expect_tx(&barrier_, bytes); }

  // Until the phase is over; phases alternate between 0 and 1.
  __device__ __forceinline__ void wait(int phase) { mbarrier_wait_parity(&barrier_, phase); }

  // Store to the place of `target` in another block (or this one).
  __device__ __forceinline__ void send(int block, void* target, uint32_t word) {
    store_async(map_to_block(target, block), word, map_to_block(&barrier_, block));
  }
  __device__ __forceinline__ void send(int block, void* target, const int4& words) {
    store_async(map_to_block(target, block), words, map_to_block(&barrier_, block));
  }

 private:
  uint64_t barrier_;
};

}  // namespace macs::cuda
