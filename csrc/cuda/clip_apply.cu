// clip_apply: clip at the cut levels, re-route what was clipped, drop the rest. And threshold_apply: the cuts and this
// in one launch.
//
// Problem:     T * K assignments, each of which needs its place in (token, slot) order among those of its bound that
//              stand at the cut level, and again in every round among those that propose the same bound.
// Algorithm:   the grid's W warps own T / W tokens each, in order, the first T mod W of them one more. Each ordered
//              acceptance is two passes: a pass adds up units per (warp, bound) in shared memory, these become prefixes
//              over all blocks by a grid barrier, or by LL words (shared_storage.cuh), and a second pass hands the
//              places out in order (match_any inside a step); the cuts before them are LL words, too (cut_broadcast.cuh).
//              Between the passes an assignment's state is its own output slot: -1 = unplaced, -2 - j = wants expert
//              j. Slots of a warp's first step stay in registers and are written last: up to about 8000 tokens there is
//              no other. With replicas an assignment's place is found first (replica_choose.cuh).
// Grid:        at most one block per SM, all at once (cooperative); fewer for few tokens, whose barriers
//              are cheaper. Only clipped tokens touch their logits. Rounds end when nothing was turned away.
// Determinism: ordered prefixes of integers; no result depends on thread order.
#include "clip_cuts.cuh"
#include "clip_passes.cuh"
#include "clip_walk.cuh"
#include "macs/cuda.h"
#include "plan/rounds.cuh"
#include "replica_choose.cuh"

namespace macs::cuda {
namespace {

// The blocks of a grid, whose warps own the tokens of a rank: what rounds.cuh asks of them.
template <class Id, int kKeys, bool kLlWords, bool kReplicas>
struct GridTeam {
  Walk<Id, kReplicas>& walk;
  const Scratch& scratch;
  Grid& grid;

