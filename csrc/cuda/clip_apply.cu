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
//              no other.
// Grid:        at most one block per SM, all at once (cooperative); fewer for few tokens, whose barriers
//              are cheaper. Only clipped tokens touch their logits. Rounds end when nothing was turned away.
// Determinism: ordered prefixes of integers; no result depends on thread order.
#include "assignments.cuh"
#include "grid.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "macs/cuda.h"
#include "plan/accept.cuh"
#include "plan/choose.cuh"
#include "plan/rounds.cuh"
#include "plan/threshold.cuh"
#include "replicas.cuh"
#include "shared_storage.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxExperts = 1024;

struct ThresholdApplyArgs {
  ClipThresholdParams threshold;
  ClipApplyParams apply;
  Logits order;  // what candidates are ordered by
  ApplySizes sizes;
  GridState* state;  // the CutBroadcast lies behind it
  void* scratch;
  Places places;             // of the instance for replicas, whose ids are physical
  ReplicaScratch replicas;
};

// One block, before any adds to them. num_counts: of an expert.
__device__ __forceinline__ void clear_counts(const ClipApplyParams& p, int num_counts) {
#pragma unroll 1
  for (int i = threadIdx.x; i < num_counts * p.in.policy.num_experts; i += kThreads) p.counts[i] = 0;
}

// The cuts as they are found: to all blocks as LL words, or behind a barrier.
struct StoreCuts {
  const ClipThresholdParams& p;
  RawCut* raw;
  const CutBroadcast& broadcast;
  unsigned epoch;  // 0: by a barrier

  __device__ __forceinline__ void shift(int expert, int shift) const {
    if (threadIdx.x % kWarp != 0) return;
    if (epoch != 0) broadcast.publish_shift(expert, shift, epoch);
    p.shift[expert] = shift;
  }
  __device__ __forceinline__ void cut(int n, const Cut& cut, int bound) const {
    if (epoch != 0) return broadcast.publish_cut(n, RawCut::of(cut, bound), epoch);
    if (threadIdx.x % kWarp == 0) raw[n] = RawCut::of(cut, bound);
  }
};

// Cuts, by all blocks together, and what follows from them, by each. Returns whether any bound is cut. Behind it the words
// are cleared and the counts zero, by the last block, which has no cuts to make where there are others.
__device__ __forceinline__ bool make_cuts(const ThresholdApplyArgs& args, const SharedStorage& storage,
                                          const Scratch& scratch, Grid& grid, int* levels) {
  __shared__ RawCut raw[kMaxLlBounds];
  const CutBroadcast broadcast(args.state, storage.experts);
  const bool by_words = storage.num_bounds <= kMaxLlBounds;
  const unsigned epoch = by_words ? grid.launch() : 0;
  if (blockIdx.x == gridDim.x - 1) {
    clear_counts(args.apply, 6);
    if (by_words) {
      scratch.clear_words(storage.num_bounds);
      broadcast.publish_ready(epoch);
    }
  }
  find_cuts(args.threshold, args.sizes.per_rank, levels, blockIdx.x, gridDim.x,
            StoreCuts{args.threshold, scratch.raw, broadcast, epoch});
  if (by_words) {
    broadcast.await_all(epoch, storage.num_bounds, storage.shift(), raw);
  } else {
    grid.barrier();
#pragma unroll 1
    for (int j = threadIdx.x; j < storage.experts; j += kThreads) storage.shift()[j] = args.threshold.shift[j];
  }
  return fill_bounds(args.threshold, storage, by_words ? raw : scratch.raw);
}

template <class Id>
struct Output {
  Id* ids;
  float* weights;
  __device__ __forceinline__ Output(const ClipApplyParams& p, const Slot& slot, const Step& step) {
    const int64_t index = slot.token * p.in.top_k + step.slot;
    ids = static_cast<Id*>(p.new_ids) + index;
    weights = p.new_weights + index;
  }
  __device__ __forceinline__ void set(int id, float weight) const { *ids = static_cast<Id>(id), *weights = weight; }
};

