// selection_score: how a router ranks a token's experts where a correction bias or groups have a say (docs/design/method.md, 5).
//
// Problem:     [T, E] logits in any float type, [T, E] f32 out; E <= 1024.
// Algorithm:   a warp a token, its scores in shared memory. A lane takes a group: its score, how many groups are better,
//              and the end of its experts where those are enough.
// Grid:        one launch, four tokens per block.
// Determinism: nothing crosses a warp; of equal groups the first is better.
#include "launch.cuh"
#include "macs/cuda.h"
#include "plan/choose.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxExperts = 1024;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

// A token's scores [E] in shared memory; lane l works on experts l, l + 32, ...
struct Row {
  float* score;
  int experts;

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll 1
    for (int j = lane_id(); j < experts; j += kWarp) score[j] = body(j, score[j]);
  }
  template <class Body>
  __device__ __forceinline__ void fill(Body body) const {
#pragma unroll 1
    for (int j = lane_id(); j < experts; j += kWarp) score[j] = body(j);
  }
};

// Logits to probabilities; what is not finite stays -infinity and has no share.
__device__ __forceinline__ void softmax(const Row& row) {
  float most = -INFINITY, sum = 0.0f;
#pragma unroll 1
  for (int j = lane_id(); j < row.experts; j += kWarp) most = fmaxf(most, row.score[j]);
  most = of_order(__reduce_max_sync(kFullMask, order_of(most)));
  row.for_each([&](int, float x) {
    const float e = expf(x - most);
    if (x != -INFINITY) sum += e;
    return x != -INFINITY ? e : x;
  });
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  row.for_each([&](int, float x) { return x / sum; });
}

__device__ __forceinline__ void score_experts(const SelectionScoreParams& p, int64_t token, const Row& row) {
  const Logits logits = {p.router_logits, p.logits_dtype};
  row.fill([&](int j) { return candidate_of(logits.at(token * row.experts + j)); });
  if (p.scoring == Scoring::kSoftmax) softmax(row);
  row.for_each([&](int j, float x) {
    if (x == -INFINITY) return x;
    if (p.scoring == Scoring::kSigmoid) x = 1.0f / (1.0f + expf(-x));
    if (p.scoring == Scoring::kSqrtSoftplus) x = sqrtf(softplus(x));
    return candidate_of(p.correction_bias != nullptr ? x + __ldg(p.correction_bias + j) : x);
  });
}

// The group's best expert; with a bias the sum of its best two.
__device__ __forceinline__ float group_score(const float* score, int experts, bool two) {
  float best = -INFINITY, second = -INFINITY;
#pragma unroll 1
  for (int j = 0; j < experts; ++j) {
    second = fmaxf(second, fminf(best, score[j]));
    best = fmaxf(best, score[j]);
  }
  return two ? best + second : best;
}

__device__ __forceinline__ bool is_taken(const float* groups, int num_groups, int taken, int group) {
  int better = 0;
#pragma unroll 1
  for (int g = 0; g < num_groups; ++g) {
    better += groups[g] > groups[group] || (groups[g] == groups[group] && g < group) ? 1 : 0;
  }
  return better < taken;
}

// groups: [num_groups] of shared memory.
__device__ __forceinline__ void close_other_groups(const SelectionScoreParams& p, const Row& row, float* groups) {
  const int width = row.experts / p.num_groups;
  __syncwarp();
#pragma unroll 1
  for (int g = lane_id(); g < p.num_groups; g += kWarp) {
    groups[g] = group_score(row.score + g * width, width, p.correction_bias != nullptr);
  }
  __syncwarp();
#pragma unroll 1
  for (int g = lane_id(); g < p.num_groups; g += kWarp) {
    if (is_taken(groups, p.num_groups, p.topk_groups, g)) continue;
    for (int j = 0; j < width; ++j) row.score[g * width + j] = -INFINITY;
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kThreads) selection_score_kernel(const __grid_constant__ SelectionScoreParams p) {
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const int warp = threadIdx.x / kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= p.num_tokens) return;
  const Row row = {shared + warp * (p.num_experts + p.num_groups), p.num_experts};
  score_experts(p, token, row);
  if (p.topk_groups < p.num_groups) close_other_groups(p, row, row.score + row.experts);
  float* const out = p.selection + token * row.experts;
  row.for_each([&](int j, float x) { return out[j] = x; });
}

}  // namespace

cudaError_t launch_selection_score(const SelectionScoreParams& p, cudaStream_t stream) {
  if (p.num_experts < 1 || p.num_experts > kMaxExperts || p.num_groups < 1 || p.num_experts % p.num_groups != 0) {
    return cudaErrorInvalidValue;
  }
  if (p.num_tokens == 0) return cudaSuccess;
  const size_t bytes = sizeof(float) * kWarps * (p.num_experts + p.num_groups);
  const int grid = static_cast<int>((p.num_tokens + kWarps - 1) / kWarps);
  return launch(selection_score_kernel, {.grid = grid, .block = kThreads, .shared_bytes = bytes}, p, stream);
}

}  // namespace macs::cuda
