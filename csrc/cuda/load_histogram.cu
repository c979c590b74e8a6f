// load_histogram: units per (expert, text, importance bucket), and the four sums behind them.
//
// Problem:     T * K assignments into E * 2 * B integer cells (32768 at E = B = 128).
// Algorithm:   one assignment per lane, one reduction into L2 each: the cells are many and evenly hit, and no block has
//              to clear or merge a private copy of 128 KB. Fused with the weights (launch_score_histogram) a lane first
//              finishes its token's weight from the segment sums, or takes 0.5 where nothing was scored.
//              With places it also maps ids to logical experts, and counts in shared memory the rows of each block by
//              replicated expert and by rank as routed.
// Grid:        warps walk whole tokens (assignments.cuh), 8 warps per block, at most 4 blocks per SM. With places the
//              grid of clip_apply.cu, which numbers what the blocks counted.
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

// A block's rows with places, in shared memory: [X, 2] of each replicated expert, then [R] of each rank as routed.
struct PlacedRows {
  const Places& places;
  int* rows;

  static __host__ __device__ int size(const Places& p) { return 2 * p.redundant() + p.num_ranks; }
  __device__ __forceinline__ int keys() const { return 2 * places.redundant(); }

  // A barrier has to follow.
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < size(places); i += blockDim.x) rows[i] = 0;
  }
  // The slot's id becomes its logical expert.
  __device__ __forceinline__ void add(Slot& slot) const {
    if (slot.expert < 0) return;
    atomicAdd(rows + keys() + places.rank_of(slot.expert), 1);
    slot.expert = places.logical()[slot.expert];
    const int row = places.row()[slot.expert];
    if (row >= 0) atomicAdd(rows + replica_key(row, slot.text()), 1);
  }
  // Behind a barrier. tail: of the histogram.
  __device__ __forceinline__ void flush(int32_t* tail, int32_t* block_counts) const {
    int32_t* const own = tail + places.num_ranks + keys() * places.own_rank();
    for (int i = threadIdx.x; i < keys(); i += blockDim.x) {
      block_counts[blockIdx.x * keys() + i] = rows[i];
      if (rows[i] != 0) atomicAdd(own + i, rows[i]);
    }
    for (int r = threadIdx.x; r < places.num_ranks; r += blockDim.x) {
      if (rows[keys() + r] != 0) atomicAdd(tail + r, rows[keys() + r]);
    }
  }
};

template <class Id, Weights kWeights, bool kPlaces>
__global__ void __launch_bounds__(kPlaces ? kShareThreads : kThreads)
    load_histogram_kernel(const __grid_constant__ LoadHistogramArgs args) {
  constexpr bool kGiven = kWeights == Weights::kGiven, kFromEntropy = kWeights == Weights::kFromEntropy;
  constexpr int kWarps = (kPlaces ? kShareThreads : kThreads) / kWarp;
  start_dependents();
  __shared__ SegmentMoments table[kFromEntropy ? kFewSegments : 1];
  const Assignments& in = args.p.in;
  const Step step(in.top_k);
  const int warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int64_t stride = kPlaces ? step.tokens : static_cast<int64_t>(gridDim.x) * kWarps * step.tokens;
  const int64_t end = kPlaces ? args.shares.end(warp) : in.num_tokens;
  int64_t first = kPlaces ? args.shares.begin(warp) : static_cast<int64_t>(warp) * step.tokens;
  const PlacedRows placed = {args.places, kPlaces ? reinterpret_cast<int*>(dynamic_shared()) : nullptr};
  if (kPlaces) {
    placed.clear();
    __syncthreads();
  }
  const auto load = [&](int64_t at) {
    Slot slot = load_slot<Id, kGiven>(in, step, at, end);
    if (kPlaces) placed.add(slot);
    return slot;
  };
  // The weight is an input older than this chain unless it is made here: the first loads need not wait.
  Slot slot = load(first);
  wait_for_previous();
  if (kFromEntropy && args.layout.copies > 1) {
    for (int s = threadIdx.x / kWarp; s < args.weight.num_segments; s += kWarps) {
      const SegmentMoments moments = warp_moments(args.layout, s);
      if (threadIdx.x % kWarp == 0) table[s] = moments;
    }
    __syncthreads();
  }
  Sums sums;
  for (; first < end; first += stride) {
    const Slot next = load(first + stride);
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
  if (kPlaces) placed.flush(args.p.histogram + histogram_size(in.policy), args.block_counts);
}

}  // namespace

