// threshold_apply for small batches: the cuts and the plan in one cluster, without a barrier over the device.
//
// Problem:     as clip_apply.cu, for up to 256 tokens, 2048 assignments and 256 experts: no step has work for more than 16
//              multiprocessors, and a grid-wide dependency costs more than any step.
// Algorithm:   every block clips all assignments and accepts all proposals for itself, its threads keeping them in
//              registers; so ordered places need no prefix over blocks. Only what would be long is shared out and sent
//              to all blocks (cluster.cuh): the cuts (a block per rank, a warp per expert) and the proposals (a warp
//              has one token). Outputs are written by the token's warp, counts by the expert's block.
// Grid:        one cluster of 16 blocks (8 where the device holds no more) of 512 threads. A warp issues an instruction
//              about every tenth cycle, so all that can be known sooner is: sizes and addresses on the host, the order of
//              a token's candidates before the wait.
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
constexpr int kMaxItems = 4;  // assignments per thread
constexpr int kMaxExperts = 256;
constexpr int kMinCluster = 8;

// Where the tables of a block lie in its shared memory, in bytes; the same in every block.
struct Desk {
  int raw;       // [NB] RawCut
  int levels;    // of find_cuts
  int shift;     // [E]
  int bound_of;  // [E]
  int room;      // [NB]
  int taken;     // [NB] accepted in a round
  int counted;   // [warps, NB] units of each warp
  int running;   // [warps, NB] units of the warps before, then of this warp so far
  int current;   // [T * K] expert, or -1: homeless or empty
  int wanted;    // [2, T * K] what each homeless slot proposes, by round
  int counts;    // [3, share, 2] of this block's experts
  int struck;    // [warps, kStruckWords]
  int bytes;
};

struct SmallApplyArgs {
  ClipThresholdParams threshold;
  ClipApplyParams p;
  Desk desk;
  int slots;      // T * K
  int bounds;     // NB
  int per_rank;   // experts
  int pools;      // in which room is shared out
  int pool_size;  // bounds
  int share;      // experts whose counts a block writes
};

SmallApplyArgs make_args(const ClipThresholdParams& threshold, const ClipApplyParams& p, int num_blocks) {
  SmallApplyArgs args = {threshold, p, {}, 0, 0, 0, 0, 0, 0};
  const int experts = p.in.policy.num_experts;
  args.slots = static_cast<int>(p.in.num_tokens) * p.in.top_k;
  args.bounds = num_bounds(p.in.policy);
  args.per_rank = experts / p.in.policy.num_ranks;
  args.pools = p.in.policy.reroute == Reroute::kLocal ? p.in.policy.num_ranks : 1;
  args.pool_size = args.bounds / args.pools;
  args.share = (experts + num_blocks - 1) / num_blocks;
  int at = 0;
  const auto take = [&](size_t bytes) {
    const int mine = at;
    at += static_cast<int>(bytes);
    return mine;
  };
  args.desk = {
      .raw = take(args.bounds * sizeof(RawCut)),
      .levels = take(threshold_shared_bytes(threshold, kWarps)),
      .shift = take(experts * sizeof(int)),
      .bound_of = take(experts * sizeof(int)),
      .room = take(args.bounds * sizeof(int)),
      .taken = take(args.bounds * sizeof(int)),
      .counted = take(kWarps * args.bounds * sizeof(int)),
      .running = take(kWarps * args.bounds * sizeof(int)),
      .current = take(args.slots * sizeof(int)),
      .wanted = take(2 * args.slots * sizeof(int)),
      .counts = take(3 * 2 * args.share * sizeof(int)),
      .struck = take(kWarps * kStruckWords * sizeof(unsigned)),
      .bytes = at,
  };
  args.desk.bytes = at;
  return args;
}

struct Mail {
  Inbox cuts, wants[2];
  int homeless[2];  // slots, by round
};

// What every step needs to know.
struct Here {
  const SmallApplyArgs& args;
  const ClipApplyParams& p;
  Mail& mail;
  unsigned char* shared;
  const int block, num_blocks, lane, warp;
  const int token;  // of this warp: dealt round robin to the blocks, then to their warps

