// threshold_apply for small batches: the cuts and the plan in one cluster, without a barrier over the device.
//
// Problem:     as clip_apply.cu, for up to 512 tokens, 4096 assignments and 256 experts: no step has work for more than
//              16 multiprocessors, and a grid-wide dependency costs more than any step.
// Algorithm:   every block clips all assignments and accepts all proposals for itself, its threads keeping them in
//              registers; so ordered places need no prefix over blocks. Only what would be long is shared out and sent
//              to all blocks (cluster.cuh): the cuts (a block per rank, a warp per expert) and the proposals (a warp
//              per token, its logits loaded before the wait). Outputs are written by the token's warp, counts by the
//              expert's block.
// Grid:        one cluster of 16 blocks (8 where the device holds no more) of 512 threads.
// Determinism: ordered prefixes of integers; no result depends on thread order.
#include "assignments.cuh"
#include "board.cuh"
#include "clip_threshold.cuh"
#include "cluster.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "reroute.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxTokens = 512;
constexpr int kMaxExperts = 256;
constexpr int kMaxItems = 8;  // assignments per thread
constexpr int kMinCluster = 8;

// Where the tables of a block lie in its shared memory; the same in every block.
struct Desk {
  RawCut* raw;       // [NB]
  int* levels;       // of find_cuts
  int* shift;        // [E]
  int* bound_of;     // [E]
  int* room;         // [NB]
  int* taken;        // [NB] accepted in a round
  int* counted;      // [warps, NB] units of each warp
  int* running;      // [warps, NB] units of the warps before, then of this warp so far
  int* current;      // [T * K] expert, or -1: homeless or empty
  int* wanted;       // [2, T * K] what each homeless slot proposes, by round
  int* counts;       // [3, share, 2] of this block's experts
  float* gates;      // [tokens of this block, K] of the proposals
  size_t bytes;

  __host__ __device__ __forceinline__ Desk(const ClipThresholdParams& threshold, const ClipApplyParams& p,
                                           unsigned char* shared, int num_blocks) {
    const int experts = p.in.num_experts, bounds = num_bounds(p.scope, experts, p.num_ranks);
    const int slots = static_cast<int>(p.in.num_tokens) * p.in.top_k;
    unsigned char* at = shared;
    const auto take = [&](size_t words) {
      unsigned char* const mine = at;
      at += words * sizeof(int);
      return reinterpret_cast<int*>(mine);
    };
    raw = reinterpret_cast<RawCut*>(take(bounds * sizeof(RawCut) / sizeof(int)));
    levels = take(threshold_shared_bytes(threshold, kWarps) / sizeof(int));
    shift = take(experts), bound_of = take(experts);
    room = take(bounds), taken = take(bounds);
    counted = take(kWarps * bounds), running = take(kWarps * bounds);
    current = take(slots), wanted = take(2 * slots);
    counts = take(3 * 2 * share(experts, num_blocks));
    const int tokens = (static_cast<int>(p.in.num_tokens) + num_blocks - 1) / num_blocks;
    gates = reinterpret_cast<float*>(take(static_cast<size_t>(tokens) * p.in.top_k));
    bytes = at - shared;
  }
  static __host__ __device__ __forceinline__ int share(int experts, int num_blocks) {
    return (experts + num_blocks - 1) / num_blocks;
  }

  // What does not depend on the kernels before.
  __device__ __forceinline__ void clear(const ClipThresholdParams& threshold, const ClipApplyParams& p,
                                        int num_blocks) const {
    const int experts = p.in.num_experts, local = experts / p.num_ranks;
    const int bounds = num_bounds(p.scope, experts, p.num_ranks);
    clear_levels(threshold, levels);
    for (int j = threadIdx.x; j < experts; j += kThreads) {
        bound_of[j] = p.scope == Scope::kExpert ? j : j / local;
    }
    for (int n = threadIdx.x; n < bounds; n += kThreads) taken[n] = 0;
    for (int i = threadIdx.x; i < kWarps * bounds; i += kThreads) counted[i] = 0;
    for (int i = threadIdx.x; i < 3 * 2 * share(experts, num_blocks); i += kThreads) counts[i] = 0;
  }
};

struct Mail {
  Inbox cuts, wants[2];
  int homeless[2];  // slots, by round
};

struct SmallApplyArgs {
  ClipThresholdParams threshold;
  ClipApplyParams apply;
};