template <Weights kWeights, bool kPlaces = false>
static cudaError_t enqueue_for_ids(const LoadHistogramArgs& args, const Shape& shape, cudaStream_t stream) {
  const bool wide = args.p.in.ids_are_i64;
  const auto kernel =
      wide ? load_histogram_kernel<int64_t, kWeights, kPlaces> : load_histogram_kernel<int32_t, kWeights, kPlaces>;
  return launch(kernel, shape, args, stream);
}

// Also of no tokens: their blocks' counts are read.
static cudaError_t enqueue_with_places(LoadHistogramArgs args, cudaStream_t stream) {
  const int blocks = share_blocks(args.p.in);
  args.shares = TokenShares::of(args.p.in.num_tokens, blocks);
  const size_t bytes = sizeof(int) * PlacedRows::size(args.places);
  const Shape shape = {.grid = blocks, .block = kShareThreads, .shared_bytes = bytes, .overlap = true};
  if (args.layout.sums != nullptr) return enqueue_for_ids<Weights::kFromEntropy, true>(args, shape, stream);
  return enqueue_for_ids<Weights::kEqual, true>(args, shape, stream);
}

cudaError_t enqueue_load_histogram(const LoadHistogramArgs& args, cudaStream_t stream) {
  const Assignments& in = args.p.in;
  if (in.top_k < 1 || in.top_k > kWarp) return cudaErrorInvalidValue;
  if (args.places.any()) return enqueue_with_places(args, stream);
  if (in.num_tokens == 0) return cudaSuccess;
  const int64_t tokens_per_block = kWarps * (kWarp / in.top_k);
  const int64_t blocks = (in.num_tokens + tokens_per_block - 1) / tokens_per_block;
  const int64_t most = static_cast<int64_t>(num_sms()) * 4;
  const Shape shape = {.grid = static_cast<int>(blocks < most ? blocks : most), .block = kThreads, .overlap = true};
  if (args.layout.sums != nullptr) return enqueue_for_ids<Weights::kFromEntropy>(args, shape, stream);
  if (args.weight.weight != nullptr) return enqueue_for_ids<Weights::kEqual>(args, shape, stream);
  return enqueue_for_ids<Weights::kGiven>(args, shape, stream);
}

static int64_t histogram_bytes(const Assignments& in) { return histogram_size(in.policy) * sizeof(int32_t); }

cudaError_t launch_load_histogram(const LoadHistogramParams& p, cudaStream_t stream) {
  const cudaError_t error = enqueue_zero({p.histogram, nullptr, histogram_bytes(p.in), 0}, stream);
  return error == cudaSuccess ? enqueue_load_histogram({.p = p, .weight = {}, .layout = {}}, stream) : error;
}

cudaError_t launch_score_histogram(const EntropyScoreParams& score, const EntropyWeightParams& weight,
                                   const LoadHistogramParams& histogram, void* workspace, cudaStream_t stream,
                                   const Places& places) {
  LoadHistogramArgs args = {.p = histogram, .weight = weight, .layout = {}};
  ZeroArgs zero = {histogram.histogram, workspace, histogram_bytes(histogram.in), 0};
  if (places.any()) {
    zero.first_bytes += 4 * replica_exchange_size(places);
    zero.second = static_cast<char*>(workspace) + ReplicaScratch::bytes(histogram.in, places);
    args.places = places, args.block_counts = ReplicaScratch(histogram.in, places, workspace).block_counts;
  }
  // For threshold_apply.
  zero.second_bytes = static_cast<int64_t>(prepared_bytes(histogram.in.policy.num_experts));
  const bool scored = score.hidden_states != nullptr;
  if (scored) {
    args.layout = SumsLayout::of(static_cast<char*>(zero.second) + zero.second_bytes, weight.num_segments);
    zero.second_bytes += args.layout.bytes();
  }
  cudaError_t error = enqueue_zero(zero, stream);
  if (error == cudaSuccess && scored) error = enqueue_entropy_score({.p = score, .layout = args.layout}, true, stream);
  if (error != cudaSuccess) return error;
  return enqueue_load_histogram(args, stream);
}

}  // namespace macs::cuda
