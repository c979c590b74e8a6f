// clip_apply: clip at the cut levels, re-route what was clipped, drop the rest. And threshold_apply: the cuts and this
// in one launch.
//
// Problem:     T * K assignments, each of which needs its place in (token, slot) order among those of its bound that
//              stand at the cut level, and again in every round among those that propose the same bound.
// Algorithm:   one cluster; warp w of its W warps owns the tokens [T w / W, T (w + 1) / W). Each ordered acceptance is
//              two passes: a pass adds up units per (warp, bound) in shared memory, the cluster turns these into prefixes
//              through distributed shared memory, and a second pass hands the places out in order (match_any inside a
//              step). Between the passes an assignment's state is its own output slot: -1 = homeless, -2 - j = wants
//              expert j. A token's candidates sit in registers, one key per logit, ordered by integer maximum.
// Grid:        one cluster of up to 16 blocks of 1024 threads, any T: barriers of a cluster cost a fraction of a
//              kernel's or a grid's, and only clipped tokens touch their logits.
// Determinism: ordered prefixes of integers; no result depends on thread order. Rounds end when nobody proposes.
#include "assignments.cuh"
#include "clip_threshold.cuh"
#include "launch.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr int kMaxExperts = 1024;

// A lane holds a key and two logits for every 32 experts: more experts, fewer threads.
constexpr int threads_for(int keys) { return keys <= 4 ? 1024 : (keys <= 16 ? 512 : 256); }

struct ThresholdApplyArgs {
  ClipThresholdParams threshold;
  ClipApplyParams apply;
};

// Shared memory of a block, in ints: per expert, per bound, per (warp, bound). Addresses are worked out where they are
// used (sizes are launch constants): a dozen pointers would not fit into the registers.
struct Board {
  int* ints;
  int experts, num_bounds;

  static __host__ __device__ size_t bytes(int num_experts, int num_bounds, int num_warps) {
    return sizeof(int) * (9 * num_experts + 7 * num_bounds + num_warps * (num_bounds + 1));
  }
  __device__ __forceinline__ Board(const ClipApplyParams& p, unsigned char* shared)
      : ints(reinterpret_cast<int*>(shared)), experts(p.in.num_experts),
        num_bounds(cuda::num_bounds(p.scope, p.in.num_experts, p.num_ranks)) {}

  __device__ __forceinline__ int* shift() const { return ints; }                  // [E]
  __device__ __forceinline__ int* bound_of() const { return ints + experts; }     // [E]
  __device__ __forceinline__ int* rank_of() const { return ints + 2 * experts; }  // [E]
  __device__ __forceinline__ int* counts() const { return ints + 3 * experts; }   // [3, E, 2]
  __device__ __forceinline__ int* of_bounds(int i) const { return ints + 9 * experts + i * num_bounds; }
  __device__ __forceinline__ int* level() const { return of_bounds(0); }
  __device__ __forceinline__ int* quota() const { return of_bounds(1); }
  __device__ __forceinline__ int* room() const { return of_bounds(2); }
  __device__ __forceinline__ int* base() const { return of_bounds(3); }   // units of the blocks before this one
  __device__ __forceinline__ int* taken() const { return of_bounds(4); }  // units that this block accepted in a round
  // Units of this block; two, so that one barrier per acceptance is enough.
  __device__ __forceinline__ int* totals(int side) const { return of_bounds(5 + side); }
  // [warps, NB + 1] units of the warps before, then of this warp so far.
  __device__ __forceinline__ int* running(int warp) const { return of_bounds(7) + warp * (num_bounds + 1); }
  __device__ __forceinline__ int* own_running() const { return running(threadIdx.x / kWarp); }
};

__device__ inline void fill_board(const ClipApplyParams& p, const Board& board) {
  const int experts = p.in.num_experts, local = experts / p.num_ranks;
  for (int j = threadIdx.x; j < experts; j += blockDim.x) {
    const int rank = j / local;
    board.shift()[j] = p.shift[j];
    board.rank_of()[j] = rank;
    board.bound_of()[j] = p.scope == Scope::kExpert ? j : rank;
  }
  for (int i = threadIdx.x; i < 6 * experts; i += blockDim.x) board.counts()[i] = 0;
  for (int n = threadIdx.x; n < board.num_bounds; n += blockDim.x) {
    const int4 cut = reinterpret_cast<const int4*>(p.cut)[n];
    board.level()[n] = cut.x, board.quota()[n] = cut.y, board.room()[n] = cut.z, board.taken()[n] = 0;
  }
  for (int n = threadIdx.x % kWarp; n < board.num_bounds; n += kWarp) board.own_running()[n] = 0;
  __syncthreads();
}

