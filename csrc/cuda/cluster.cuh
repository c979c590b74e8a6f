// Messages between the blocks of a cluster: words stored into another block's shared memory, whose barrier there counts
// the bytes that have come.
//
// The receiver waits for data, not for blocks, and nothing orders global memory: barrier.cluster with its release and
// acquire waits for a round trip to L2, and this does not.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace macs::cuda {

__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_blocks() {
  unsigned blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}

// All threads of all blocks; what was written before, in device memory too, is visible behind.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Lies at the same place in every block, in shared memory. `init` by one thread, then a cluster barrier, then messages.
// A phase begins with `expect` (one thread; messages may come before it) and ends when that many bytes are in. Messages
// of the next phase must not come before that: alternate between two inboxes.
class Inbox {
 public:
  __device__ __forceinline__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier_)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier_)), "r"(bytes)
                 : "memory");
  }

  // Until the phase is over; phases alternate between 0 and 1.
  __device__ __forceinline__ void wait(int phase) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}" ::"r"(shared_address(&barrier_)),
        "r"(phase)
        : "memory");
  }

  // Store to the place of `target` in another block (or this one).
  __device__ __forceinline__ void send(int block, void* target, uint32_t word) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                     remote(block, target)),
                 "r"(word), "r"(remote(block, &barrier_))
                 : "memory");
  }
  __device__ __forceinline__ void send(int block, void* target, const int4& words) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     remote(block, target)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(remote(block, &barrier_))
                 : "memory");
  }

 private:
  static __device__ __forceinline__ uint32_t remote(int block, const void* shared) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(block));
    return address;
  }

  uint64_t barrier_;
};

}  // namespace macs::cuda
