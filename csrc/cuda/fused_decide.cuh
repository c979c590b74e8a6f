// What the fused dispatch decides: docs/design/method.md 4 and 5, from the assignments of the whole group.
//
// Every block of every rank derives the same totals and clipped slots for itself, so that nothing has to be sent back. What
// is shared out over the blocks of a rank: the cuts of many bounds (fused_cut.cuh), and proposals, each of which reads a
// token's logits. Most of the time no bound is exceeded, which rows per expert alone show.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "assignments.cuh"
#include "fused_block.cuh"
#include "fused_cut.cuh"
#include "fused_weight.cuh"
#include "plan/accept.cuh"
#include "plan/choose.cuh"
#include "plan/headroom.cuh"
#include "plan/rounds.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {

// Of the whole group, with the weights if `weighed`: else in rows.
__device__ __forceinline__ int units_of_expert(const FusedBlock& b, int expert, bool weighed) {
  return weighed ? b.group_units()[expert]
                 : static_cast<int>(b.group_rows()[expert] & 0xffffu);
}

__device__ __forceinline__ Capacity capacity_of(const FusedBlock& b, bool mix = true) {
  const int* const sums = b.scalars().sums;
  return Capacity(b.args.threshold, make_int4(sums[0], sums[1], sums[2], sums[3]), mix);
}

__device__ __forceinline__ int bound_of_expert(const FusedBlock& b, const Capacity& capacity, int expert) {
  const ClipThresholdParams& t = b.args.threshold;
  return Capacity::bound_of(t.policy.gamma, capacity.of_expert(t, b.modality()[expert]), capacity.units);
}

// A bound and its units. Returns whether it is exceeded.
__device__ __forceinline__ bool set_bound(const FusedBlock& b, int n, int units, int bound) {
  raw_cut(b, n).cut = make_int4(-1, 0, bound - units, bound);
  set_edge(b, n, 0);
  return is_exceeded(raw_cut(b, n));
}

// Every bound against its units; whether any is exceeded. `known`: the weights are. Else every row weighs the most it can, and
// the group's mix is the worst: a no is certain, and with rows a yes as well, but where rho differs between experts. It is the
// same on all ranks. So is an expert that does not exist, and counts as exceeded here.
__device__ inline bool find_exceeded(const FusedBlock& b, bool known) {
  const ClipThresholdParams& t = b.args.threshold;
  Capacity capacity = capacity_of(b, known && t.policy.scope == Scope::kExpert);
  const int most = known || t.policy.load == Load::kRows ? 1 : kWeightOne;
  const bool weighed = t.policy.load != Load::kRows && known;
  const auto units_of = [&](int j) { return units_of_expert(b, j, weighed) * most; };
  bool over = counts_unknown(b);
  if (t.policy.scope == Scope::kRank) {
    const int bound = capacity.of_rank(t);
#pragma unroll 1
    for (int n = b.warp; n < t.policy.num_ranks; n += kFusedWarps) {
      int sum = 0;
#pragma unroll 1
      for (int j = b.lane; j < b.args.per_rank; j += kWarp) sum += units_of(n * b.args.per_rank + j);
      sum = __reduce_add_sync(kFullMask, sum);
      if (b.lane == 0) over |= set_bound(b, n, sum, bound);
    }
  } else {
#pragma unroll 1
    for (int j = threadIdx.x; j < t.policy.num_experts; j += kFusedThreads) {
      // The least: every rounding behind it is monotone.
      if (!known) capacity.visual_share = b.modality()[j] < 0 ? 1.0 : 0.0;
      over |= set_bound(b, j, units_of(j), bound_of_expert(b, capacity, j));
    }
  }
  return __syncthreads_or(over) != 0;
}