// Units per (warp, bound) -> prefixes: `running` over the warps of the block, `base` over the blocks of the cluster.
// Returns whether any bound of any block has units.
__device__ inline bool cluster_prefix(const Board& board, int side) {
  const cg::cluster_group cluster = cg::this_cluster();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  __syncthreads();
  for (int n = warp; n < board.num_bounds; n += num_warps) {
    int* const mine = board.running(lane) + n;
    const int units = lane < num_warps ? *mine : 0;
    const int upto = warp_inclusive_sum(units);
    if (lane < num_warps) *mine = upto - units;
    if (lane == kWarp - 1) board.totals(side)[n] = upto;
  }
  cluster.sync();
  const int block = cluster.block_rank(), num_blocks = cluster.num_blocks();
  bool any = false;
  for (int n = warp; n < board.num_bounds; n += num_warps) {
    const int units = lane < num_blocks ? *cluster.map_shared_rank(board.totals(side) + n, lane) : 0;
    const int before = __reduce_add_sync(kFullMask, lane < block ? units : 0);
    if (lane == 0) board.base()[n] = before;
    any |= units != 0;
  }
  return __syncthreads_or(any) != 0;
}

// Sum what the blocks accepted, take it from the room, clear the running units for the next round.
__device__ inline void cluster_take(const Board& board) {
  const cg::cluster_group cluster = cg::this_cluster();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  cluster.sync();
  for (int n = warp; n < board.num_bounds; n += num_warps) {
    const int units = lane < cluster.num_blocks() ? *cluster.map_shared_rank(board.taken() + n, lane) : 0;
    const int accepted = __reduce_add_sync(kFullMask, units);
    if (lane == 0) board.room()[n] -= accepted;
  }
  for (int n = lane; n < board.num_bounds; n += kWarp) board.own_running()[n] = 0;
  __syncthreads();
}

// Hand out places in lane order: whether the running sum of the bound's units, own included, stays within its limit.
__device__ __forceinline__ bool accept_in_order(bool pending, int bound, int units, const int* limit, const Board& board) {
  const unsigned active = __ballot_sync(kFullMask, pending);
  if (active == 0) return false;
  const int lane = threadIdx.x % kWarp;
  int* const running = board.own_running();
  bool accepted = false;
  if (pending) {
    const unsigned peers = __match_any_sync(active, bound);
    const unsigned lower = peers & ((1u << lane) - 1u);
    int sum = units;
    for (unsigned left = active; left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int other = __shfl_sync(active, units, source);
      if ((lower >> source & 1u) != 0) sum += other;
    }
    sum += running[bound];
    __syncwarp(active);
    if (lane == kWarp - 1 - __clz(peers)) running[bound] = sum;
    accepted = static_cast<int64_t>(board.base()[bound]) + sum <= limit[bound];
  }
  __syncwarp();
  return accepted;
}

struct Range {
  int64_t begin, end;
  __device__ __forceinline__ explicit Range(int64_t num_tokens) {
    const cg::cluster_group cluster = cg::this_cluster();
    const int64_t warps = static_cast<int64_t>(cluster.num_blocks()) * (blockDim.x / kWarp);
    const int64_t warp = cluster.block_rank() * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    begin = num_tokens * warp / warps, end = num_tokens * (warp + 1) / warps;
  }
};

template <class Id>
struct Output {
  Id* ids;
  float* weights;
  int64_t index;
  __device__ __forceinline__ Output(const ClipApplyParams& p, const Slot& slot, const Step& step)
      : ids(static_cast<Id*>(p.new_ids)), weights(p.new_weights), index(slot.token * p.in.top_k + step.slot) {}
  __device__ __forceinline__ void set(int id, float weight) const {
    ids[index] = static_cast<Id>(id);
    weights[index] = weight;
  }
  __device__ __forceinline__ int id() const { return static_cast<int>(ids[index]); }
  __device__ __forceinline__ void set_id(int id) const { ids[index] = static_cast<Id>(id); }
};

__device__ __forceinline__ int compare_to_cut(const ClipApplyParams& p, const Board& board, const Slot& slot) {
  const int level = level_of(bucket_of_slot(p.in, slot), board.shift()[slot.expert], slot.text(), p.protect_text,
                             p.in.bucket_bits);
  return level - board.level()[board.bound_of()[slot.expert]];
}

__device__ __forceinline__ void count(const ClipApplyParams& p, const Board& board, int kind, int expert, bool text) {
  atomicAdd(board.counts() + (kind * p.in.num_experts + expert) * 2 + (text ? 1 : 0), 1);
}

