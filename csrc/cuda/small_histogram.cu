// score_histogram for small batches: entropies, weights and histogram in one cluster, one launch.
//
// Problem:     as entropy_score.cu, entropy_weight.cu and load_histogram.cu, for up to 256 tokens: three short kernels
//              one after the other, and a fourth that clears, cost more in handing over than in work.
// Algorithm:   four warps take a row (as entropy_score's kernel for few rows does, to the bit), all rows of a block at
//              once. Every entropy goes to all blocks (cluster.cuh). A warp per token then adds up its segment over the
//              whole batch in integers, and its lanes add the token's assignments to the histogram, which the cluster
//              cleared while the hidden vectors were on their way.
// Grid:        one cluster of 16 blocks (8 where the device holds no more) of 1024 threads up to 256 vectors of 16 bytes
//              a row, else of 512.
// Determinism: fixed order of additions inside a row; integers else.
#include "assignments.cuh"
#include "cluster.cuh"
#include "entropy.cuh"
#include "histogram.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "segment_sums.cuh"

namespace macs::cuda {
namespace {

constexpr int kRowWarps = 4;   // of a row
constexpr int kRowsAhead = 2;  // rows of a team of warps, loaded at once
constexpr int kMaxTokens = 256;
constexpr int kMinCluster = 8;

struct SmallHistogramArgs {
  EntropyScoreParams score;
  EntropyWeightParams weight;
  LoadHistogramParams histogram;
  ZeroArgs zero;
};

// Sum over a warp of integers of less than 2^50.
__device__ __forceinline__ unsigned long long warp_sum_wide(unsigned long long x) {
  const unsigned low = __reduce_add_sync(kFullMask, static_cast<unsigned>(x) & 0xffffffu);
  const int high = __reduce_add_sync(kFullMask, static_cast<int>(static_cast<long long>(x) >> 24));
  return (static_cast<unsigned long long>(static_cast<long long>(high)) << 24) + low;
}

// The whole batch, as every block holds it.
struct Batch {
  int segment[kMaxTokens];
  float entropy[kMaxTokens];
};

// One warp: the tokens of a segment.
__device__ __forceinline__ int count_of(const Batch& batch, int num_tokens, int segment) {
  int count = 0;
  for (int t = threadIdx.x % kWarp; t < num_tokens; t += kWarp) count += batch.segment[t] == segment ? 1 : 0;
  return __reduce_add_sync(kFullMask, count);
}

__device__ __forceinline__ SegmentSums sums_of(const Batch& batch, int num_tokens, int segment) {
  SegmentSums sums = {0, 0, 0, 0};
  for (int t = threadIdx.x % kWarp; t < num_tokens; t += kWarp) {
    if (batch.segment[t] == segment) sums.add(batch.entropy[t]);
  }
  sums.count = __reduce_add_sync(kFullMask, static_cast<unsigned>(sums.count));
  sums.sum = warp_sum_wide(sums.sum);
  sums.square_low = warp_sum_wide(sums.square_low);
  sums.square_high = warp_sum_wide(sums.square_high);
  return sums;
}

template <class Element, int kVectors, bool kExact, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) small_histogram_kernel(const __grid_constant__ SmallHistogramArgs args) {
  constexpr int kTeams = kThreads / (kRowWarps * kWarp), kMaxRows = kRowsAhead * kTeams;
  __shared__ Batch batch;
  __shared__ Part parts[kMaxRows][kRowWarps];
  __shared__ Inbox inbox;
  start_dependents();
  const EntropyScoreParams& score = args.score;
  const Assignments& in = args.histogram.in;
  const int block = cluster_rank(), num_blocks = cluster_blocks(), num_tokens = static_cast<int>(score.num_tokens);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, team = warp / kRowWarps;
  const int num_vectors = static_cast<int>(score.hidden_size) / Vector<Element>::kSize;
  // Tokens are dealt round robin to the blocks: row r of this block is token block + r * num_blocks.
  Share<Element, kVectors, kExact> shares[kRowsAhead];
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    const int token = block + (team + i * kTeams) * num_blocks;
    shares[i].first = threadIdx.x % (kRowWarps * kWarp), shares[i].stride = kRowWarps * kWarp;
    shares[i].num_vectors = num_vectors;
    if (token < num_tokens) {
      shares[i].load(static_cast<const uint4*>(score.hidden_states) + static_cast<int64_t>(token) * num_vectors);
    }
  }
  if (threadIdx.x == 0) {
    inbox.init();
    inbox.expect(num_tokens * static_cast<int>(sizeof(float)));
  }
  for (int t = threadIdx.x; t < num_tokens; t += kThreads) batch.segment[t] = __ldg(score.segment + t);
  // Below, warp r has row r. A lane has one of its slots.
  Slot slot = {block + static_cast<int64_t>(warp) * num_blocks, -1, -1, 0.0f, 1.0f, false};
  const bool has_token = slot.token < num_tokens;
  if (has_token && lane < in.top_k) {
    slot.inside = true;
    slot.expert = load_id(in, slot.token * in.top_k + lane);
    slot.gate = __ldg(in.topk_weights + slot.token * in.top_k + lane);
  }
  zero_all(args.zero);
  cluster_arrive();  // the cells are clear, the inboxes there
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    const int row = team + i * kTeams;
    if (block + row * num_blocks >= num_tokens) continue;
    const Part part = shares[i].score();
    if (lane == 0) parts[row][warp % kRowWarps] = part;
  }
  __syncthreads();
  double inverse_count = 0.0;
  float entropy = 0.0f;
  if (has_token) {
    slot.segment = batch.segment[slot.token];
    inverse_count = 1.0 / static_cast<double>(count_of(batch, num_tokens, slot.segment));
    if (!slot.text()) entropy = entropy_of_parts<kRowWarps>(parts[warp]);
  }
  cluster_wait();
  Sums sums;
  if (has_token) {
    if (lane < num_blocks) inbox.send(lane, batch.entropy + slot.token, __float_as_uint(entropy));
    inbox.wait(0);
    if (!slot.text()) {
      const SegmentMoments moments = moments_of(sums_of(batch, num_tokens, slot.segment), inverse_count);
      slot.weight = weight_of(entropy, moments, args.weight.delta);
    }
    const bool filled = __any_sync(kFullMask, slot.expert >= 0);
    sums.add(slot, lane == 0, filled);
    add_to_cell(args.histogram, slot);
    if (lane == 0) {
      score.entropy[slot.token] = entropy;
      args.weight.weight[slot.token] = slot.weight;
    }
  }
  inbox.wait(0);  // nobody leaves while mail is on its way to it
  sums.flush(args.histogram);
}

