// What the blocks of threshold_apply tell each other about its cuts, in place of a barrier over the grid and of reading
// what was written before it: words that carry the launch they are of (grid.cuh), so that whoever reads one knows that it
// is there.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "grid.cuh"
#include "macs/ptx.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {

// A number and the flag of what it belongs to, in one word.
struct Flagged {
  static __device__ __forceinline__ void publish(uint64_t* target, int number, unsigned flag) {
    store_relaxed_gpu(target, static_cast<uint64_t>(flag) << 32 | static_cast<unsigned>(number));
  }
  // Until it is there.
  static __device__ __forceinline__ int wait(const uint64_t* source, unsigned flag) {
    for (BlockWait wait;; wait.look_again()) {
      const Flagged word(load_relaxed_gpu(source));
      if (word.flag == flag) return word.number;
    }
  }
  __device__ __forceinline__ explicit Flagged(uint64_t word)
      : number(static_cast<int>(word)), flag(static_cast<unsigned>(word >> 32)) {}

  int number;
  unsigned flag;
};
// With more bounds the flags would be more traffic than a barrier.
constexpr int kMaxFlaggedBounds = 32;

// In device memory, behind the GridState, and like that zero before the first launch: it belongs to what score_histogram
// prepares, which knows the experts and not the bounds.
class NoticeBoard {
 public:
  static size_t bytes(int num_experts) {
    const size_t words = num_experts + kMaxFlaggedBounds * kCutWords + 1;
    return (words * sizeof(uint64_t) + alignof(GridState) - 1) / alignof(GridState) * alignof(GridState);
  }
  __device__ __forceinline__ NoticeBoard(GridState* state, int num_experts)
      : shifts_(reinterpret_cast<uint64_t*>(state + 1)), experts_(num_experts) {}

  // A warp's first lane.
  __device__ __forceinline__ void tell_shift(int expert, int shift, unsigned launch) const {
    Flagged::publish(shifts_ + expert, shift, launch);
  }
  // A whole warp, whose lanes all know the cut.
  __device__ __forceinline__ void tell_cut(int n, const RawCut& raw, unsigned launch) const {
    const int lane = threadIdx.x % kWarp;
    if (lane >= kCutWords) return;
    int word = raw.cut.x;
    if (lane == 1) word = raw.cut.y;
    if (lane == 2) word = raw.cut.z;
    if (lane == 3) word = raw.cut.w;
    if (lane == 4) word = static_cast<int>(raw.kept.group);  // all units of a group fit into 31 bits
    if (lane == 5) word = static_cast<int>(raw.kept.own);
    Flagged::publish(cuts() + n * kCutWords + lane, word, launch);
  }
  // A whole block, the only one: what it wrote before is visible to whoever has heard all.
  __device__ __forceinline__ void tell_ready(unsigned launch) const {
    __syncthreads();
    if (threadIdx.x == 0) store_release_gpu(ready(), launch);
  }
  // A whole block: all shifts and cuts, and that block. A barrier of the block is in it.
  __device__ __forceinline__ void hear_all(unsigned launch, int num_bounds, int* shift, RawCut* raw) const {
    const int words = num_bounds * kCutWords;
#pragma unroll 1
    for (int i = threadIdx.x; i <= experts_ + words; i += blockDim.x) {
      if (i < experts_) {
        shift[i] = Flagged::wait(shifts_ + i, launch);
      } else if (i < experts_ + words) {
        put_word(raw, i - experts_, Flagged::wait(cuts() + i - experts_, launch));
      } else {
        for (BlockWait wait; load_acquire_gpu(ready()) != launch;) wait.look_again();
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
    return reinterpret_cast<uint32_t*>(cuts() + kMaxFlaggedBounds * kCutWords);
  }

  uint64_t* const shifts_;
  const int experts_;
};

// What score_histogram prepares for threshold_apply; sums and scratch lie behind it, as well aligned.
inline size_t prepared_bytes(int num_experts) {
  return sizeof(GridState) + NoticeBoard::bytes(num_experts);
}

}  // namespace macs::cuda