// What every step needs to know.
struct Here {
  const ClipThresholdParams& threshold;
  const ClipApplyParams& p;
  const int block, num_blocks, lane, warp, bounds, slots;
  const Desk desk;
  Mail& mail;

  __device__ __forceinline__ Here(const SmallApplyArgs& args, unsigned char* shared, Mail& m)
      : threshold(args.threshold), p(args.apply), block(cluster_rank()), num_blocks(cluster_blocks()),
        lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp),
        bounds(num_bounds(p.scope, p.in.num_experts, p.num_ranks)),
        slots(static_cast<int>(p.in.num_tokens) * p.in.top_k), desk(args.threshold, args.apply, shared, num_blocks),
        mail(m) {}

  __device__ __forceinline__ int* counted() const { return desk.counted + warp * bounds; }
  __device__ __forceinline__ int* running() const { return desk.running + warp * bounds; }

  __device__ __forceinline__ int* wanted(int round) const { return desk.wanted + (round & 1) * slots; }

  __device__ __forceinline__ void clear_counted() const {
    for (int n = lane; n < bounds; n += kWarp) counted()[n] = 0;
    __syncwarp();
  }
  // Behind a barrier: where the warps before this one leave off.
  __device__ __forceinline__ void start_running() const {
    for (int n = lane; n < bounds; n += kWarp) {
      int sum = 0;
#pragma unroll 8
      for (int w = 0; w < warp; ++w) sum += desk.counted[w * bounds + n];
      running()[n] = sum;
    }
    __syncwarp();
  }
};

// This thread's assignments of the whole batch; those of a warp follow one another.
template <int kItems>
struct Items {
  Slot slot[kItems];
  int current[kItems];  // expert, -1: homeless or empty

  static __device__ __forceinline__ int index(const Here& here, int i) {
    return (here.warp * kItems + i) * kWarp + here.lane;
  }
  // Before the wait: what is older than the chain of kernels. The weight is not.
  __device__ __forceinline__ void load(const Here& here) {
    const Assignments& in = here.p.in;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = index(here, i);
      slot[i] = {at / in.top_k, -1, -1, 0.0f, 0.0f, at < here.slots};
      if (!slot[i].inside) continue;
      slot[i].expert = load_id(in, at);
      slot[i].gate = __ldg(in.topk_weights + at);
      slot[i].segment = __ldg(in.segment + slot[i].token);
    }
  }
  __device__ __forceinline__ void load_weights(const Assignments& in) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (slot[i].inside) slot[i].weight = __ldcg(in.weight + slot[i].token);
    }
  }
  __device__ __forceinline__ bool homeless(int i) const { return slot[i].expert >= 0 && current[i] < 0; }

  // Adds the homeless slots of this warp to those of a round.
  __device__ __forceinline__ void count_homeless(const Here& here, int round) const {
    int number = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) number += __popc(__ballot_sync(kFullMask, homeless(i)));
    if (here.lane == 0 && number != 0) atomicAdd(&here.mail.homeless[round & 1], number);
  }
};

// A warp's own token: a slot per lane, and its logits.
template <int kKeys>
struct Token {
  int expert;  // original, negative where there is none
  float gate;
  float logits[kKeys];

  __device__ __forceinline__ void load(const ClipApplyParams& p, int token) {
    const int lane = threadIdx.x % kWarp;
    expert = -1, gate = 0.0f;
    if (token >= p.in.num_tokens) return;
    if (lane < p.in.top_k) {
      expert = load_id(p.in, token * p.in.top_k + lane);
      gate = __ldg(p.in.topk_weights + token * p.in.top_k + lane);
    }
    if (p.router_logits != nullptr) load_logits<kKeys>(p.router_logits, p.in.num_experts, token, logits);
  }
  // Every lane asks for one expert's.
  __device__ __forceinline__ float logit_of(int expert) const {
    float logit = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const float held = __shfl_sync(kFullMask, logits[i], expert % kWarp);
      if (expert / kWarp == i) logit = held;
    }
    return logit;
  }
};

// Tokens are dealt round robin to the blocks, then to their warps; a warp keeps its first one in registers.
template <int kKeys, class Body>
__device__ __forceinline__ void for_own_tokens(const Here& here, const Token<kKeys>& first, Body body) {
  const int stride = here.num_blocks * kWarps;
  for (int t = here.block + here.num_blocks * here.warp; t < here.p.in.num_tokens; t += stride) {
    Token<kKeys> token = first;
    if (t >= stride) token.load(here.p, t);
    body(t, token);
  }
}

