// entropy_score: Shannon entropy of softmax(x) per visual token, nats.
//
// Problem:     [T, H] bf16 / f16 / f32 in, [T] f32 out; bound by reading the hidden vectors once.
// Algorithm:   a row stays in registers between its maximum and its sums. With u = (x - max) log2(e), Z = sum 2^u and
//              S = sum u 2^u the entropy is ln 2 (log2 Z - S / Z). Warps of one row take their own maxima and are
//              merged.
// Grid:        persistent; a block owns a contiguous range of rows. A warp per row up to 256 vectors of 16 bytes, else
//              a block of 4 or 8 warps per row (also for few rows, where latency counts); rows that no register file
//              holds, odd sizes and unaligned pointers take the generic kernel, one element at a time, in one pass.
// Determinism: fixed order of additions for a given H and T; segment sums are integers (segment_sums.cuh).
#include "entropy.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr int kWarpKernelThreads = 256;
constexpr int kGenericThreads = 256;
constexpr int kFewRows = 2048;  // up to here latency counts, several warps share a row; the same on every device, as the bits are

// Rows of one block.
struct Rows {
  int64_t begin, end;
  __device__ __forceinline__ explicit Rows(int64_t num_tokens)
      : begin(num_tokens * blockIdx.x / gridDim.x), end(num_tokens * (blockIdx.x + 1) / gridDim.x) {}
};

template <class Element, int kVectors, bool kExact>
__global__ void __launch_bounds__(kWarpKernelThreads, 4)
    entropy_score_warp_kernel(const __grid_constant__ EntropyScoreArgs args) {
  start_dependents();
  const EntropyScoreParams& p = args.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int num_vectors = static_cast<int>(p.hidden_size) / Vector<Element>::kSize;
  const uint4* hidden = static_cast<const uint4*>(p.hidden_states);
  const Rows rows(p.num_tokens);
  const int copy = blockIdx.x * num_warps + warp;
  __shared__ SegmentAccumulator accumulators[kWarpKernelThreads / kWarp];
  SegmentAccumulator& accumulator = accumulators[warp];
  if (lane == 0) accumulator.clear();
  int segment = rows.begin + warp < rows.end ? __ldg(p.segment + rows.begin + warp) : -1;
  for (int64_t row = rows.begin + warp; row < rows.end; row += num_warps) {
    const int next = row + num_warps < rows.end ? __ldg(p.segment + row + num_warps) : -1;
    float entropy = 0.0f;
    if (segment >= 0) {
      const uint4* const vectors = hidden + row * num_vectors;
      entropy = entropy_of(score_share<Element, kVectors, kExact>(vectors, lane, kWarp, num_vectors));
    }
    if (lane == 0) {
      p.entropy[row] = entropy;
      if (args.layout.sums != nullptr && segment >= 0) accumulator.add(segment, entropy, args.layout, copy);
    }
    segment = next;
  }
  wait_for_previous();
  if (args.layout.sums == nullptr) return;
  __syncthreads();
  if (warp == 0) SegmentAccumulator::flush_all<kWarpKernelThreads / kWarp>(accumulators, args.layout, copy);
}

template <class Element, int kVectors, int kWarps, bool kExact>
__global__ void __launch_bounds__(kWarps * kWarp, 32 / kWarps)
    entropy_score_block_kernel(const __grid_constant__ EntropyScoreArgs args) {
  start_dependents();
  __shared__ Part parts[2][kWarps];  // two, so that one barrier a row is enough
  const EntropyScoreParams& p = args.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_vectors = static_cast<int>(p.hidden_size) / Vector<Element>::kSize;
  const uint4* hidden = static_cast<const uint4*>(p.hidden_states);
  const Rows rows(p.num_tokens);
  __shared__ SegmentAccumulator accumulator;
  if (threadIdx.x == 0) accumulator.clear();
  int side = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int segment = __ldg(p.segment + row);
    if (segment < 0) {
      if (threadIdx.x == 0) p.entropy[row] = 0.0f;
      continue;
    }
    const uint4* const vectors = hidden + row * num_vectors;
    const Part part = score_share<Element, kVectors, kExact>(vectors, threadIdx.x, kWarps * kWarp, num_vectors);
    if (lane == 0) parts[side][warp] = part;
    __syncthreads();
    if (threadIdx.x == 0) {
      const float entropy = entropy_of_parts<kWarps>(parts[side]);
      p.entropy[row] = entropy;
      if (args.layout.sums != nullptr) accumulator.add(segment, entropy, args.layout, blockIdx.x);
    }
    side ^= 1;
  }
  wait_for_previous();
  if (threadIdx.x == 0 && args.layout.sums != nullptr) accumulator.flush(args.layout, blockIdx.x);
}