  __device__ __forceinline__ bool propose(int round) {
    if (kReplicas) find_homes(walk.places, walk.storage);
    propose_pass<kKeys>(walk);
    grid_prefix<kLlWords>(walk.sizes, walk.storage, scratch, grid, round + 1);
    return true;
  }
  template <class Body>
  __device__ __forceinline__ void for_each_proposal(Body body) {
    walk.for_each(true, [&](State& state, int64_t) {
      body(state, state.slot.expert >= 0 ? -2 - state.current : -1, walk.units(state.slot));
    });
  }
  __device__ __forceinline__ void settle(State& state, int expert, bool accepted) {
    const ClipApplyParams& p = walk.p;
    const Slot& slot = state.slot;
    const Reference reference = reference_of(slot.expert, slot.gate, walk.step.first_lane(p.in.top_k), p.in.top_k);
    if (expert < 0) return;
    if (!accepted) return walk.put(state, -1);
    const Logits logits = {p.router_logits, p.logits_dtype};
    const int64_t row = slot.token * p.in.policy.num_experts;
    const float to = logits.at(row + expert), from = logits.at(row + reference.expert);
    walk.put(state, kReplicas ? walk.storage.rank_of()[expert] : expert,
             rerouted_weight(p.in.policy.scoring, reference.gate, to, from));
    walk.count(2, expert, slot.text());
  }
  __device__ __forceinline__ int num_bounds() const { return walk.storage.num_bounds; }
  __device__ __forceinline__ int bound_of(int expert) const { return walk.storage.bound_of()[expert]; }
  __device__ __forceinline__ int64_t limit(int bound) const {
    return static_cast<int64_t>(walk.storage.headroom()[bound]) - walk.storage.base()[bound];
  }
  __device__ __forceinline__ int* running() const { return walk.storage.own_running(); }
  __device__ __forceinline__ const int* proposed() const { return walk.storage.total(); }
  __device__ __forceinline__ int* headroom() const { return walk.storage.headroom(); }
  __device__ __forceinline__ int* accepted() const { return walk.storage.accepted(); }
  __device__ __forceinline__ const int* sum_accepted() {
    grid_sum_accepted(walk.storage, scratch, grid);
    return walk.storage.total();
  }
};

template <class Id, int kKeys, bool kWithThreshold, bool kReplicas>
__global__ void __launch_bounds__(kThreads, 1) clip_apply_kernel(const __grid_constant__ ThresholdApplyArgs args) {
  unsigned char* const shared = dynamic_shared();
  start_dependents();
  const ClipApplyParams& p = args.apply;
  // The cuts' levels lie before the storage: both are needed at once.
  const SharedStorage storage(p, shared + (kWithThreshold ? threshold_shared_bytes(args.threshold, kWarps) : 0));
  Grid grid(args.state);
  const Scratch scratch(args.scratch, storage.num_bounds, gridDim.x);
  Places places = args.places;
  int* const tables = storage.moved(kWarps) + 2 * storage.experts;  // with replicas: a copy of `places`, then the numbers
  if constexpr (kReplicas) {
    places = copied(args.places, tables);
    clear_numbers(Numbers(tables, places));
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * storage.experts; i += kThreads) storage.moved(kWarps)[i] = 0;
    __syncthreads();
  }
  Walk<Id, kReplicas> walk(args, storage, places);
  walk.load_first();
  clear_storage(p, args.sizes, storage);
  if constexpr (kReplicas) count_own_rows(walk, Numbers(tables, places));
  int* const levels = reinterpret_cast<int*>(shared);
  if constexpr (kWithThreshold) {
    clear_levels(args.threshold, levels);
    __syncthreads();
  }
  wait_for_previous();
  walk.load_weight();
  bool cut;
  if constexpr (kWithThreshold) {
    cut = make_cuts(args, storage, scratch, grid, levels);
  } else if constexpr (kReplicas) {
    if (choose_places(args, walk, Numbers(tables, places))) grid.barrier();  // in all blocks or none
    cut = fill_replica_bounds(args, storage);
  } else {
    if (blockIdx.x == 0) clear_counts(p);
    cut = fill_bounds(p, storage);
  }
  const bool at_cut = clip_pass(walk);
  if (cut) {
    grid_prefix<kWithThreshold>(args.sizes, storage, scratch, grid, 0);
    if (at_cut) quota_pass(walk);
    GridTeam<Id, kKeys, kWithThreshold, kReplicas> team = {walk, scratch, grid};
    reroute_rounds(team, p.in.policy, p.router_logits);
  } else if (!kWithThreshold && !kReplicas) {
    grid.barrier();  // the counts are zero; replica_balance.cu, before, has cleared those with replicas
  }
  walk.write_first();
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < 6 * storage.experts; i += kThreads) {
    if (storage.counts()[i] != 0) atomicAdd(p.counts + i, storage.counts()[i]);
  }
  if constexpr (kReplicas) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * storage.experts; i += kThreads) {
      if (storage.moved(kWarps)[i] != 0) atomicAdd(p.counts + 6 * storage.experts + i, storage.moved(kWarps)[i]);
    }
  }
  grid.leave();
}