// First pass: keep what is above the cut, clip what is below, count units at it. Returns whether the warp has any there.
template <class Id>
__device__ bool clip_pass(const ClipApplyParams& p, const Board& board, const Step& step, const Range& range) {
  bool any = false;
  Slot slot = load_slot<Id, true>(p.in, step, range.begin, range.end);
  for (int64_t first = range.begin; first < range.end; first += step.tokens) {
    const Slot next = load_slot<Id, true>(p.in, step, first + step.tokens, range.end);
    if (slot.inside) {
      const Output<Id> out(p, slot, step);
      const int side = slot.expert < 0 ? 1 : compare_to_cut(p, board, slot);
      out.set(side < 0 ? -1 : slot.expert, side < 0 ? 0.0f : slot.gate);
      if (side == 0) {
        any = true;
        atomicAdd(board.own_running() + board.bound_of()[slot.expert], load_units(p.in.load, slot.weight));
      } else if (slot.expert >= 0) {
        count(p, board, side < 0 ? 1 : 0, slot.expert, slot.text());
      }
    }
    slot = next;
  }
  return __any_sync(kFullMask, any);
}

// Second pass: the assignments at the cut, in order, up to the quota.
template <class Id>
__device__ void quota_pass(const ClipApplyParams& p, const Board& board, const Step& step, const Range& range) {
  for (int64_t first = range.begin; first < range.end; first += step.tokens) {
    const Slot slot = load_slot<Id, true>(p.in, step, first, range.end);
    const bool pending = slot.expert >= 0 && compare_to_cut(p, board, slot) == 0;
    const int bound = pending ? board.bound_of()[slot.expert] : 0;
    const bool stays = accept_in_order(pending, bound, load_units(p.in.load, slot.weight), board.quota(), board);
    if (!pending) continue;
    if (!stays) Output<Id>(p, slot, step).set(-1, 0.0f);
    count(p, board, stays ? 0 : 1, slot.expert, slot.text());
  }
}

// Logits ordered as integers, greater first; 0 = no candidate. Adding 0 makes -0 the equal of +0.
__device__ __forceinline__ unsigned key_of(float logit) {
  if (!isfinite(logit)) return 0;
  const unsigned bits = __float_as_uint(logit + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

// One warp, one token: every homeless slot in turn takes the best candidate that is left. `base` is the lane of the
// token's slot 0, `current` the slots' present ids. Returns this lane's choice, -1 for none.
template <int kKeys>
__device__ __forceinline__ int choose(const ClipApplyParams& p, const Board& board, const float (&logits)[kKeys], int base,
                                      unsigned homeless, int original, int current, int units) {
  const int lane = threadIdx.x % kWarp, experts = p.in.num_experts;
  const bool local = p.reroute == Reroute::kLocal;
  unsigned keys[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int j = i * kWarp + lane;
    keys[i] = j < experts && board.room()[board.bound_of()[j]] >= units ? key_of(logits[i]) : 0;
  }
  for (int k = 0; k < p.in.top_k; ++k) {
    const int before = __shfl_sync(kFullMask, original, base + k), now = __shfl_sync(kFullMask, current, base + k);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int j = i * kWarp + lane;
      if (j == before || j == now) keys[i] = 0;
    }
  }
  int choice = -1;
  for (; homeless != 0; homeless &= homeless - 1) {
    const int taker = __ffs(homeless) - 1;
    const int rank = local ? board.rank_of()[__shfl_sync(kFullMask, original, taker)] : 0;
    unsigned best = 0;
    int expert = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int j = i * kWarp + lane;
      if (keys[i] > best && (!local || board.rank_of()[j] == rank)) best = keys[i], expert = j;
    }
    const unsigned most = __reduce_max_sync(kFullMask, best);
    if (most == 0) continue;
    const int winner = __reduce_min_sync(kFullMask, best == most ? expert : 0x7fffffff);
    if (lane == taker) choice = winner;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (i * kWarp + lane == winner) keys[i] = 0;
    }
  }
  return choice;
}

template <int kKeys>
__device__ __forceinline__ void load_logits(const ClipApplyParams& p, int64_t token, float (&logits)[kKeys]) {
  const float* row = p.router_logits + token * p.in.num_experts;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int j = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    logits[i] = j < p.in.num_experts ? __ldg(row + j) : 0.0f;
  }
}

