// entropy_weight: weight = 1 / (1 + exp(delta z)), z = (entropy - mean) / (std + eps) over the token's segment.
//
// Problem:     [T] f32 in and out, any number of segments, their tokens in any order.
// Algorithm:   integer sums per segment (segment_sums.cuh), then one weight per thread. Segments numbered in runs (an
//              image after the other) cost a warp one addition; mixed ones cost one each.
// Grid:        three kernels: zero the sums, add, weigh; 256 tokens per block.
// Determinism: integer sums; the same bits whatever the order.
#include "kernels.cuh"
#include "launch.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr int kThreads = 256;

struct EntropyWeightArgs {
  EntropyWeightParams p;
  SumsLayout layout;
};

__global__ void __launch_bounds__(kThreads) zero_kernel(const __grid_constant__ ZeroArgs args) {
  start_dependents();
  zero_all(args);
}

__global__ void __launch_bounds__(kThreads) segment_sums_kernel(const __grid_constant__ EntropyWeightArgs args) {
  start_dependents();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int segment = token < args.p.num_tokens ? __ldg(args.p.segment + token) : -1;
  const float entropy = segment >= 0 ? args.p.entropy[token] : 0.0f;
  wait_for_previous();
  // Lanes of the same segment add up through their lowest lane.
  const unsigned peers = __match_any_sync(kFullMask, segment);
  const int lane = threadIdx.x % kWarp;
  SegmentAccumulator accumulator;
  accumulator.clear();
  for (unsigned left = peers; segment >= 0 && left != 0; left &= left - 1) {
    const float other = __shfl_sync(peers, entropy, __ffs(left) - 1);
    if (lane == __ffs(peers) - 1) accumulator.add(segment, other, args.layout, blockIdx.x);
  }
  accumulator.flush(args.layout, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads) entropy_weight_kernel(const __grid_constant__ EntropyWeightArgs args) {
  start_dependents();
  __shared__ SegmentMoments table[kFewSegments];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int segment = token < args.p.num_tokens ? __ldg(args.p.segment + token) : -1;
  wait_for_previous();
  const bool few = args.layout.copies > 1;
  if (few) {
    for (int s = threadIdx.x / kWarp; s < args.p.num_segments; s += kThreads / kWarp) {
      const SegmentMoments moments = warp_moments(args.layout, s);
      if (threadIdx.x % kWarp == 0) table[s] = moments;
    }
    __syncthreads();
  }
  if (token >= args.p.num_tokens) return;
  float weight = 1.0f;
  if (segment >= 0) {
    const SegmentMoments moments = few ? table[segment] : moments_of(args.layout.sums[segment]);
    weight = weight_of(args.p.entropy[token], moments, args.p.delta);
  }
  args.p.weight[token] = weight;
}

}  // namespace

cudaError_t enqueue_zero(const ZeroArgs& args, cudaStream_t stream) {
  const int64_t bytes = args.first_bytes > args.second_bytes ? args.first_bytes : args.second_bytes;
  const int64_t blocks = (bytes / 16 + kThreads - 1) / kThreads;
  const int most = num_sms();
  const int grid = static_cast<int>(blocks < 1 ? 1 : (blocks < most ? blocks : most));
  return launch(zero_kernel, {.grid = grid, .block = kThreads}, args, stream);
}

size_t entropy_weight_workspace_bytes(const EntropyWeightParams& p) {
  return static_cast<size_t>(SumsLayout::of(nullptr, p.num_segments).bytes());
}

cudaError_t launch_entropy_weight(const EntropyWeightParams& p, void* workspace, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const EntropyWeightArgs args = {p, SumsLayout::of(workspace, p.num_segments)};
  const int grid = static_cast<int>((p.num_tokens + kThreads - 1) / kThreads);
  const Shape shape = {.grid = grid, .block = kThreads, .overlap = true};
  cudaError_t error = enqueue_zero({workspace, nullptr, args.layout.bytes(), 0}, stream);
  if (error == cudaSuccess) error = launch(segment_sums_kernel, shape, args, stream);
  if (error == cudaSuccess) error = launch(entropy_weight_kernel, shape, args, stream);
  return error;
}

}  // namespace macs::cuda
