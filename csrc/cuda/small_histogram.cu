// score_histogram for small batches: entropies, weights and histogram in one cluster, one launch. Where nothing depends on
// entropies, no hidden vector is read and a visual token weighs 0.5.
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

// A lane's tokens of one segment: bit i stands for token lane + 32 i.
__device__ __forceinline__ unsigned members_of(const Batch& batch, int num_tokens, int segment) {
  unsigned members = 0;
#pragma unroll
  for (int i = 0; i < kMaxTokens / kWarp; ++i) {
    const int token = threadIdx.x % kWarp + i * kWarp;
    members |= token < num_tokens && batch.segment[token] == segment ? 1u << i : 0;
  }
  return members;
}

// One warp: the sums of a segment, four tokens of a lane at a time.
__device__ __forceinline__ SegmentSums sums_of(const Batch& batch, int num_tokens, unsigned members, int count) {
  SegmentSums sums = {0, 0, 0, 0};
  for (int first = 0; first < num_tokens; first += 4 * kWarp, members >>= 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float entropy = batch.entropy[first + i * kWarp + threadIdx.x % kWarp];
      sums.add((members >> i & 1u) != 0 ? entropy : 0.0f);
    }
  }
  sums.count = count;
  sums.sum = warp_sum_wide(sums.sum);
  sums.square_low = warp_sum_wide(sums.square_low);
  sums.square_high = warp_sum_wide(sums.square_high);
  return sums;
}

// One warp: the token's share of N, N_visual, W_visual and W, added to the block's.
__device__ __forceinline__ void add_sums(const Slot& slot, int* block_sums) {
  const int lane = threadIdx.x % kWarp, slots = __popc(__ballot_sync(kFullMask, slot.expert >= 0));
  const int fixed = slots != 0 ? fixed_weight(slot.weight) : 0;
  const int both = lane == 0 || lane == 1 ? slots : fixed;
  const bool only_visual = lane == 1 || lane == 2;
  if (lane < kNumSums && !(only_visual && slot.text())) atomicAdd(block_sums + lane, both);
}

template <class Element, int kVectors, bool kExact, int kThreads, bool kScored>
__global__ void __launch_bounds__(kThreads, 1) small_histogram_kernel(const __grid_constant__ SmallHistogramArgs args) {
  constexpr int kTeams = kThreads / (kRowWarps * kWarp), kMaxRows = kRowsAhead * kTeams;
  __shared__ Batch batch;
  __shared__ Part parts[kMaxRows][kRowWarps];
  __shared__ Inbox inbox;
  __shared__ int block_sums[kNumSums];
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
    if (kScored && token < num_tokens) {
      shares[i].load(static_cast<const uint4*>(score.hidden_states) + static_cast<int64_t>(token) * num_vectors);
    }
  }
  // Below, warp r has row r, a lane one of its slots.
  Slot slot = {block + static_cast<int64_t>(warp) * num_blocks, -1, -1, 0.0f, 1.0f, false};
  const bool has_token = slot.token < num_tokens;
  if (has_token && lane < in.top_k) {
    slot.inside = true;
    slot.expert = load_id(in, slot.token * in.top_k + lane);
    slot.gate = __ldg(in.topk_weights + slot.token * in.top_k + lane);
  }
  const int own_segment = threadIdx.x < num_tokens ? __ldg(score.segment + threadIdx.x) : -1;
  zero_all(args.zero);
  if (kScored && threadIdx.x == 0) {
    inbox.init();
    inbox.expect(num_tokens * static_cast<int>(sizeof(float)));
  }
  cluster_arrive();  // the cells are clear, the inboxes there
  if (threadIdx.x < kNumSums) block_sums[threadIdx.x] = 0;
  if (threadIdx.x < num_tokens) batch.segment[threadIdx.x] = own_segment;
  __syncthreads();
  unsigned members = 0;
  int count = 0;
  double inverse_count = 0.0;
  if (has_token) {
    slot.segment = batch.segment[slot.token];
    slot.weight = plain_weight(slot.segment);
  }
  if (kScored && has_token) {
    members = members_of(batch, num_tokens, slot.segment);
    count = __reduce_add_sync(kFullMask, __popc(members));
    inverse_count = 1.0 / static_cast<double>(count);
  }
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    const int row = team + i * kTeams;
    if (!kScored || block + row * num_blocks >= num_tokens) continue;
    const Part part = shares[i].score();
    if (lane == 0) parts[row][warp % kRowWarps] = part;
  }
  __syncthreads();
  cluster_wait();
  if (kScored && has_token) {
    const float entropy = slot.text() ? 0.0f : entropy_of_parts<kRowWarps>(parts[warp]);
    if (lane < num_blocks) inbox.send(lane, batch.entropy + slot.token, __float_as_uint(entropy));
    if (lane == 0) score.entropy[slot.token] = entropy;
    inbox.wait(0);
    if (!slot.text()) {
      const SegmentMoments moments = moments_of(sums_of(batch, num_tokens, members, count), inverse_count);
      slot.weight = weight_of(entropy, moments, args.weight.delta);
    }
  }
  if (has_token) {
    add_to_cell(args.histogram, slot);
    if (lane == 0) args.weight.weight[slot.token] = slot.weight;
    add_sums(slot, block_sums);
  }
  if (kScored) inbox.wait(0);  // nobody leaves while mail is on its way to it
  __syncthreads();
  if (threadIdx.x < kNumSums) {
    const int cells = in.policy.num_experts * 2 * num_buckets(in.policy.bucket_bits);
    atomicAdd(args.histogram.histogram + cells + threadIdx.x, block_sums[threadIdx.x]);
  }
}

template <class Element, int kVectors, bool kExact, int kThreads, bool kScored>
cudaError_t enqueue(const SmallHistogramArgs& args, bool& taken, cudaStream_t stream) {
  static int cached[kMaxDevices] = {};
  constexpr int kMaxRows = kRowsAhead * kThreads / (kRowWarps * kWarp);
  const auto kernel = small_histogram_kernel<Element, kVectors, kExact, kThreads, kScored>;
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
  if (whole && vectors == 2 * kPerVector) return enqueue<Element, 2, true, 1024, true>(args, taken, stream);
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
  if (score.hidden_states == nullptr) return enqueue<__nv_bfloat16, 2, true, 1024, false>(args, taken, stream);
  switch (score.dtype) {
    case DType::kFloat32: return enqueue<float>(args, taken, stream);
    case DType::kFloat16: return enqueue<__half>(args, taken, stream);
    case DType::kBFloat16: return enqueue<__nv_bfloat16>(args, taken, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace macs::cuda