// Proposals of a round: the homeless slots of every token of this warp.
template <class Id, int kKeys>
__device__ void propose_pass(const ClipApplyParams& p, const Board& board, const Step& step, const Range& range) {
  const int top_k = p.in.top_k;
  const unsigned slots = top_k == kWarp ? kFullMask : (1u << top_k) - 1u;
  for (int64_t first = range.begin; first < range.end; first += step.tokens) {
    const Slot slot = load_slot<Id, true>(p.in, step, first, range.end);
    const Output<Id> out(p, slot, step);
    const int current = slot.inside ? out.id() : -1;
    const unsigned homeless = __ballot_sync(kFullMask, slot.expert >= 0 && current < 0);
    int choice = -1;
    float logits[kKeys];
    unsigned left = homeless;
    if (left != 0) load_logits<kKeys>(p, first + (__ffs(left) - 1) / top_k, logits);
    while (left != 0) {
      const int base = (__ffs(left) - 1) / top_k * top_k;
      const unsigned own = left & (slots << base);
      left &= ~own;
      float ahead[kKeys];  // the next token's logits come while this one chooses
      if (left != 0) load_logits<kKeys>(p, first + (__ffs(left) - 1) / top_k, ahead);
      const int units = load_units(p.in.load, __shfl_sync(kFullMask, slot.weight, base));
      choice = max(choice, choose<kKeys>(p, board, logits, base, own, slot.expert, current, units));
#pragma unroll
      for (int i = 0; i < kKeys; ++i) logits[i] = ahead[i];
    }
    if (choice >= 0) {
      out.set_id(-2 - choice);
      atomicAdd(board.own_running() + board.bound_of()[choice], load_units(p.in.load, slot.weight));
    }
  }
}

// The gate of a re-routed expert: its own router probability under the scaling that the token's top-k weights had.
__device__ __forceinline__ float rerouted_weight(const ClipApplyParams& p, int64_t token, int expert, int reference,
                                                 float gate) {
  const float* row = p.router_logits + token * p.in.num_experts;
  const float to = __ldg(row + expert), from = __ldg(row + reference);
  if (p.scoring == Scoring::kSoftmax) return gate * expf(to - from);
  return gate * ((1.0f + expf(-from)) / (1.0f + expf(-to)));
}

// Proposals in order, up to the room.
template <class Id>
__device__ void accept_pass(const ClipApplyParams& p, const Board& board, const Step& step, const Range& range) {
  for (int64_t first = range.begin; first < range.end; first += step.tokens) {
    const Slot slot = load_slot<Id, true>(p.in, step, first, range.end);
    const Output<Id> out(p, slot, step);
    const int wanted = slot.expert >= 0 ? -2 - out.id() : -1;
    const bool pending = wanted >= 0;
    if (!__any_sync(kFullMask, pending)) continue;
    const int bound = pending ? board.bound_of()[wanted] : 0, units = load_units(p.in.load, slot.weight);
    const bool accepted = accept_in_order(pending, bound, units, board.room(), board);
    int reference = -1;
    float gate = 0.0f;
    for (int k = 0; k < p.in.top_k; ++k) {  // the slot of greatest gate, the lowest among equals
      const int lane = min(step.first_lane(p.in.top_k) + k, kWarp - 1);
      const int other = __shfl_sync(kFullMask, slot.expert, lane);
      const float other_gate = __shfl_sync(kFullMask, slot.gate, lane);
      if (other >= 0 && (reference < 0 || other_gate > gate)) reference = other, gate = other_gate;
    }
    if (!pending) continue;
    if (accepted) {
      out.set(wanted, rerouted_weight(p, slot.token, wanted, reference, gate));
      atomicAdd(board.taken() + bound, units);
      count(p, board, 2, wanted, slot.text());
    } else {
      out.set_id(-1);
    }
  }
}

template <class Id, int kKeys>
__device__ void cluster_clip_apply(const ClipApplyParams& p, unsigned char* shared) {
  const cg::cluster_group cluster = cg::this_cluster();
  const Board board(p, shared);
  const Step step(p.in.top_k);
  const Range range(p.in.num_tokens);
  fill_board(p, board);
  bool cut = false;
  for (int n = threadIdx.x; n < board.num_bounds; n += blockDim.x) cut |= board.level()[n] >= 0;
  cut = __syncthreads_or(cut) != 0;
  const bool at_cut = clip_pass<Id>(p, board, step, range);
  if (cut) {
    cluster_prefix(board, 0);
    if (at_cut) quota_pass<Id>(p, board, step, range);
    const int rounds = p.reroute == Reroute::kNone || p.router_logits == nullptr ? 0 : p.reroute_rounds;
    for (int round = 0; round < rounds; ++round) {
      if (round == 0) {
        for (int n = threadIdx.x % kWarp; n < board.num_bounds; n += kWarp) board.own_running()[n] = 0;
        __syncwarp();
      } else {
        cluster_take(board);
      }
      propose_pass<Id, kKeys>(p, board, step, range);
      if (!cluster_prefix(board, (round + 1) & 1)) break;
      for (int n = threadIdx.x; n < board.num_bounds; n += blockDim.x) board.taken()[n] = 0;
      __syncthreads();
      accept_pass<Id>(p, board, step, range);
    }
  }
  cluster.sync();
  const int cells = 6 * p.in.num_experts, num_blocks = cluster.num_blocks();
  for (int i = cluster.block_rank() * blockDim.x + threadIdx.x; i < cells; i += num_blocks * blockDim.x) {
    int sum = 0;
    for (int b = 0; b < num_blocks; ++b) sum += *cluster.map_shared_rank(board.counts() + i, b);
    p.counts[i] = sum;
  }
  cluster.sync();  // nobody leaves while its shared memory is being read
}