// How far every expert's buckets move down, where they do.
__device__ inline void find_shifts(const FusedBlock& b) {
  const ClipThresholdParams& t = b.args.threshold;
  if (t.policy.scope != Scope::kRank || !(t.policy.alpha > 0.0)) return;
  const Capacity capacity = capacity_of(b);
  const bool weighed = t.policy.load != Load::kRows;
#pragma unroll 1
  for (int j = threadIdx.x; j < t.policy.num_experts; j += kFusedThreads) {
    const double rows = static_cast<double>(units_of_expert(b, j, weighed)) * (weighed ? 1.0 / kWeightOne : 1.0);
    b.expert_cut()[j] = pressure_shift(rows, capacity.of_expert(t, b.modality()[j]), t.policy.alpha, t.policy.bucket_bits);
  }
  __syncthreads();
}

// The headroom that this rank has for what is re-routed.
__device__ inline void share_headroom(const FusedBlock& b) {
  const ClipThresholdParams& t = b.args.threshold;
  if (t.policy.reroute == Reroute::kNone) return;
  RawCut* const raw = b.at<RawCut>(b.args.tables.raw);
  block_share_headroom(t.policy, raw, b.args.bounds, b.headroom());
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) raw[n].cut.z = b.headroom()[n];
}

// The own assignments that this warp walks over, 32 at a time.
struct Span {
  int begin, end;
  __device__ __forceinline__ explicit Span(const FusedBlock& b) {
    const int share = (b.slots() + kFusedThreads - 1) / kFusedThreads * kWarp;
    begin = min(b.warp * share, b.slots()), end = min(begin + share, b.slots());
  }
};

// An own assignment that stays or has found another expert.
__device__ __forceinline__ void count_row(const FusedBlock& b, int slot, int expert) {
  const bool before = slot < b.first * b.p.shape.top_k;
  atomicAdd(b.at<uint32_t>(b.args.tables.own_rows) + expert, before ? 0x10001u : 1u);
}

// The own assignments against their bounds' edges. Returns whether one is clipped.
__device__ inline bool clip_own(const FusedBlock& b) {
  bool any = false;
#pragma unroll 2
  for (int slot = threadIdx.x; slot < b.slots(); slot += kFusedThreads) {
    const Entry entry = b.own_entry(slot);
    const ExpertCut cut = {entry.in(b.expert_cut())};
    const bool present = entry.present();
    const bool stays = standing(level_of_entry(b, entry, cut), slot) >= static_cast<int>(cut.about());
    b.current()[slot] = static_cast<int16_t>(!present ? kEmptySlot : stays ? entry.expert() : kUnplaced);
    if (present && stays) count_row(b, slot, entry.expert());
    any |= present && !stays;
  }
  return __syncthreads_or(any) != 0;
}

// The unplaced slots of this block's tokens, a token a warp: what each wants is sent to the rank's other blocks.
template <int kKeys>
__device__ inline void propose_own(const FusedBlock& b, int32_t* wanted) {
  const int top_k = b.p.shape.top_k, experts = b.p.shape.num_experts;
  const Headroom<kKeys> headroom(experts, b.headroom(), b.bound_of());
  unsigned* const words = b.at<unsigned>(b.args.tables.struck) + b.warp * kStruckWords;
#pragma unroll 1
  for (int token = b.first + b.warp; token < b.end; token += kFusedWarps) {
    const int slot = token * top_k + b.lane;
    const int current = b.lane < top_k ? b.current()[slot] : kEmptySlot;
    const unsigned unplaced = __ballot_sync(kFullMask, current == kUnplaced);
    if (unplaced == 0) continue;
    const Entry entry = b.lane < top_k ? b.own_entry(slot) : Entry::nobody();
    UnplacedToken<kKeys> tokens[1];
    tokens[0].unplaced = unplaced;
    tokens[0].original = entry.present() ? entry.expert() : -1;
    tokens[0].current = max(current, -1);
    const bool local = b.p.policy.reroute == Reroute::kLocal && entry.present();
    tokens[0].from = local ? entry.expert() / b.args.per_rank * b.args.per_rank : -1;
    const int leader = __ffs(unplaced) - 1;
    tokens[0].units = __shfl_sync(kFullMask, entry.units(b.p.policy.load), leader);
    load_logits<kKeys>(Logits{b.me.router_logits, DType::kFloat32}, experts, token, tokens[0].logits);
    const int choice = choose<1, kKeys>(headroom, tokens, b.args.per_rank, words);
    if (current == kUnplaced) wanted[slot] = choice;
  }
}

