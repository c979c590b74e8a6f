// bounded_permute: received tokens into rows by expert, whose number the host does not know.
//
// Problem:     [N, K] ids and [N, row_bytes] tokens in, up to max_rows rows out; bound by reading each token once and
//              writing each of its rows.
// Algorithm:   three launches. count: a block's assignments by expert. place: every block adds up the counts of all
//              blocks, which is where each expert begins and where the block's own rows do, and ranks its assignments.
//              scatter: a warp per token copies it to its rows.
// Order:       a bit per (token, expert) of a warp's 32 tokens in shared memory, so that a rank is a count of bits: rows lie
//              in the order of their tokens, whatever the threads do.
// Grid:        N alone decides; blocks and warps whose tokens never came leave at once.
// Determinism: integers.
#include <algorithm>

#include "launch.cuh"
#include "macs/bounded.h"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr int kThreads = kBoundedTokens;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectors = 8;        // of 16 bytes in flight, of a lane that copies

// Of the block's tokens, a thread each.
struct Marks {
  unsigned* const bits;  // [kWarps, E], shared
  const int num_experts, warp, lane;
  const int64_t token;

  __device__ __forceinline__ explicit Marks(const BoundedPermuteParams& p)
      : bits(reinterpret_cast<unsigned*>(dynamic_shared())), num_experts(p.num_experts), warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp), token(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) {}

  // Returns the slots of this thread's token that have an expert of their own here, a bit each.
  __device__ __forceinline__ unsigned set(const BoundedPermuteParams& p) const {
    for (int i = threadIdx.x; i < kWarps * num_experts; i += kThreads) bits[i] = 0;
    __syncthreads();
    unsigned own = 0;
    if (token < p.num_tokens) {
      const int64_t* const ids = p.topk_ids + token * p.top_k;
      for (int k = 0; k < p.top_k; ++k) {
        const int64_t id = __ldg(ids + k);
        if (id < 0 || id >= num_experts) continue;
        const unsigned before = atomicOr(bits + warp * num_experts + id, 1u << lane);
        if ((before >> lane & 1) == 0) own |= 1u << k;
      }
    }
    __syncthreads();
    return own;
  }
  // Tokens of this block with that expert: all, or those before this thread's.
  __device__ __forceinline__ int count(int expert) const { return count_of_warps(expert, kWarps); }
  __device__ __forceinline__ int rank(int expert) const {
    return count_of_warps(expert, warp) + __popc(bits[warp * num_experts + expert] & ((1u << lane) - 1));
  }

 private:
  __device__ __forceinline__ int count_of_warps(int expert, int warps) const {
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += __popc(bits[w * num_experts + expert]);
    return sum;
  }
};

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ BoundedPermuteParams p) {
  start_dependents();
  const Marks marks(p);
  marks.set(p);
  int32_t* const counts = p.counts + static_cast<int64_t>(blockIdx.x) * p.num_experts;
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = marks.count(e);
}

// Sums over blocks into shared memory: rows of each expert in the blocks before this one, and in all of them.
__device__ __forceinline__ void sum_counts(const BoundedPermuteParams& p, int* before, int* total) {
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) before[e] = total[e] = 0;
  __syncthreads();
  const int blocks = static_cast<int>(bounded_blocks(p.num_tokens)), own = blockIdx.x;
  const int shares = p.num_experts < kThreads ? kThreads / p.num_experts : 1;  // threads of an expert
  for (int i = threadIdx.x; i < p.num_experts * shares; i += kThreads) {
    const int e = i % p.num_experts;
    int sum_before = 0, sum = 0;
#pragma unroll 4
    for (int b = i / p.num_experts; b < blocks; b += shares) {
      const int count = __ldcg(p.counts + static_cast<int64_t>(b) * p.num_experts + e);
      sum += count;
      sum_before += b < own ? count : 0;
    }
    atomicAdd(before + e, sum_before);
    atomicAdd(total + e, sum);
  }
  __syncthreads();
}