// A slot, its present id (>= 0 an expert, -1 unplaced, -2 - j a proposal) and its new weight. With replicas, `slot.expert` and j
// are logical, `current` and `sent` physical.
struct State {
  Slot slot;
  int current;
  float weight;
  bool in_registers;  // until the end; else its output slot holds it between the passes
  int sent;           // where the choice of replicas puts it
  bool moved;         // elsewhere than it was routed
};

// What every pass shares: the tokens of this warp, step by step, the first step kept in registers.
template <class Id, bool kReplicas>
struct Walk {
  const ClipApplyParams& p;
  const Logits& order;
  const ApplySizes& sizes;
  const Places& places;
  const void* chosen;  // [T, K]
  const SharedStorage storage;
  const Step step;
  int64_t begin, end;
  State first;

  __device__ __forceinline__ Walk(const ThresholdApplyArgs& args, const SharedStorage& b)
      : p(args.apply), order(args.order), sizes(args.sizes), places(args.places), chosen(args.replicas.chosen),
        storage(b), step(p.in.top_k, sizes.by_top_k) {
    const int warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
    begin = sizes.tokens_per_warp * warp + min(warp, sizes.longer_warps);
    end = begin + sizes.tokens_per_warp + (warp < sizes.longer_warps ? 1 : 0);
  }
  template <bool kWithWeight>
  __device__ __forceinline__ State load(int64_t at, bool in_registers) const {
    State state = {load_slot<Id, kWithWeight>(p.in, step, at, end), -1, 0.0f, in_registers, -1, false};
    if (kReplicas && !in_registers) choose(state);
    return state;
  }
  // From the physical id that was routed to the logical expert, and the replica that was chosen for it.
  __device__ __forceinline__ void choose(State& state) const {
    Slot& slot = state.slot;
    if (slot.expert < 0) return;
    state.sent = static_cast<int>(__ldcg(static_cast<const Id*>(chosen) + slot.token * p.in.top_k + step.slot));
    state.moved = state.sent != slot.expert;
    slot.expert = places.logical()[slot.expert];
  }
  // Before the wait: what is older than the chain of kernels. The weight is not, nor is the choice.
  __device__ __forceinline__ void load_first() { first = load<false>(begin, true); }
  __device__ __forceinline__ void load_weight() {
    if (first.slot.inside) first.slot.weight = p.in.weight[first.slot.token];
    if (kReplicas) choose(first);
  }
  // Of a slot that holds an assignment: its bound, the id that it goes out with, and an id's expert.
  __device__ __forceinline__ int bound_of(const State& state) const {
    return kReplicas ? sizes.by_rank.divide(state.sent) : storage.bound_of()[state.slot.expert];
  }
  __device__ __forceinline__ int id_of(const State& state) const { return kReplicas ? state.sent : state.slot.expert; }
  __device__ __forceinline__ int expert_of(int id) const { return kReplicas && id >= 0 ? places.logical()[id] : id; }

  __device__ __forceinline__ void put(State& state, int id, float weight) const {
    state.current = id, state.weight = weight;
    if (!state.in_registers) Output<Id>(p, state.slot, step).set(id, weight);
  }
  __device__ __forceinline__ void put(State& state, int id) const {
    state.current = id;
    if (!state.in_registers) *Output<Id>(p, state.slot, step).ids = static_cast<Id>(id);
  }
  // Last: a barrier would wait for stores sooner.
  __device__ __forceinline__ void write_first() const {
    if (first.slot.inside) Output<Id>(p, first.slot, step).set(first.current, first.weight);
  }