template <class Id, int kKeys>
__global__ void __launch_bounds__(threads_for(kKeys), 1)
    clip_apply_kernel(const __grid_constant__ ClipApplyParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  start_dependents();
  wait_for_previous();
  cluster_clip_apply<Id, kKeys>(p, shared);
}

template <class Id, int kKeys>
__global__ void __launch_bounds__(threads_for(kKeys), 1)
    threshold_apply_kernel(const __grid_constant__ ThresholdApplyArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  start_dependents();
  wait_for_previous();
  cluster_clip_threshold(args.threshold, shared);
  cg::this_cluster().sync();
  cluster_clip_apply<Id, kKeys>(args.apply, shared);
}

template <class Args>
cudaError_t launch_cluster(void (*kernel)(Args), const Args& args, int threads, size_t bytes, int (&cached)[kMaxDevices],
                           cudaStream_t stream) {
  if (bytes > static_cast<size_t>(max_shared_bytes())) return cudaErrorInvalidValue;
  const int cluster = largest_cluster(kernel, threads, cached);
  return launch(kernel, {.grid = cluster, .block = threads, .cluster = cluster, .shared_bytes = bytes, .overlap = true},
                args, stream);
}

template <class Id, int kKeys>
cudaError_t enqueue(const ThresholdApplyArgs& args, bool with_threshold, cudaStream_t stream) {
  static int cached[2][kMaxDevices] = {};
  constexpr int kThreads = threads_for(kKeys);
  const ClipApplyParams& p = args.apply;
  const size_t bytes = Board::bytes(p.in.num_experts, num_bounds(p.scope, p.in.num_experts, p.num_ranks),
                                     threads_for(kKeys) / kWarp);
  if (!with_threshold) return launch_cluster(clip_apply_kernel<Id, kKeys>, p, kThreads, bytes, cached[0], stream);
  const size_t threshold_bytes = threshold_shared_bytes(args.threshold);
  return launch_cluster(threshold_apply_kernel<Id, kKeys>, args, kThreads, bytes > threshold_bytes ? bytes : threshold_bytes, cached[1],
                        stream);
}

template <class Id>
cudaError_t enqueue_by_experts(const ThresholdApplyArgs& args, bool with_threshold, cudaStream_t stream) {
  const int experts = args.apply.in.num_experts;
  if (experts <= 4 * kWarp) return enqueue<Id, 4>(args, with_threshold, stream);
  if (experts <= 8 * kWarp) return enqueue<Id, 8>(args, with_threshold, stream);
  if (experts <= 16 * kWarp) return enqueue<Id, 16>(args, with_threshold, stream);
  return enqueue<Id, 32>(args, with_threshold, stream);
}

cudaError_t enqueue_clip_apply(const ThresholdApplyArgs& args, bool with_threshold, cudaStream_t stream) {
  const Assignments& in = args.apply.in;
  if (in.top_k < 1 || in.top_k > kWarp || in.num_experts > kMaxExperts) return cudaErrorInvalidValue;
  return in.ids_are_i64 ? enqueue_by_experts<int64_t>(args, with_threshold, stream)
                        : enqueue_by_experts<int32_t>(args, with_threshold, stream);
}

}  // namespace

cudaError_t launch_clip_apply(const ClipApplyParams& p, cudaStream_t stream) {
  return enqueue_clip_apply({.threshold = {}, .apply = p}, false, stream);
}

cudaError_t launch_threshold_apply(const ClipThresholdParams& threshold, const ClipApplyParams& apply, cudaStream_t stream) {
  return enqueue_clip_apply({.threshold = threshold, .apply = apply}, true, stream);
}

}  // namespace macs::cuda