// [E] from the totals, in the same memory: first row of each expert.
__device__ __forceinline__ void place_experts(const BoundedPermuteParams& p, int* start) {
  if (threadIdx.x < kWarp) {
    int end = 0;
    for (int first = 0; first < p.num_experts; first += kWarp) {
      const int e = first + threadIdx.x;
      const int rows = e < p.num_experts ? start[e] : 0, room = (rows + p.tile - 1) / p.tile * p.tile;
      int sum = room;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kFullMask, sum, offset);
        if (static_cast<int>(threadIdx.x) >= offset) sum += other;
      }
      if (e < p.num_experts) {
        start[e] = end + sum - room;
        if (blockIdx.x == 0) p.expert_end[e] = static_cast<int>(start[e] + rows < p.max_rows ? start[e] + rows : p.max_rows);
      }
      end += __shfl_sync(kFullMask, sum, kWarp - 1);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ BoundedPermuteParams p) {
  start_dependents();
  const Marks marks(p);
  int* const before = reinterpret_cast<int*>(marks.bits + kWarps * p.num_experts);
  int* const start = before + p.num_experts;
  const unsigned own = marks.set(p);
  wait_for_previous();
  sum_counts(p, before, start);
  place_experts(p, start);
  if (marks.token < p.num_tokens) {
    int lost = 0;
    for (int k = 0; k < p.top_k; ++k) {
      const int64_t at = marks.token * p.top_k + k, id = __ldg(p.topk_ids + at);
      int place = id < 0 ? kNowhere : kLost;
      if (own >> k & 1) {
        const int expert = static_cast<int>(id);
        const int64_t row = static_cast<int64_t>(start[expert]) + before[expert] + marks.rank(expert);
        if (row < p.max_rows) place = static_cast<int>(row);
      }
      p.place[at] = place;
      lost += place == kLost;
    }
    if (lost != 0) atomicAdd(p.lost, lost);
  }
}

__global__ void __launch_bounds__(kThreads) scatter_kernel(const __grid_constant__ BoundedPermuteParams p) {
  start_dependents();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  wait_for_previous();
  if (token >= p.num_tokens) return;
  const int place = lane < p.top_k ? __ldcg(p.place + token * p.top_k + lane) : kNowhere;
  const unsigned slots = __ballot_sync(kFullMask, place >= 0);
  const int vectors = slots != 0 ? static_cast<int>(p.row_bytes / sizeof(uint4)) : 0;
  const uint4* const in = static_cast<const uint4*>(p.tokens) + token * (p.row_bytes / sizeof(uint4));
  for (int first = lane; first - lane < vectors; first += kWarp * kVectors) {
    uint4 data[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kWarp < vectors) data[i] = load_once(in + first + i * kWarp);
    }
    for (unsigned left = slots; left != 0; left &= left - 1) {
      const int64_t row = __shfl_sync(kFullMask, place, __ffs(left) - 1);
      uint4* const out = static_cast<uint4*>(p.rows) + row * vectors;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (first + i * kWarp < vectors) store_streaming(out + first + i * kWarp, data[i]);
      }
    }
  }
  if (slots == 0) return;
  for (int first = 0; first < p.num_scales; first += kWarp) {
    const int s = first + lane;
    const float scale = s < p.num_scales ? __ldg(p.scales + token * p.num_scales + s) : 0.0f;
    for (unsigned left = slots; left != 0; left &= left - 1) {
      const int64_t row = __shfl_sync(kFullMask, place, __ffs(left) - 1);
      if (s < p.num_scales) p.row_scales[s * p.max_rows + row] = scale;
    }
  }
}

}  // namespace

cudaError_t launch_bounded_permute(const BoundedPermuteParams& p, cudaStream_t stream) {
  if (!fits(p)) return cudaErrorInvalidValue;
  const int64_t blocks = bounded_blocks(p.num_tokens);
  Shape shape = {.grid = static_cast<int>(blocks), .block = kThreads};
  shape.shared_bytes = kWarps * p.num_experts * sizeof(unsigned);
  if (blocks > 0) {
    if (const cudaError_t error = launch(count_kernel, shape, p, stream); error != cudaSuccess) return error;
  }
  shape.grid = static_cast<int>(std::max<int64_t>(blocks, 1));
  shape.shared_bytes += 2 * p.num_experts * sizeof(int);
  shape.overlap = blocks > 0;
  if (const cudaError_t error = launch(place_kernel, shape, p, stream); error != cudaSuccess) return error;
  if (blocks == 0) return cudaSuccess;
  shape.grid = static_cast<int>((p.num_tokens + kWarps - 1) / kWarps);
  shape.shared_bytes = 0;
  return launch(scatter_kernel, shape, p, stream);
}

}  // namespace macs::cuda