// The cuts to all blocks, as they are found.
struct SendCuts {
  const Here& here;

  __device__ __forceinline__ void shift(int expert, int shift) const {
    if (here.lane < here.num_blocks) here.mail.cuts.send(here.lane, here.desk.shift + expert, shift);
    if (here.lane == 0) here.threshold.shift[expert] = shift;
  }
  __device__ __forceinline__ void cut(int n, const Cut& found, int bound) const {
    const RawCut raw = RawCut::of(found, bound);
    if (here.lane >= here.num_blocks) return;
    const int4 kept = make_int4(static_cast<int>(raw.kept.group), 0, static_cast<int>(raw.kept.own), 0);  // 31 bits
    here.mail.cuts.send(here.lane, &here.desk.raw[n].cut, raw.cut);
    here.mail.cuts.send(here.lane, &here.desk.raw[n].kept, kept);
  }
  static __device__ __forceinline__ int bytes(const Here& here) {
    return static_cast<int>(here.bounds * sizeof(RawCut) + here.p.in.num_experts * sizeof(int));
  }
};

// Every block for itself; the first one writes the result.
__device__ __forceinline__ void share_rooms(const Here& here) {
  const int pools = here.p.reroute == Reroute::kLocal ? here.p.num_ranks : 1, size = here.bounds / pools;
  for (int pool = here.warp; pool < pools; pool += kWarps) {
    unsigned group = 0, own = 0;  // all units of a group fit into 31 bits
    for (int n = pool * size + here.lane; n < (pool + 1) * size; n += kWarp) {
      const RawCut raw = here.desk.raw[n];
      group += raw.cut.x >= 0 ? static_cast<unsigned>(raw.kept.group) : 0;
      own += raw.cut.x >= 0 ? static_cast<unsigned>(raw.kept.own) : 0;
    }
    const Kept kept = {__reduce_add_sync(kFullMask, group), __reduce_add_sync(kFullMask, own)};
    for (int n = pool * size + here.lane; n < (pool + 1) * size; n += kWarp) {
      int4 cut = here.desk.raw[n].cut;
      cut.z = room_share(here.threshold, cut.z, kept);
      here.desk.room[n] = cut.z;
      if (here.block == 0) reinterpret_cast<int4*>(here.threshold.cut)[n] = cut;
    }
  }
}

// All assignments against the cuts; those at a cut in order, up to the quota.
template <int kItems>
__device__ __forceinline__ void clip(const Here& here, Items<kItems>& items) {
  const Assignments& in = here.p.in;
  unsigned at_cut = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Slot& slot = items.slot[i];
    items.current[i] = slot.expert;
    if (slot.expert < 0) continue;
    const int bound = here.desk.bound_of[slot.expert];
    const int level = level_of(bucket_of_slot(in, slot), here.desk.shift[slot.expert], slot.text(),
                               here.p.protect_text, in.bucket_bits);
    const int cut = here.desk.raw[bound].cut.x;
    if (level < cut) items.current[i] = -1;
    if (level != cut) continue;
    at_cut |= 1u << i;
    atomicAdd(here.counted() + bound, load_units(in.load, slot.weight));
  }
  __syncthreads();
  if (__any_sync(kFullMask, at_cut != 0)) {
    here.start_running();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool pending = (at_cut >> i & 1u) != 0;
      const int bound = pending ? here.desk.bound_of[items.slot[i].expert] : 0;
      const int units = load_units(in.load, items.slot[i].weight), quota = here.desk.raw[bound].cut.y;
      const bool stays = accept_in_order(pending, bound, units, in.load == Load::kRows, here.running(), quota);
      if (pending && !stays) items.current[i] = -1;
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (items.slot[i].inside) here.desk.current[items.index(here, i)] = items.current[i];
  }
  items.count_homeless(here, 0);
  __syncthreads();
}