  __device__ __forceinline__ Here(const SmallApplyArgs& a, Mail& m, unsigned char* s)
      : args(a), p(a.p), mail(m), shared(s), block(cluster_rank()), num_blocks(cluster_blocks()),
        lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp), token(block + num_blocks * warp) {}

  __device__ __forceinline__ int* at(int offset) const { return reinterpret_cast<int*>(shared + offset); }
  __device__ __forceinline__ RawCut* raw() const { return reinterpret_cast<RawCut*>(shared + args.desk.raw); }
  __device__ __forceinline__ int* levels() const { return at(args.desk.levels); }
  __device__ __forceinline__ int* shift() const { return at(args.desk.shift); }
  __device__ __forceinline__ int* bound_of() const { return at(args.desk.bound_of); }
  __device__ __forceinline__ int* room() const { return at(args.desk.room); }
  __device__ __forceinline__ int* taken() const { return at(args.desk.taken); }
  __device__ __forceinline__ int* current() const { return at(args.desk.current); }
  __device__ __forceinline__ int* counts() const { return at(args.desk.counts); }
  __device__ __forceinline__ int* wanted(int round) const { return at(args.desk.wanted) + (round & 1) * args.slots; }
  __device__ __forceinline__ int* counted(int of_warp) const { return at(args.desk.counted) + of_warp * args.bounds; }
  __device__ __forceinline__ int* running() const { return at(args.desk.running) + warp * args.bounds; }
  __device__ __forceinline__ unsigned* struck() const {
    return reinterpret_cast<unsigned*>(at(args.desk.struck)) + warp * kStruckWords;
  }
  __device__ __forceinline__ bool rows() const { return p.in.policy.load == Load::kRows; }

  // What does not depend on the kernels before.
  __device__ __forceinline__ void clear() const {
    clear_levels(args.threshold, levels());
#pragma unroll 1
    for (int j = threadIdx.x; j < p.in.policy.num_experts; j += kThreads) {
      bound_of()[j] = p.in.policy.scope == Scope::kExpert ? j : j / args.per_rank;
    }
#pragma unroll 1
    for (int n = threadIdx.x; n < args.bounds; n += kThreads) taken()[n] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < kWarps * args.bounds; i += kThreads) counted(0)[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < 3 * 2 * args.share; i += kThreads) counts()[i] = 0;
  }
  __device__ __forceinline__ void clear_counted() const {
#pragma unroll 1
    for (int n = lane; n < args.bounds; n += kWarp) counted(warp)[n] = 0;
    __syncwarp();
  }
  // Behind a barrier: where the warps before this one leave off.
  __device__ __forceinline__ void start_running() const {
#pragma unroll 1
    for (int n = lane; n < args.bounds; n += kWarp) {
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps - 1; ++w) sum += w < warp ? counted(w)[n] : 0;
      running()[n] = sum;
    }
    __syncwarp();
  }
};

// This thread's assignments of the whole batch; those of a warp follow one another.
template <int kItems>
struct Items {
  Slot slot[kItems];
  int bound[kItems];    // of the original expert
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
      slot[i] = {at / in.top_k, -1, -1, 0.0f, 0.0f, at < here.args.slots};
      if (!slot[i].inside) continue;
      slot[i].expert = load_id(in, at);
      slot[i].gate = __ldg(in.topk_weights + at);
      slot[i].segment = __ldg(in.segment + slot[i].token);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = max(slot[i].expert, 0);
      bound[i] = here.p.in.policy.scope == Scope::kExpert ? expert : expert / here.args.per_rank;
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

// A warp's token: a slot per lane, the candidates for all of them, and what their gates refer to.
template <int kKeys>
struct Token {
  int expert;  // original, negative where there is none
  float gate;
  float keys[1][kKeys];  // of candidates, whether there is room or not
  float logits[kKeys];
  float reference_gate, reference_logit;
  float new_gate;     // of what the slot proposed last
  int first_of_rank;  // the first expert of the original one's rank

