// A barrier over all blocks of a grid that fits on the device at once (the launch asks for that: cooperative).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "macs/ptx.cuh"

namespace macs::cuda {

// Zero before the first launch; every launch leaves it zero but for their number.
struct alignas(256) GridState {
  unsigned arrived, left, launches;
};

// Between two looks of a block at what another one has to do. Blocks of a grid are on the device together, and each does its
// part within microseconds: should one never come, the kernel ends with an error that the host sees, in place of a
// server that stands still.
class BlockWait {
 public:
  __device__ __forceinline__ void look_again() {
    constexpr unsigned kMostLooks = 1u << 26;  // a third of a microsecond each, at the least
    if (++looks_ == kMostLooks) __trap();
  }

 private:
  unsigned looks_ = 0;
};

class Grid {
 public:
  __device__ __forceinline__ explicit Grid(GridState* state) : state_(state) {}

  // What any thread wrote before is visible to every thread behind it.
  __device__ __forceinline__ void barrier() {
    __syncthreads();
    if (threadIdx.x == 0 && gridDim.x > 1) {
      target_ += gridDim.x;
      red_add_release_gpu(&state_->arrived, 1);
      for (BlockWait wait; load_acquire_gpu(&state_->arrived) < target_;) wait.look_again();
    }
    __syncthreads();
  }

  // The number of this launch, from 1: a flag that none before it has left behind. Behind the kernels before.
  __device__ __forceinline__ unsigned launch() const { return load_relaxed_sys(&state_->launches) + 1; }

  // After the last barrier: whoever leaves last makes the state that of the next launch.
  __device__ __forceinline__ void leave() {
    if (threadIdx.x != 0) return;
    if (atomicAdd(&state_->left, 1u) == gridDim.x - 1) {
      store_relaxed_sys(&state_->arrived, 0);  // others may still be polling it, as far as the memory model knows
      store_relaxed_sys(&state_->left, 0);
      store_relaxed_sys(&state_->launches, launch());
    }
  }

 private:
  GridState* state_;
  unsigned target_ = 0;
};

}  // namespace macs::cuda