template <class Element, int kVectors, bool kExact, int kThreads>
cudaError_t enqueue(const SmallHistogramArgs& args, bool& taken, cudaStream_t stream) {
  static int cached[kMaxDevices] = {};
  constexpr int kMaxRows = kRowsAhead * kThreads / (kRowWarps * kWarp);
  const auto kernel = small_histogram_kernel<Element, kVectors, kExact, kThreads>;
  const int cluster = largest_cluster(kernel, kThreads, cached);
  taken = cluster >= kMinCluster && args.score.num_tokens <= cluster * kMaxRows;
  if (!taken) return cudaSuccess;
  return launch(kernel, {.grid = cluster, .block = kThreads, .cluster = cluster}, args, stream);
}

template <class Element>
cudaError_t enqueue(const SmallHistogramArgs& args, bool& taken, cudaStream_t stream) {
  const int64_t vectors = args.score.hidden_size / Vector<Element>::kSize;
  const bool aligned = reinterpret_cast<uintptr_t>(args.score.hidden_states) % sizeof(uint4) == 0;
  const bool whole = aligned && args.score.hidden_size % Vector<Element>::kSize == 0;
  constexpr int kPerVector = kRowWarps * kWarp;
  if (whole && vectors == 2 * kPerVector) return enqueue<Element, 2, true, 1024>(args, taken, stream);
  if (whole && vectors == 7 * kPerVector) return enqueue<Element, 7, true, 512>(args, taken, stream);
  if (whole && vectors > 2 * kPerVector && vectors <= 8 * kPerVector) {
    return enqueue<Element, 8, false, 512>(args, taken, stream);
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t enqueue_small_histogram(const EntropyScoreParams& score, const EntropyWeightParams& weight,
                                    const LoadHistogramParams& histogram, const ZeroArgs& zero, bool& taken,
                                    cudaStream_t stream) {
  taken = false;
  const Assignments& in = histogram.in;
  if (score.num_tokens < 1 || score.num_tokens > kMaxTokens || in.top_k < 1 || in.top_k > kWarp) return cudaSuccess;
  const SmallHistogramArgs args = {score, weight, histogram, zero};
  switch (score.dtype) {
    case DType::kFloat32: return enqueue<float>(args, taken, stream);
    case DType::kFloat16: return enqueue<__half>(args, taken, stream);
    case DType::kBFloat16: return enqueue<__nv_bfloat16>(args, taken, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace macs::cuda