  __device__ __forceinline__ void load(const Here& here) {
    const ClipApplyParams& p = here.p;
    expert = -1, gate = new_gate = 0.0f, first_of_rank = 0;
    if (here.token >= p.in.num_tokens) return;
    if (here.lane < p.in.top_k) {
      expert = load_id(p.in, here.token * p.in.top_k + here.lane);
      gate = __ldg(p.in.topk_weights + here.token * p.in.top_k + here.lane);
    }
    if (p.router_logits == nullptr) return;
    load_logits<kKeys>(Logits{p.router_logits, p.logits_dtype}, p.in.policy.num_experts, here.token, logits);
    first_of_rank = max(expert, 0) / here.args.per_rank * here.args.per_rank;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      keys[0][i] = i * kWarp + here.lane < p.in.policy.num_experts ? candidate_of(logits[i]) : -INFINITY;
    }
    strike_out<1, kKeys>(keys, {{expert, -1}}, here.struck());
    const Reference reference = reference_of(expert, gate, 0, p.in.top_k);
    reference_gate = reference.gate, reference_logit = logit_of(max(reference.expert, 0));
  }
  // Every lane asks for one expert's.
  __device__ __forceinline__ float logit_of(int of) const {
    float logit = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const float held = __shfl_sync(kFullMask, logits[i], of % kWarp);
      if (of / kWarp == i) logit = held;
    }
    return logit;
  }
};

// The cuts to all blocks, as they are found.
struct SendCuts {
  const Here& here;

  __device__ __forceinline__ void shift(int expert, int shift) const {
    if (here.lane < here.num_blocks) here.mail.cuts.send(here.lane, here.shift() + expert, shift);
    if (here.lane == 0) here.args.threshold.shift[expert] = shift;
  }
  __device__ __forceinline__ void cut(int n, const Cut& found, int bound) const {
    const RawCut raw = RawCut::of(found, bound);
    if (here.lane >= here.num_blocks) return;
    const int4 kept = make_int4(static_cast<int>(raw.kept.group), 0, static_cast<int>(raw.kept.own), 0);  // 31 bits
    here.mail.cuts.send(here.lane, &here.raw()[n].cut, raw.cut);
    here.mail.cuts.send(here.lane, &here.raw()[n].kept, kept);
  }
  static __device__ __forceinline__ int bytes(const Here& here) {
    const int experts = here.p.in.policy.num_experts;
    return here.args.bounds * static_cast<int>(sizeof(RawCut)) + experts * static_cast<int>(sizeof(int));
  }
};