  // body(State&, first token of the step): changes a state by `put`.
  template <class Body>
  __device__ __forceinline__ void for_each(bool with_current, Body body) {
    if (begin < end) body(first, begin);
    for (int64_t at = begin + step.tokens; at < end; at += step.tokens) {
      State state = load<true>(at, false);
      if (with_current && state.slot.inside) state.current = static_cast<int>(*Output<Id>(p, state.slot, step).ids);
      body(state, at);
    }
  }
  __device__ __forceinline__ int units(const Slot& slot) const { return load_units(p.in.policy.load, slot.weight); }
  __device__ __forceinline__ int compare_to_cut(const State& state) const {
    const Slot& slot = state.slot;
    const int shift = storage.shift()[slot.expert];
    const int level = level_of(bucket_of_slot(p.in, slot), shift, slot.text(), p.in.policy);
    return level - storage.level()[bound_of(state)];
  }
  __device__ __forceinline__ void count(int kind, int expert, bool text) const {
    atomicAdd(storage.counts() + (kind * storage.experts + expert) * 2 + (text ? 1 : 0), 1);
  }
  // Whether an assignment that was routed stays.
  __device__ __forceinline__ void count_outcome(const State& state, bool stays) const {
    count(stays ? 0 : 1, state.slot.expert, state.slot.text());
    if (kReplicas && stays && state.moved) {
      atomicAdd(storage.moved(kWarps) + state.slot.expert * 2 + (state.slot.text() ? 1 : 0), 1);
    }
  }
};

// Keep what is above the cut, clip what is below, count units at it. Returns whether the warp has any there.
template <class Walk>
__device__ __forceinline__ bool clip_pass(Walk& walk) {
  bool any = false;
  walk.for_each(false, [&](State& state, int64_t) {
    const Slot& slot = state.slot;
    if (!slot.inside) return;
    const int side = slot.expert < 0 ? 1 : walk.compare_to_cut(state);
    walk.put(state, side < 0 ? -1 : walk.id_of(state), side < 0 ? 0.0f : slot.gate);
    if (side == 0) {
      any = true;
      atomicAdd(walk.storage.own_running() + walk.bound_of(state), walk.units(slot));
    } else if (slot.expert >= 0) {
      walk.count_outcome(state, side > 0);
    }
  });
  return __any_sync(kFullMask, any);
}

// The assignments at the cut, in order, up to the quota.
template <class Walk>
__device__ __forceinline__ void quota_pass(Walk& walk) {
  const bool rows = walk.p.in.policy.load == Load::kRows;
  walk.for_each(true, [&](State& state, int64_t) {
    const Slot& slot = state.slot;
    const bool pending = slot.expert >= 0 && walk.compare_to_cut(state) == 0;
    const int bound = pending ? walk.bound_of(state) : 0;
    const int64_t limit = static_cast<int64_t>(walk.storage.quota()[bound]) - walk.storage.base()[bound];
    const bool stays = accept_in_order(pending, bound, walk.units(slot), rows, walk.storage.own_running(), limit);
    if (!pending) return;
    if (!stays) walk.put(state, -1, 0.0f);
    walk.count_outcome(state, stays);
  });
}