template <class Id, int kKeys, bool kWithThreshold, bool kReplicas>
cudaError_t enqueue(const ThresholdApplyArgs& args, cudaStream_t stream) {
  static bool raised[kMaxDevices] = {};
  const ClipApplyParams& p = args.apply;
  const auto kernel = clip_apply_kernel<Id, kKeys, kWithThreshold, kReplicas>;
  size_t bytes = SharedStorage::bytes(p.in.policy.num_experts, num_bounds(p.in.policy), kWarps);
  if (kReplicas) bytes += 2 * sizeof(int) * p.in.policy.num_experts + Numbers::bytes(args.places);
  if (kWithThreshold) bytes += threshold_shared_bytes(args.threshold, kWarps);
  const int most = max_shared_bytes() - static_cast<int>(kMaxLlBounds * sizeof(RawCut));
  if (bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  const cudaError_t error = raise_shared_limit(kernel, most, raised);
  if (error != cudaSuccess) return error;
  const Shape shape = {
      .grid = share_blocks(p.in), .block = kThreads, .shared_bytes = bytes, .overlap = true, .cooperative = true};
  return launch(kernel, shape, args, stream);
}

template <class Id, bool kWithThreshold, bool kReplicas>
cudaError_t enqueue_by_experts(const ThresholdApplyArgs& args, cudaStream_t stream) {
  const int experts = args.apply.in.policy.num_experts;
  if (experts <= 4 * kWarp) return enqueue<Id, 4, kWithThreshold, kReplicas>(args, stream);
  if (experts <= 8 * kWarp) return enqueue<Id, 8, kWithThreshold, kReplicas>(args, stream);
  if (experts <= 16 * kWarp) return enqueue<Id, 16, kWithThreshold, kReplicas>(args, stream);
  return enqueue<Id, 32, kWithThreshold, kReplicas>(args, stream);
}

template <bool kWithThreshold, bool kReplicas = false>
cudaError_t enqueue_clip_apply(const ThresholdApplyArgs& args, cudaStream_t stream) {
  const Assignments& in = args.apply.in;
  if (in.top_k < 1 || in.top_k > kWarp || in.policy.num_experts > kMaxExperts) return cudaErrorInvalidValue;
  return in.ids_are_i64 ? enqueue_by_experts<int64_t, kWithThreshold, kReplicas>(args, stream)
                        : enqueue_by_experts<int32_t, kWithThreshold, kReplicas>(args, stream);
}

// Scratch begins where the sums did, which are over by then.
ThresholdApplyArgs args_of(const ClipThresholdParams& threshold, const ClipApplyParams& apply, void* workspace,
                           const Places& places = {}) {
  const ReplicaScratch replicas(apply.in, places, workspace);
  char* const prepared = static_cast<char*>(workspace) + (places.any() ? ReplicaScratch::bytes(apply.in, places) : 0);
  const Logits order = apply.selection != nullptr ? Logits{apply.selection, DType::kFloat32}
                                                  : Logits{apply.router_logits, apply.logits_dtype};
  ClipApplyParams by_id = apply;
  if (places.any()) by_id.in.policy.num_experts = places.num_physical;
  const ApplySizes sizes = ApplySizes::of(by_id, share_blocks(apply.in), kThreads);
  void* const scratch = prepared + prepared_bytes(apply.in.policy.num_experts);
  return {threshold, apply, order, sizes, reinterpret_cast<GridState*>(prepared), scratch, places, replicas};
}

}  // namespace

size_t clip_apply_workspace_bytes(const ClipApplyParams& p) {
  return prepared_bytes(p.in.policy.num_experts) +
         Scratch::bytes(num_bounds(p.in.policy), num_sms());
}

cudaError_t launch_clip_apply(const ClipApplyParams& p, void* workspace, cudaStream_t stream) {
  const cudaError_t error = enqueue_zero({workspace, nullptr, sizeof(GridState), 0}, stream);
  if (error != cudaSuccess) return error;
  return enqueue_clip_apply<false>(args_of({}, p, workspace), stream);
}

size_t plan_workspace_bytes(const EntropyWeightParams& weight, const ClipApplyParams& apply, const Places& places) {
  const size_t replicas = places.any() ? ReplicaScratch::bytes(apply.in, places) : 0;
  const size_t sums = prepared_bytes(apply.in.policy.num_experts) + entropy_weight_workspace_bytes(weight);
  const size_t scratch = clip_apply_workspace_bytes(apply);
  return replicas + (sums > scratch ? sums : scratch);
}

cudaError_t launch_threshold_apply(const ClipThresholdParams& threshold, const ClipApplyParams& apply, void* workspace,
                                   cudaStream_t stream, const Places& places, int32_t* rank_rows) {
  const ThresholdApplyArgs args = args_of(threshold, apply, workspace, places);
  if (!places.any()) return enqueue_clip_apply<true>(args, stream);
  const cudaError_t error = enqueue_replica_balance({threshold, places, rank_rows, apply.counts, args.replicas}, stream);
  return error == cudaSuccess ? enqueue_clip_apply<false, true>(args, stream) : error;
}

}  // namespace macs::cuda