template <class Element>
__global__ void __launch_bounds__(kGenericThreads) entropy_score_generic_kernel(
    const __grid_constant__ EntropyScoreArgs args) {
  start_dependents();
  __shared__ Part parts[kGenericThreads / kWarp];
  const EntropyScoreParams& p = args.p;
  const Rows rows(p.num_tokens);
  __shared__ SegmentAccumulator accumulator;
  if (threadIdx.x == 0) accumulator.clear();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int segment = __ldg(p.segment + row);
    if (segment < 0) {
      if (threadIdx.x == 0) p.entropy[row] = 0.0f;
      continue;
    }
    const Element* x = static_cast<const Element*>(p.hidden_states) + row * p.hidden_size;
    Part part = {0.0f, 0.0f, 0.0f};
    for (int64_t i = threadIdx.x; i < p.hidden_size; i += blockDim.x) {
      part = merge(part, {static_cast<float>(x[i]) * kLog2E, 1.0f, 0.0f});
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const Part other = {__shfl_down_sync(kFullMask, part.top, offset), __shfl_down_sync(kFullMask, part.zero, offset),
                          __shfl_down_sync(kFullMask, part.first, offset)};
      part = merge(part, other);
    }
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = part;
    __syncthreads();
    if (threadIdx.x == 0) {
      const float entropy = entropy_of_parts<kGenericThreads / kWarp>(parts);
      p.entropy[row] = entropy;
      if (args.layout.sums != nullptr) accumulator.add(segment, entropy, args.layout, blockIdx.x);
    }
    __syncthreads();
  }
  wait_for_previous();
  if (threadIdx.x == 0 && args.layout.sums != nullptr) accumulator.flush(args.layout, blockIdx.x);
}

int grid_for(int64_t work, int blocks_per_sm) {
  const int64_t most = static_cast<int64_t>(num_sms()) * blocks_per_sm;
  return static_cast<int>(work < most ? work : most);
}

template <class Element>
cudaError_t enqueue(const EntropyScoreArgs& args, bool overlap, cudaStream_t stream) {
  const EntropyScoreParams& p = args.p;
  const int64_t num_vectors = p.hidden_size / Vector<Element>::kSize;
  const bool aligned = reinterpret_cast<uintptr_t>(p.hidden_states) % sizeof(uint4) == 0;
  const bool whole = aligned && p.hidden_size % Vector<Element>::kSize == 0;
  const bool few = p.num_tokens <= kFewRows;
  const auto run = [&](void (*kernel)(EntropyScoreArgs), int64_t work, int threads, int blocks) {
    return launch(kernel, {.grid = grid_for(work, blocks), .block = threads, .overlap = overlap}, args, stream);
  };
  const int64_t warps = (num_vectors + 8 * kWarp - 1) / (8 * kWarp);  // at 8 vectors per lane
  const int64_t row_blocks = (p.num_tokens + 7) / 8;
  if (!whole || warps > 8) return run(entropy_score_generic_kernel<Element>, p.num_tokens, kGenericThreads, 8);
  if (warps > 4) return run(entropy_score_block_kernel<Element, 8, 8, false>, p.num_tokens, 256, 4);
  if (num_vectors == 7 * 4 * kWarp) return run(entropy_score_block_kernel<Element, 7, 4, true>, p.num_tokens, 128, 8);
  if (warps > 1) return run(entropy_score_block_kernel<Element, 8, 4, false>, p.num_tokens, 128, 8);
  if (few && num_vectors == 2 * 4 * kWarp) {
    return run(entropy_score_block_kernel<Element, 2, 4, true>, p.num_tokens, 128, 16);
  }
  const auto kernel = num_vectors == 8 * kWarp ? entropy_score_warp_kernel<Element, 8, true>
                                               : entropy_score_warp_kernel<Element, 8, false>;
  return run(kernel, row_blocks, kWarpKernelThreads, 4);
}

}  // namespace

cudaError_t enqueue_entropy_score(const EntropyScoreArgs& args, bool overlap, cudaStream_t stream) {
  if (args.p.num_tokens == 0) return cudaSuccess;
  switch (args.p.dtype) {
    case DType::kFloat32: return enqueue<float>(args, overlap, stream);
    case DType::kFloat16: return enqueue<__half>(args, overlap, stream);
    case DType::kBFloat16: return enqueue<__nv_bfloat16>(args, overlap, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_entropy_score(const EntropyScoreParams& p, cudaStream_t stream) {
  return enqueue_entropy_score({.p = p, .layout = {}}, false, stream);
}

}  // namespace macs::cuda