// Proposals of a round: the unplaced slots of every token of this warp, two tokens at a time as far as registers go.
template <int kKeys, class Walk>
__device__ __forceinline__ void propose_pass(Walk& walk) {
  constexpr int kTokensAtOnce = kKeys <= 4 ? 2 : 1;
  constexpr bool kAhead = kTokensAtOnce > 1;  // the next ones' logits fit into the registers, too
  const ClipApplyParams& p = walk.p;
  const SharedStorage& storage = walk.storage;
  const int top_k = p.in.top_k, experts = storage.experts, per_rank = walk.sizes.per_rank;
  const unsigned slots = top_k == kWarp ? kFullMask : (1u << top_k) - 1u;
  const Headroom<kKeys> headroom(experts, storage.headroom(), storage.bound_of());
  storage.clear_own_running();
  walk.for_each(true, [&](State& state, int64_t first) {
    const Slot& slot = state.slot;
    unsigned left = __ballot_sync(kFullMask, slot.expert >= 0 && state.current < 0);
    if (left == 0) return;
    const bool local = p.in.policy.reroute == Reroute::kLocal && slot.expert >= 0;
    const int from = local ? storage.rank_of()[slot.expert] * per_rank : -1, units = walk.units(slot);
    const auto take = [&](UnplacedToken<kKeys>(&tokens)[kTokensAtOnce]) {
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        const int token = left != 0 ? walk.sizes.by_top_k.divide(__ffs(left) - 1) : 0;
        const unsigned of_token = slots << (token * top_k);
        const bool mine = walk.step.used && walk.step.token_lane == token;
        tokens[t].unplaced = left & of_token;
        left &= ~of_token;
        tokens[t].original = mine ? slot.expert : -1, tokens[t].current = mine ? walk.expert_of(state.current) : -1;
        tokens[t].from = from, tokens[t].units = __shfl_sync(kFullMask, units, token * top_k);
        if (tokens[t].unplaced != 0) load_logits<kKeys>(walk.order, experts, first + token, tokens[t].logits);
      }
    };
    UnplacedToken<kKeys> tokens[kTokensAtOnce];
    take(tokens);
    int choice = -1;
    for (bool more = true; more;) {
      more = left != 0;
      UnplacedToken<kKeys> next[kTokensAtOnce];
      if (more && kAhead) take(next);  // on their way meanwhile
      choice = max(choice, choose<kTokensAtOnce, kKeys>(headroom, tokens, per_rank, storage.own_struck()));
      if constexpr (kAhead) {
#pragma unroll
        for (int t = 0; t < kTokensAtOnce; ++t) tokens[t] = next[t];
      } else if (more) {
        take(tokens);
      }
    }
    if (choice >= 0) {
      walk.put(state, -2 - choice);
      atomicAdd(storage.own_running() + storage.bound_of()[choice], units);
    }
  });
}

// Behind a barrier of the block, and before one. The home of an expert is its place with most headroom, on the lowest rank among
// equals: `bound_of` is its rank then, `rank_of` its physical id.
__device__ __forceinline__ void find_homes(const Places& places, const SharedStorage& storage) {
#pragma unroll 1
  for (int j = threadIdx.x; j < storage.experts; j += kThreads) {
    int home = places.first()[j];
#pragma unroll 1
    for (int i = home + 1; i < places.first()[j + 1]; ++i) {
      if (storage.headroom()[places.rank()[i]] > storage.headroom()[places.rank()[home]]) home = i;
    }
    storage.bound_of()[j] = places.rank()[home], storage.rank_of()[j] = places.physical()[home];
  }
  __syncthreads();
}

