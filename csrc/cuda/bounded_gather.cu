// bounded_gather: the experts' outputs back to the tokens that they were made of, weighted and summed.
//
// Problem:     [max_rows, H] bf16 in, [N, H] bf16 out; bound by reading each row that is used once.
// Algorithm:   a warp per token; the vectors of the next row are on their way while those of this one are added.
// Grid:        N alone decides; warps whose tokens never came leave at once.
// Determinism: a token's rows are added in the order of its slots, by fused multiply-adds.
#include <cuda_bf16.h>

#include "entropy.cuh"
#include "launch.cuh"
#include "macs/bounded.h"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectors = 4;  // of 8 features, of a lane at a time

// A lane's vectors of one row.
struct Piece {
  uint4 data[kVectors];

  __device__ __forceinline__ void load(const uint4* row, int first, int vectors) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kWarp < vectors) data[i] = load_once(row + first + i * kWarp);
    }
  }
};

struct Sum {
  float x[kVectors][8] = {};

  __device__ __forceinline__ void add(const Piece& piece, float weight) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float features[8];
      Vector<__nv_bfloat16>::unpack(piece.data[i], features);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] = __fmaf_rn(features[j], weight, x[i][j]);
    }
  }
  __device__ __forceinline__ void store(uint4* out, int first, int vectors) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kWarp < vectors) out[first + i * kWarp] = Vector<__nv_bfloat16>::pack(x[i]);
    }
  }
};

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ BoundedGatherParams p) {
  start_dependents();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (token >= p.num_tokens) return;
  const bool slot = lane < p.top_k;
  const int place = slot ? __ldg(p.place + token * p.top_k + lane) : kNowhere;
  const float weight = slot ? __ldg(p.weights + token * p.top_k + lane) : 0.0f;
  if (__ballot_sync(kFullMask, place != kNowhere) == 0) return;
  const unsigned slots = __ballot_sync(kFullMask, place >= 0);
  const int vectors = static_cast<int>(p.hidden_size / 8);
  const uint4* const outputs = static_cast<const uint4*>(p.outputs);
  const auto row_of = [&](unsigned left) {
    const int row = __shfl_sync(kFullMask, place, left != 0 ? __ffs(left) - 1 : 0);
    return outputs + static_cast<int64_t>(row) * vectors;
  };
  for (int first = lane; first - lane < vectors; first += kWarp * kVectors) {
    Sum sum;
    Piece next = {};
    const uint4* row = row_of(slots);
    if (slots != 0) next.load(row, first, vectors);
    for (unsigned left = slots; left != 0;) {
      const Piece piece = next;
      const float of_row = __shfl_sync(kFullMask, weight, __ffs(left) - 1);
      left &= left - 1;
      row = row_of(left);
      if (left != 0) next.load(row, first, vectors);
      sum.add(piece, of_row);
    }
    sum.store(static_cast<uint4*>(p.tokens) + token * vectors, first, vectors);
  }
}

}  // namespace

cudaError_t launch_bounded_gather(const BoundedGatherParams& p, cudaStream_t stream) {
  if (!fits(p)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  const int grid = static_cast<int>((p.num_tokens + kWarps - 1) / kWarps);
  return launch(gather_kernel, {.grid = grid, .block = kThreads}, p, stream);
}

}  // namespace macs::cuda