// The homeless slots of this warp's tokens: what they want goes to all blocks, what it would weigh stays.
template <int kKeys>
__device__ __forceinline__ void propose(const Here& here, const Token<kKeys>& first, int round) {
  const ClipApplyParams& p = here.p;
  const int top_k = p.in.top_k;
  Inbox& inbox = here.mail.wants[round & 1];
  int* const wanted = here.wanted(round);
  const int per_rank = p.in.num_experts / p.num_ranks;
  const Rooms<kKeys> rooms(p.in.num_experts, here.desk.room, here.desk.bound_of);
  for_own_tokens(here, first, [&](int t, const Token<kKeys>& token) {
    const int current = here.lane < top_k ? here.desk.current[t * top_k + here.lane] : -1;
    const unsigned homeless = __ballot_sync(kFullMask, token.expert >= 0 && current < 0);
    if (homeless == 0) return;
    Chooser<kKeys> chooser[1] = {{homeless, token.expert, current, -1, 1, {}}};
    if (p.reroute == Reroute::kLocal && token.expert >= 0) chooser[0].from = token.expert / per_rank * per_rank;
    if (p.in.load != Load::kRows) chooser[0].units = fixed_weight(__ldcg(p.in.weight + t));
#pragma unroll
    for (int i = 0; i < kKeys; ++i) chooser[0].logits[i] = token.logits[i];
    const int choice = choose<1, kKeys>(rooms, chooser, per_rank);
    for (unsigned left = homeless; left != 0; left &= left - 1) {
      const int slot = __ffs(left) - 1, want = __shfl_sync(kFullMask, choice, slot);
      if (here.lane < here.num_blocks) inbox.send(here.lane, wanted + t * top_k + slot, want);
    }
    const Reference reference = reference_of(token.expert, token.gate, 0, top_k);
    const float to = token.logit_of(max(choice, 0)), from = token.logit_of(max(reference.expert, 0));
    if (choice < 0) return;
    here.desk.gates[t / here.num_blocks * top_k + here.lane] = rerouted_weight(p.scoring, reference.gate, to, from);
  });
}

// All proposals in order, up to the room. Returns whether somebody was turned away.
template <int kItems>
__device__ __forceinline__ bool accept(const Here& here, Items<kItems>& items, int round) {
  const Assignments& in = here.p.in;
  unsigned pending = 0;
  int wanted[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    wanted[i] = items.homeless(i) ? here.wanted(round)[items.index(here, i)] : -1;
    if (wanted[i] < 0) continue;
    pending |= 1u << i;
    atomicAdd(here.counted() + here.desk.bound_of[wanted[i]], load_units(in.load, items.slot[i].weight));
  }
  __syncthreads();
  if (__any_sync(kFullMask, pending != 0)) {
    here.start_running();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool asks = (pending >> i & 1u) != 0;
      const int bound = asks ? here.desk.bound_of[wanted[i]] : 0;
      const int units = load_units(in.load, items.slot[i].weight), room = here.desk.room[bound];
      if (!accept_in_order(asks, bound, units, in.load == Load::kRows, here.running(), room)) continue;
      pending &= ~(1u << i);
      items.current[i] = wanted[i];
      here.desk.current[items.index(here, i)] = wanted[i];
      atomicAdd(here.desk.taken + bound, units);
    }
  }
  items.count_homeless(here, round + 1);
  return __syncthreads_or(pending != 0) != 0;
}

template <int kKeys, int kItems>
__device__ __forceinline__ void reroute_rounds(const Here& here, const Token<kKeys>& first, Items<kItems>& items) {
  const ClipApplyParams& p = here.p;
  const int rounds = p.reroute == Reroute::kNone || p.router_logits == nullptr ? 0 : p.reroute_rounds;
  for (int round = 0; round < rounds; ++round) {
    Inbox& inbox = here.mail.wants[round & 1];
    const int homeless = here.mail.homeless[round & 1];
    if (homeless == 0) return;
    if (threadIdx.x == 0) {
      inbox.expect(homeless * static_cast<int>(sizeof(int)));
      here.mail.homeless[(round + 1) & 1] = 0;
    }
    propose(here, first, round);
    here.clear_counted();
    inbox.wait(round >> 1 & 1);
    // Who found no candidate will find none later: another round is for those turned away.
    if (!accept(here, items, round) || round + 1 == rounds) return;
    for (int n = threadIdx.x; n < here.bounds; n += kThreads) {
      here.desk.room[n] -= here.desk.taken[n];
      here.desk.taken[n] = 0;
    }
    __syncthreads();
  }
}

