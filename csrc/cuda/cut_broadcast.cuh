// What the blocks of threshold_apply send each other of its cuts, in place of a barrier over the grid and of reading
// what was written before it: LL words whose epoch is the number of the launch (grid.cuh).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "grid.cuh"
#include "macs/ll_word.cuh"
#include "macs/ptx.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {

// To the other blocks of the grid.
__device__ __forceinline__ void publish(uint64_t* target, int value, unsigned epoch) {
  store_relaxed_gpu(target, make_ll_word(static_cast<unsigned>(value), epoch));
}
// Until it is there.
__device__ __forceinline__ int await_value(const uint64_t* source, unsigned epoch) {
  for (BlockWait wait;; wait.look_again()) {
    const uint64_t word = load_relaxed_gpu(source);
    if (is_of(word, epoch)) return static_cast<int>(value_of(word));
  }
}

// With more bounds LL words would be more traffic than a barrier.
constexpr int kMaxLlBounds = 32;

// In device memory, behind the GridState, and like that zero before the first launch: it belongs to what score_histogram
// prepares, which knows the experts and not the bounds.
class CutBroadcast {
 public:
  static size_t bytes(int num_experts) {
    const size_t words = num_experts + kMaxLlBounds * kCutWords + 1;
    return (words * sizeof(uint64_t) + alignof(GridState) - 1) / alignof(GridState) * alignof(GridState);
  }
  __device__ __forceinline__ CutBroadcast(GridState* state, int num_experts)
      : shifts_(reinterpret_cast<uint64_t*>(state + 1)), experts_(num_experts) {}

  // A warp's first lane.
  __device__ __forceinline__ void publish_shift(int expert, int shift, unsigned epoch) const {
    publish(shifts_ + expert, shift, epoch);
  }
  // A whole warp, whose lanes all know the cut.
  __device__ __forceinline__ void publish_cut(int n, const RawCut& raw, unsigned epoch) const {
    const int lane = threadIdx.x % kWarp;
    if (lane >= kCutWords) return;
    int word = raw.cut.x;
    if (lane == 1) word = raw.cut.y;
    if (lane == 2) word = raw.cut.z;
    if (lane == 3) word = raw.cut.w;
    if (lane == 4) word = static_cast<int>(raw.kept.group);  // all units of a group fit into 31 bits
    if (lane == 5) word = static_cast<int>(raw.kept.own);
    publish(cuts() + n * kCutWords + lane, word, epoch);
  }
  // A whole block, the only one: what it wrote before is visible to whoever has seen all.
  __device__ __forceinline__ void publish_ready(unsigned epoch) const {
    __syncthreads();
    if (threadIdx.x == 0) store_release_gpu(ready(), epoch);
  }
  // A whole block: all shifts and cuts, and that block. A barrier of the block is in it.
  __device__ __forceinline__ void await_all(unsigned epoch, int num_bounds, int* shift, RawCut* raw) const {
    const int words = num_bounds * kCutWords;
#pragma unroll 1
    for (int i = threadIdx.x; i <= experts_ + words; i += blockDim.x) {
      if (i < experts_) {
        shift[i] = await_value(shifts_ + i, epoch);
      } else if (i < experts_ + words) {
        put_word(raw, i - experts_, await_value(cuts() + i - experts_, epoch));
      } else {
        for (BlockWait wait; load_acquire_gpu(ready()) != epoch;) wait.look_again();
      }
    }
    __syncthreads();
  }

 private:
  static constexpr int kCutWords = 6;

  static __device__ __forceinline__ void put_word(RawCut* raw, int at, int word) {
    RawCut& of = raw[at / kCutWords];
    const int which = at % kCutWords;
    if (which == 4) {
      of.kept.group = static_cast<unsigned>(word);
    } else if (which == 5) {
      of.kept.own = static_cast<unsigned>(word);
    } else {
      (&of.cut.x)[which] = word;
    }
  }
  __device__ __forceinline__ uint64_t* cuts() const { return shifts_ + experts_; }
  __device__ __forceinline__ uint32_t* ready() const {
    return reinterpret_cast<uint32_t*>(cuts() + kMaxLlBounds * kCutWords);
  }

  uint64_t* const shifts_;
  const int experts_;
};

// What score_histogram prepares for threshold_apply; sums and scratch lie behind it, as well aligned.
inline size_t prepared_bytes(int num_experts) {
  return sizeof(GridState) + CutBroadcast::bytes(num_experts);
}

}  // namespace macs::cuda
