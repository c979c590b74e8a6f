// load_histogram: units per (expert, text, importance bucket), and the four sums behind them.
//
// Problem:     T * K assignments into E * 2 * B integer cells (32768 at E = B = 128).
// Algorithm:   one assignment per lane, one reduction into L2 each: the cells are many and evenly hit, and no block has
//              to clear or merge a private copy of 128 KB. Fused with the weights (launch_score_histogram) a lane first
//              finishes its token's weight from the segment sums, or takes 0.5 where nothing was scored.
// Grid:        warps walk whole tokens (assignments.cuh), 8 warps per block, at most 4 blocks per SM.
// Determinism: integer additions only.
#include "assignments.cuh"
#include "cut_broadcast.cuh"
#include "histogram.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "macs/cuda.h"
#include "replicas.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Where a token's weight comes from: it is an input; from its entropy; or it is 0.5, and 1 for text.
enum class Weights { kGiven, kFromEntropy, kEqual };

template <class Id, Weights kWeights>
__global__ void __launch_bounds__(kThreads) load_histogram_kernel(const __grid_constant__ LoadHistogramArgs args) {
  constexpr bool kGiven = kWeights == Weights::kGiven, kFromEntropy = kWeights == Weights::kFromEntropy;
  start_dependents();
  __shared__ SegmentMoments table[kFromEntropy ? kFewSegments : 1];
  const Assignments& in = args.p.in;
  const Step step(in.top_k);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps * step.tokens;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * step.tokens;
  // The weight is an input older than this chain unless it is made here: the first loads need not wait.
  Slot slot = load_slot<Id, kGiven>(in, step, first, in.num_tokens);
  wait_for_previous();
  if (kFromEntropy && args.layout.copies > 1) {
    for (int s = threadIdx.x / kWarp; s < args.weight.num_segments; s += kWarps) {
      const SegmentMoments moments = warp_moments(args.layout, s);
      if (threadIdx.x % kWarp == 0) table[s] = moments;
    }
    __syncthreads();
  }
  Sums sums;
  for (; first < in.num_tokens; first += stride) {
    const Slot next = load_slot<Id, kGiven>(in, step, first + stride, in.num_tokens);
    const bool leader = slot.inside && step.slot == 0;
    if (!kGiven && slot.inside) {
      slot.weight = plain_weight(slot.segment);
      if (kFromEntropy && !slot.text()) {
        const bool few = args.layout.copies > 1;
        const SegmentMoments moments = few ? table[slot.segment] : moments_of(args.layout.sums[slot.segment]);
        slot.weight = weight_of(args.weight.entropy[slot.token], moments, args.weight.delta);
      }
      if (leader) args.weight.weight[slot.token] = slot.weight;
    }
    const unsigned filled = __ballot_sync(kFullMask, slot.expert >= 0);
    sums.add(slot, leader, step.used && (filled & step.token_mask(in.top_k)) != 0);
    add_to_cell(args.p, slot);
    slot = next;
  }
  sums.flush(args.p);
}

}  // namespace

template <Weights kWeights>
static cudaError_t enqueue_for_ids(const LoadHistogramArgs& args, const Shape& shape, cudaStream_t stream) {
  const bool wide = args.p.in.ids_are_i64;
  const auto kernel = wide ? load_histogram_kernel<int64_t, kWeights> : load_histogram_kernel<int32_t, kWeights>;
  return launch(kernel, shape, args, stream);
}

cudaError_t enqueue_load_histogram(const LoadHistogramArgs& args, cudaStream_t stream, bool overlap) {
  const Assignments& in = args.p.in;
  if (in.num_tokens == 0) return cudaSuccess;
  if (in.top_k < 1 || in.top_k > kWarp) return cudaErrorInvalidValue;
  const int64_t tokens_per_block = kWarps * (kWarp / in.top_k);
  const int64_t blocks = (in.num_tokens + tokens_per_block - 1) / tokens_per_block;
  const int64_t most = static_cast<int64_t>(num_sms()) * 4;
  const Shape shape = {.grid = static_cast<int>(blocks < most ? blocks : most), .block = kThreads, .overlap = overlap};
  if (args.layout.sums != nullptr) return enqueue_for_ids<Weights::kFromEntropy>(args, shape, stream);
  if (args.weight.weight != nullptr) return enqueue_for_ids<Weights::kEqual>(args, shape, stream);
  return enqueue_for_ids<Weights::kGiven>(args, shape, stream);
}

static int64_t histogram_bytes(const Assignments& in) {
  const int64_t cells = static_cast<int64_t>(in.policy.num_experts) * 2 * num_buckets(in.policy.bucket_bits);
  return (cells + kNumSums) * sizeof(int32_t);
}

cudaError_t launch_load_histogram(const LoadHistogramParams& p, cudaStream_t stream) {
  const cudaError_t error = enqueue_zero({p.histogram, nullptr, histogram_bytes(p.in), 0}, stream);
  return error == cudaSuccess ? enqueue_load_histogram({.p = p, .weight = {}, .layout = {}}, stream) : error;
}

cudaError_t launch_score_histogram(const EntropyScoreParams& score, const EntropyWeightParams& weight,
                                   const LoadHistogramParams& histogram, void* workspace, cudaStream_t stream,
                                   const Places& places) {
  LoadHistogramArgs args = {.p = histogram, .weight = weight, .layout = {}};
  ZeroArgs zero = {histogram.histogram, workspace, histogram_bytes(histogram.in), 0};
  const ReplicaScratch scratch(histogram.in, places, workspace);
  const ReplicaCountArgs count = {histogram.in, places, histogram.histogram + zero.first_bytes / 4, scratch};
  if (places.any()) {
    zero.first_bytes += 4 * replica_exchange_size(places);
    zero.second = static_cast<char*>(workspace) + ReplicaScratch::bytes(histogram.in, places);
    args.p.in.topk_ids = scratch.logical, args.p.in.ids_are_i64 = false;
  }
  // For threshold_apply.
  zero.second_bytes = static_cast<int64_t>(prepared_bytes(histogram.in.policy.num_experts));
  const bool scored = score.hidden_states != nullptr;
  if (scored) {
    args.layout = SumsLayout::of(static_cast<char*>(zero.second) + zero.second_bytes, weight.num_segments);
    zero.second_bytes += args.layout.bytes();
  }
  cudaError_t error = enqueue_zero(zero, stream);
  if (error == cudaSuccess && places.any()) error = enqueue_replica_count(count, stream);
  if (error == cudaSuccess && scored) error = enqueue_entropy_score({.p = score, .layout = args.layout}, true, stream);
  if (error != cudaSuccess) return error;
  return enqueue_load_histogram(args, stream, !places.any());
}

}  // namespace macs::cuda