// A block, which accepts for its whole rank as every other block of it does: what rounds.cuh asks of it.
template <int kKeys>
class BlockTeam {
 public:
  __device__ __forceinline__ explicit BlockTeam(const FusedBlock& b) : b_(b), span_(b) {}

  __device__ __forceinline__ bool propose(int round) {
    wanted_ = b_.own<int32_t>(b_.p.layout.wanted) + (round & 1) * b_.p.shape.max_tokens * b_.p.shape.top_k;
    propose_own<kKeys>(b_, wanted_);
    if (!b_.barrier(1 + round, Fault::kProposals)) return false;
    sum_proposals();
    return true;
  }
  template <class Body>
  __device__ __forceinline__ void for_each_proposal(Body body) {
    if (!any_) return;
#pragma unroll 1
    for (int first = span_.begin; first < span_.end; first += kWarp) {
      int slot = first + b_.lane;
      const int expert = slot < span_.end ? wanted_by(slot) : -1;
      body(slot, expert, expert >= 0 ? b_.own_entry(slot).units(b_.p.policy.load) : 0);
    }
  }
  __device__ __forceinline__ void settle(int slot, int expert, bool accepted) {
    if (!accepted) return;
    b_.current()[slot] = static_cast<int16_t>(expert);
    count_row(b_, slot, expert);
  }
  __device__ __forceinline__ int num_bounds() const { return b_.args.bounds; }
  __device__ __forceinline__ int bound_of(int expert) const { return b_.bound_of()[expert]; }
  __device__ __forceinline__ int64_t limit(int bound) const { return headroom()[bound]; }
  __device__ __forceinline__ int* running() const { return b_.running(b_.warp); }
  __device__ __forceinline__ int* proposed() const { return b_.at<int>(b_.args.tables.proposed); }
  __device__ __forceinline__ int* headroom() const { return b_.headroom(); }
  __device__ __forceinline__ int* accepted() const { return b_.at<int>(b_.args.tables.accepted); }
  __device__ __forceinline__ const int* sum_accepted() const { return accepted(); }

 private:
  __device__ __forceinline__ int wanted_by(int slot) const {
    return b_.current()[slot] == kUnplaced ? __ldcg(wanted_ + slot) : -1;
  }
  __device__ __forceinline__ void sum_proposals() {
#pragma unroll 1
    for (int n = b_.lane; n < num_bounds(); n += kWarp) running()[n] = 0;
    __syncwarp();
    bool any = false;
#pragma unroll 1
    for (int slot = span_.begin + b_.lane; slot < span_.end; slot += kWarp) {
      const int expert = wanted_by(slot);
      if (expert < 0) continue;
      any = true;
      atomicAdd(running() + bound_of(expert), b_.own_entry(slot).units(b_.p.policy.load));
    }
    any_ = __any_sync(kFullMask, any);
    __syncthreads();
    scan_warps(b_.running(0), num_bounds() + 1, num_bounds(), [&](int n, int units) {
      proposed()[n] = units;
      accepted()[n] = 0;
    });
    __syncthreads();
  }

  const FusedBlock& b_;
  const Span span_;
  int32_t* wanted_;
  bool any_;  // whether this warp has a proposal
};

// False: a block of this rank did not take part.
template <int kKeys>
__device__ inline bool reroute_own(const FusedBlock& b) {
  BlockTeam<kKeys> team(b);
  const bool ok = reroute_rounds(team, b.p.policy, b.me.router_logits);
  __syncthreads();  // all places have been handed out
  return ok;
}

}  // namespace macs::cuda