// This source's cuts from what it sends to the ranks that are exceeded, by each block. Returns whether any bound is cut.
__device__ __forceinline__ bool fill_replica_bounds(const ThresholdApplyArgs& args, const SharedStorage& storage) {
  const Policy& policy = args.threshold.policy;
  const int num_levels = 2 * num_buckets(policy.bucket_bits), lane = threadIdx.x % kWarp;
  Kept stake = {0, 0};
#pragma unroll 1
  for (int r = 0; r < storage.num_bounds; ++r) {
    stake.group += args.replicas.stakes[r].group, stake.own += args.replicas.stakes[r].own;
  }
  bool any = false;
#pragma unroll 1
  for (int j = threadIdx.x; j < storage.experts; j += kThreads) storage.shift()[j] = args.threshold.shift[j];
#pragma unroll 1
  for (int r = threadIdx.x / kWarp; r < storage.num_bounds; r += kWarps) {
    const RankLimit limit = args.replicas.limits[r];
    int4 cut = make_int4(-1, 0, own_headroom(policy, limit.room, stake), limit.bound);
    if (limit.limit != kNotExceeded) {
      int32_t* const levels = args.replicas.levels + r * num_levels;
      const Cut own = warp_find_cut<2 * (kOctaves << kMaxBucketBits) / kWarp>({levels, levels}, num_levels, limit.limit);
      cut.x = own.level < 0 ? limit.first - 1 : own.level, cut.y = own.level < 0 ? 0 : own.quota;
    }
    any |= cut.x >= 0;
    if (lane != 0) continue;
    storage.level()[r] = cut.x, storage.quota()[r] = cut.y, storage.headroom()[r] = cut.z;
    if (blockIdx.x == 0) reinterpret_cast<int4*>(args.threshold.cut)[r] = cut;
  }
  return __syncthreads_or(any) != 0;
}

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
  Walk<Id, kReplicas> walk(args, storage);
  walk.load_first();
  clear_storage(p, args.sizes, storage);
  if constexpr (kReplicas) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * storage.experts; i += kThreads) storage.moved(kWarps)[i] = 0;
  }
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
  } else {
    if (blockIdx.x == 0) clear_counts(p, kReplicas ? 2 * kReplicaCounts : 6);
    if constexpr (kReplicas) {
      cut = fill_replica_bounds(args, storage);
    } else {
      cut = fill_bounds(p, storage);
    }
  }
  const bool at_cut = clip_pass(walk);
  if (cut) {
    grid_prefix<kWithThreshold>(args.sizes, storage, scratch, grid, 0);
    if (at_cut) quota_pass(walk);
    GridTeam<Id, kKeys, kWithThreshold, kReplicas> team = {walk, scratch, grid};
    reroute_rounds(team, p.in.policy, p.router_logits);
  } else if (!kWithThreshold) {
    grid.barrier();  // the counts are zero
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

// One token per warp, until every SM has a block; a block per rank has its levels to add up.
int grid_blocks(const ClipApplyParams& p) {
  const int64_t blocks = (p.in.num_tokens + kWarps - 1) / kWarps;
  const int64_t wanted = blocks > p.in.policy.num_ranks ? blocks : p.in.policy.num_ranks;
  return static_cast<int>(wanted < num_sms() ? wanted : num_sms());
}

template <class Id, int kKeys, bool kWithThreshold, bool kReplicas>
cudaError_t enqueue(const ThresholdApplyArgs& args, cudaStream_t stream) {
  static bool raised[kMaxDevices] = {};
  const ClipApplyParams& p = args.apply;
  const auto kernel = clip_apply_kernel<Id, kKeys, kWithThreshold, kReplicas>;
  size_t bytes = SharedStorage::bytes(p.in.policy.num_experts, num_bounds(p.in.policy), kWarps);
  if (kReplicas) bytes += 2 * sizeof(int) * p.in.policy.num_experts;
  if (kWithThreshold) bytes += threshold_shared_bytes(args.threshold, kWarps);
  const int most = max_shared_bytes() - static_cast<int>(kMaxLlBounds * sizeof(RawCut));
  if (bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  const cudaError_t error = raise_shared_limit(kernel, most, raised);
  if (error != cudaSuccess) return error;
  const Shape shape = {
      .grid = grid_blocks(p), .block = kThreads, .shared_bytes = bytes, .overlap = true, .cooperative = true};
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
  const int64_t warps = static_cast<int64_t>(grid_blocks(apply)) * kWarps;
  const Logits order = apply.selection != nullptr ? Logits{apply.selection, DType::kFloat32}
                                                  : Logits{apply.router_logits, apply.logits_dtype};
  ClipApplyParams by_id = apply;
  if (places.any()) by_id.in.policy.num_experts = places.num_physical;
  const ApplySizes sizes = ApplySizes::of(by_id, warps, kThreads);
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
  cudaError_t error = enqueue_replica_balance({threshold, places, rank_rows, args.replicas}, stream);
  if (error != cudaSuccess) return error;
  const int64_t cells = 2LL * places.num_experts * num_buckets(threshold.policy.bucket_bits);
  error = enqueue_replica_choose({apply.in, places, threshold.group + cells + kNumSums, threshold.shift, args.replicas}, stream);
  return error == cudaSuccess ? enqueue_clip_apply<false, true>(args, stream) : error;
}

}  // namespace macs::cuda