// Counts of this block's experts, and the slots of its warps' tokens.
template <int kKeys, int kItems>
__device__ __forceinline__ void write_outputs(const Here& here, const Token<kKeys>& first, const Items<kItems>& items) {
  const ClipApplyParams& p = here.p;
  const int experts = p.in.num_experts, share = Desk::share(experts, here.num_blocks), low = here.block * share;
  const auto count = [&](int kind, int expert, bool text) {
    if (expert < low || expert >= low + share) return;
    atomicAdd(here.desk.counts + (kind * share + expert - low) * 2 + (text ? 1 : 0), 1);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Slot& slot = items.slot[i];
    if (slot.expert < 0) continue;
    const bool stays = items.current[i] == slot.expert;
    count(stays ? 0 : 1, slot.expert, slot.text());
    if (!stays && items.current[i] >= 0) count(2, items.current[i], slot.text());
  }
  for_own_tokens(here, first, [&](int t, const Token<kKeys>& token) {
    if (here.lane >= p.in.top_k) return;
    const int index = t * p.in.top_k + here.lane;
    const int current = token.expert < 0 ? token.expert : here.desk.current[index];
    float weight = token.gate;
    if (current != token.expert) {
      weight = current < 0 ? 0.0f : here.desk.gates[t / here.num_blocks * p.in.top_k + here.lane];
    }
    p.new_weights[index] = weight;
    if (p.in.ids_are_i64) {
      static_cast<int64_t*>(p.new_ids)[index] = current;
    } else {
      static_cast<int32_t*>(p.new_ids)[index] = current;
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < 3 * 2 * share; i += kThreads) {
    const int kind = i / (2 * share), cell = i - kind * 2 * share;
    if (low * 2 + cell < experts * 2) p.counts[kind * experts * 2 + low * 2 + cell] = here.desk.counts[i];
  }
}

template <int kKeys, int kItems>
__global__ void __launch_bounds__(kThreads, 1) small_apply_kernel(const __grid_constant__ SmallApplyArgs args) {
  extern __shared__ __align__(32) unsigned char shared[];
  __shared__ Mail mail;
  start_dependents();
  const Here here(args, shared, mail);
  if (threadIdx.x == 0) {
    mail.cuts.init(), mail.wants[0].init(), mail.wants[1].init();
    mail.cuts.expect(SendCuts::bytes(here));
    mail.homeless[0] = mail.homeless[1] = 0;
  }
  Items<kItems> items;
  items.load(here);
  Token<kKeys> token;
  token.load(here.p, here.block + here.num_blocks * here.warp);
  here.desk.clear(here.threshold, here.p, here.num_blocks);
  cluster_arrive();  // nobody gets mail before the inboxes are there
  cluster_wait();
  wait_for_previous();
  items.load_weights(here.p.in);
  find_cuts(here.threshold, here.desk.levels, here.block, here.num_blocks, SendCuts{here});
  mail.cuts.wait(0);
  share_rooms(here);
  clip(here, items);
  reroute_rounds(here, token, items);
  write_outputs(here, token, items);
}

template <int kKeys, int kItems>
cudaError_t enqueue(const SmallApplyArgs& args, bool& taken, cudaStream_t stream) {
  static int cached[kMaxDevices] = {};
  const auto kernel = small_apply_kernel<kKeys, kItems>;
  const int cluster = largest_cluster(kernel, kThreads, cached);
  const size_t bytes = Desk(args.threshold, args.apply, nullptr, cluster).bytes;
  taken = cluster >= kMinCluster && bytes + sizeof(Mail) <= static_cast<size_t>(max_shared_bytes());
  if (!taken) return cudaSuccess;
  const Shape shape = {
      .grid = cluster, .block = kThreads, .cluster = cluster, .shared_bytes = bytes, .overlap = true};
  return launch(kernel, shape, args, stream);
}

}  // namespace

cudaError_t enqueue_small_apply(const ClipThresholdParams& threshold, const ClipApplyParams& apply, bool& taken,
                                cudaStream_t stream) {
  const SmallApplyArgs args = {threshold, apply};
  const Assignments& in = apply.in;
  const int64_t slots = in.num_tokens * in.top_k;
  taken = in.top_k >= 1 && in.top_k <= kWarp && slots > 0 && slots <= kMaxItems * kThreads &&
          in.num_tokens <= kMaxTokens && in.num_experts <= kMaxExperts;
  if (!taken) return cudaSuccess;
  if (in.num_experts <= 4 * kWarp) {
    return slots <= 2 * kThreads ? enqueue<4, 2>(args, taken, stream) : enqueue<4, kMaxItems>(args, taken, stream);
  }
  return slots <= 2 * kThreads ? enqueue<8, 2>(args, taken, stream) : enqueue<8, kMaxItems>(args, taken, stream);
}

}  // namespace macs::cuda