// Every block for itself; the first one writes the result.
__device__ __forceinline__ void share_rooms(const Here& here) {
#pragma unroll 1
  for (int pool = here.warp; pool < here.args.pools; pool += kWarps) {
    const int first = pool * here.args.pool_size, end = first + here.args.pool_size;
    warp_share_rooms(here.args.threshold, here.raw(), first, end, here.room());
#pragma unroll 1
    for (int n = first + here.lane; n < end && here.block == 0; n += kWarp) {  // the lane's own rooms
      int4 cut = here.raw()[n].cut;
      cut.z = here.room()[n];
      reinterpret_cast<int4*>(here.args.threshold.cut)[n] = cut;
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
    const int cut = here.raw()[items.bound[i]].cut.x;
    const int level = level_of(bucket_of_slot(in, slot), here.shift()[slot.expert], slot.text(), in.policy);
    if (level < cut) items.current[i] = -1;
    if (level != cut) continue;
    at_cut |= 1u << i;
    atomicAdd(here.counted(here.warp) + items.bound[i], load_units(in.policy.load, slot.weight));
  }
  __syncthreads();
  if (__any_sync(kFullMask, at_cut != 0)) {
    here.start_running();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool pending = (at_cut >> i & 1u) != 0;
      const int units = load_units(in.policy.load, items.slot[i].weight), quota = here.raw()[items.bound[i]].cut.y;
      const bool stays = accept_in_order(pending, items.bound[i], units, here.rows(), here.running(), quota);
      if (pending && !stays) items.current[i] = -1;
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (items.slot[i].inside) here.current()[items.index(here, i)] = items.current[i];
  }
  items.count_homeless(here, 0);
  __syncthreads();
}

// The homeless slots of this warp's token: what they want goes to all blocks, what it would weigh stays.
template <int kKeys>
__device__ __forceinline__ void propose(const Here& here, Token<kKeys>& token, int round) {
  const ClipApplyParams& p = here.p;
  const bool slot_here = token.expert >= 0;
  const int slot_index = here.token * p.in.top_k + here.lane;
  const int current = slot_here ? here.current()[slot_index] : -1;
  unsigned homeless = __ballot_sync(kFullMask, slot_here && current < 0);
  if (homeless == 0) return;
  const Rooms<kKeys> rooms(p.in.policy.num_experts, here.room(), here.bound_of());
  const int units = here.rows() ? 1 : fixed_weight(__ldcg(p.in.weight + here.token));
  if (round > 0) strike_out<1, kKeys>(token.keys, {{current, -1}}, here.struck());
  float keys[1][kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) keys[0][i] = rooms.of[i] >= units ? token.keys[0][i] : -INFINITY;
  int choice = -1;
  for (; homeless != 0; homeless &= homeless - 1) {
    const int slot = __ffs(homeless) - 1;
    int from[1] = {-1}, winner[1];
    if (p.in.policy.reroute == Reroute::kLocal) from[0] = __shfl_sync(kFullMask, token.first_of_rank, slot);
    pick<1, kKeys>(keys, from, here.args.per_rank, winner);
    if (here.lane < here.num_blocks) {
      int* const wanted = here.wanted(round) + here.token * p.in.top_k + slot;
      here.mail.wants[round & 1].send(here.lane, wanted, winner[0]);
    }
    if (here.lane == slot) choice = winner[0];
  }
  const float logit = token.logit_of(max(choice, 0));
  const Scoring scoring = p.in.policy.scoring;
  if (choice >= 0) token.new_gate = rerouted_weight(scoring, token.reference_gate, logit, token.reference_logit);
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
    atomicAdd(here.counted(here.warp) + here.bound_of()[wanted[i]], load_units(in.policy.load, items.slot[i].weight));
  }
  __syncthreads();
  if (__any_sync(kFullMask, pending != 0)) {
    here.start_running();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool asks = (pending >> i & 1u) != 0;
      const int bound = asks ? here.bound_of()[wanted[i]] : 0;
      const int units = load_units(in.policy.load, items.slot[i].weight), room = here.room()[bound];
      if (!accept_in_order(asks, bound, units, here.rows(), here.running(), room)) continue;
      pending &= ~(1u << i);
      items.current[i] = wanted[i];
      here.current()[items.index(here, i)] = wanted[i];
      atomicAdd(here.taken() + bound, units);
    }
  }
  return __syncthreads_or(pending != 0) != 0;
}

template <int kKeys, int kItems>
__device__ __forceinline__ void reroute_rounds(const Here& here, Token<kKeys>& token, Items<kItems>& items) {
  const ClipApplyParams& p = here.p;
  const Policy& policy = p.in.policy;
  const int rounds = policy.reroute == Reroute::kNone || p.router_logits == nullptr ? 0 : policy.reroute_rounds;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    Inbox& inbox = here.mail.wants[round & 1];
    const int homeless = here.mail.homeless[round & 1];
    if (homeless == 0) return;
    if (threadIdx.x == 0) {
      inbox.expect(homeless * static_cast<int>(sizeof(int)));
      here.mail.homeless[(round + 1) & 1] = 0;
    }
    propose(here, token, round);
    here.clear_counted();
    inbox.wait(round >> 1 & 1);
    // Who found no candidate will find none later: another round is for those turned away.
    if (!accept(here, items, round) || round + 1 == rounds) return;
    items.count_homeless(here, round + 1);
#pragma unroll 1
    for (int n = threadIdx.x; n < here.args.bounds; n += kThreads) {
      here.room()[n] -= here.taken()[n];
      here.taken()[n] = 0;
    }
    __syncthreads();
  }
}

// Counts of this block's experts, and the slots of its warps' tokens.
template <int kKeys, int kItems>
__device__ __forceinline__ void write_outputs(const Here& here, const Token<kKeys>& token, const Items<kItems>& items) {
  const ClipApplyParams& p = here.p;
  const int experts = p.in.policy.num_experts, share = here.args.share, low = here.block * share;
  const auto count = [&](int kind, int expert, bool text) {
    if (static_cast<unsigned>(expert - low) >= static_cast<unsigned>(share)) return;
    atomicAdd(here.counts() + (kind * share + expert - low) * 2 + (text ? 1 : 0), 1);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Slot& slot = items.slot[i];
    if (slot.expert < 0) continue;
    const bool stays = items.current[i] == slot.expert;
    count(stays ? 0 : 1, slot.expert, slot.text());
    if (!stays && items.current[i] >= 0) count(2, items.current[i], slot.text());
  }
  if (here.token < p.in.num_tokens && here.lane < p.in.top_k) {
    const int index = here.token * p.in.top_k + here.lane;
    const int current = token.expert < 0 ? token.expert : here.current()[index];
    p.new_weights[index] = current == token.expert ? token.gate : (current < 0 ? 0.0f : token.new_gate);
    if (p.in.ids_are_i64) {
      static_cast<int64_t*>(p.new_ids)[index] = current;
    } else {
      static_cast<int32_t*>(p.new_ids)[index] = current;
    }
  }
  __syncthreads();
  const int cell = threadIdx.x;  // of the share's
  if (cell >= 2 * share || low * 2 + cell >= experts * 2) return;
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) {
    p.counts[(kind * experts + low) * 2 + cell] = here.counts()[kind * 2 * share + cell];
  }
}

template <int kKeys, int kItems>
__global__ void __launch_bounds__(kThreads, 1) small_apply_kernel(const __grid_constant__ SmallApplyArgs args) {
  unsigned char* const shared = dynamic_shared();
  __shared__ Mail mail;
  start_dependents();
  const Here here(args, mail, shared);
  if (threadIdx.x == 0) {
    mail.cuts.init(), mail.wants[0].init(), mail.wants[1].init();
    mail.cuts.expect(SendCuts::bytes(here));
    mail.homeless[0] = mail.homeless[1] = 0;
  }
  Items<kItems> items;
  items.load(here);
  Token<kKeys> token;
  token.load(here);
  here.clear();
  cluster_arrive();  // nobody gets mail before the inboxes are there
  cluster_wait();
  wait_for_previous();
  items.load_weights(here.p.in);
  find_cuts_of<2, true>(args.threshold, args.per_rank, here.levels(), here.block, here.num_blocks, SendCuts{here});
  mail.cuts.wait(0);
  share_rooms(here);
  clip(here, items);
  reroute_rounds(here, token, items);
  write_outputs(here, token, items);
}

template <int kKeys, int kItems>
cudaError_t enqueue(const ClipThresholdParams& threshold, const ClipApplyParams& apply, bool& taken,
                    cudaStream_t stream) {
  static int cached[kMaxDevices] = {};
  const auto kernel = small_apply_kernel<kKeys, kItems>;
  const int cluster = largest_cluster(kernel, kThreads, cached);
  const SmallApplyArgs args = make_args(threshold, apply, cluster);
  taken = cluster >= kMinCluster && apply.in.num_tokens <= cluster * kWarps &&
          args.desk.bytes + static_cast<int>(sizeof(Mail)) <= max_shared_bytes();
  if (!taken) return cudaSuccess;
  const Shape shape = {.grid = cluster,
                       .block = kThreads,
                       .cluster = cluster,
                       .shared_bytes = static_cast<size_t>(args.desk.bytes),
                       .overlap = true};
  return launch(kernel, shape, args, stream);
}

template <int kKeys>
cudaError_t enqueue(const ClipThresholdParams& threshold, const ClipApplyParams& apply, bool& taken,
                    cudaStream_t stream) {
  const bool two = apply.in.num_tokens * apply.in.top_k <= 2 * kThreads;
  return two ? enqueue<kKeys, 2>(threshold, apply, taken, stream)
             : enqueue<kKeys, kMaxItems>(threshold, apply, taken, stream);
}

}  // namespace

cudaError_t enqueue_small_apply(const ClipThresholdParams& threshold, const ClipApplyParams& apply, bool& taken,
                                cudaStream_t stream) {
  const Assignments& in = apply.in;
  const int64_t slots = in.num_tokens * in.top_k;
  taken = in.top_k >= 1 && in.top_k <= kWarp && slots > 0 && slots <= kMaxItems * kThreads &&
          in.policy.num_experts <= kMaxExperts && num_buckets(in.policy.bucket_bits) <= 128 &&
          aligned_histograms(threshold);
  if (!taken) return cudaSuccess;
  return in.policy.num_experts <= 4 * kWarp ? enqueue<4>(threshold, apply, taken, stream)
                                     : enqueue<8>(threshold, apply, taken, stream);
}

}  // namespace macs::cuda
