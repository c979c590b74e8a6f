// What the fused dispatch decides: docs/method.md 4 and 5, from the assignments of the whole group.
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
#include "reroute.cuh"

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
// the group's mix is the worst: a no is certain, and with rows a yes as well, but where rho tells experts apart. It is the
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
    b.fate()[j] = pressure_shift(rows, capacity.of_expert(t, b.modality()[j]), t.policy.alpha, t.policy.bucket_bits);
  }
  __syncthreads();
}

// The room that this rank has for what is re-routed.
__device__ inline void share_rooms(const FusedBlock& b) {
  const ClipThresholdParams& t = b.args.threshold;
  if (t.policy.reroute == Reroute::kNone) return;
  RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  int* const room = b.at<int>(b.args.desk.room);
  block_share_rooms(t, raw, b.args.bounds, room);
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) raw[n].cut.z = room[n];
}

// The own assignments that this warp walks over, 32 at a time.
struct Span {
  int begin, end;
  __device__ __forceinline__ explicit Span(const FusedBlock& b) {
    const int share = (b.slots() + kFusedThreads - 1) / kFusedThreads * kWarp;
    begin = min(b.warp * share, b.slots()), end = min(begin + share, b.slots());
  }
};

// Behind a barrier of the block: where the warps before this one leave off.
__device__ __forceinline__ void start_running(const FusedBlock& b) {
#pragma unroll 1
  for (int n = b.lane; n < b.args.bounds; n += kWarp) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kFusedWarps - 1; ++w) sum += w < b.warp ? b.counted(w)[n] : 0;
    b.running()[n] = sum;
  }
  __syncwarp();
}

__device__ __forceinline__ void clear_counted(const FusedBlock& b) {
#pragma unroll 1
  for (int n = b.lane; n < b.args.bounds; n += kWarp) b.counted(b.warp)[n] = 0;
  __syncwarp();
}

// An own assignment that stays or has found another expert.
__device__ __forceinline__ void count_row(const FusedBlock& b, int slot, int expert) {
  const bool before = slot < b.first * b.p.shape.top_k;
  atomicAdd(b.at<uint32_t>(b.args.desk.own_rows) + expert, before ? 0x10001u : 1u);
}

// The own assignments against their bounds' edges. Returns whether one is given up.
__device__ inline bool clip_own(const FusedBlock& b) {
  bool any = false;
#pragma unroll 2
  for (int slot = threadIdx.x; slot < b.slots(); slot += kFusedThreads) {
    const Entry entry = b.own_entry(slot);
    const Fate fate = {entry.in(b.fate())};
    const bool present = entry.present();
    const bool stays = standing(level_of_entry(b, entry, fate), slot) >= static_cast<int>(fate.about());
    b.current()[slot] = static_cast<int16_t>(!present ? kEmptySlot : stays ? entry.expert() : kHomeless);
    if (present && stays) count_row(b, slot, entry.expert());
    any |= present && !stays;
  }
  return __syncthreads_or(any) != 0;
}

// The homeless slots of this block's tokens, a token a warp: what each wants is told to the rank's other blocks.
template <int kKeys>
__device__ inline void propose(const FusedBlock& b, int32_t* wanted) {
  const int top_k = b.p.shape.top_k, experts = b.p.shape.num_experts;
  const Rooms<kKeys> rooms(experts, b.at<int>(b.args.desk.room), b.bound_of());
  unsigned* const words = b.at<unsigned>(b.args.desk.struck) + b.warp * kStruckWords;
#pragma unroll 1
  for (int token = b.first + b.warp; token < b.end; token += kFusedWarps) {
    const int slot = token * top_k + b.lane;
    const int current = b.lane < top_k ? b.current()[slot] : kEmptySlot;
    const unsigned homeless = __ballot_sync(kFullMask, current == kHomeless);
    if (homeless == 0) continue;
    const Entry entry = b.lane < top_k ? b.own_entry(slot) : Entry::nobody();
    Chooser<kKeys> tokens[1];
    tokens[0].homeless = homeless;
    tokens[0].original = entry.present() ? entry.expert() : -1;
    tokens[0].current = max(current, -1);
    const bool local = b.p.policy.reroute == Reroute::kLocal && entry.present();
    tokens[0].from = local ? entry.expert() / b.args.per_rank * b.args.per_rank : -1;
    const int leader = __ffs(homeless) - 1;
    tokens[0].units = __shfl_sync(kFullMask, entry.units(b.p.policy.load), leader);
    load_logits<kKeys>(Logits{b.me.router_logits, DType::kFloat32}, experts, token, tokens[0].logits);
    const int choice = choose<1, kKeys>(rooms, tokens, b.args.per_rank, words);
    if (current == kHomeless) wanted[slot] = choice;
  }
}

// All proposals of the rank in order, up to the room. Returns whether somebody was turned away.
__device__ inline bool accept(const FusedBlock& b, const int32_t* wanted) {
  const Span span(b);
  int* const room = b.at<int>(b.args.desk.room);
  int* const taken = b.at<int>(b.args.desk.taken);
  clear_counted(b);
  bool any = false, turned_away = false;
#pragma unroll 1
  for (int i = span.begin + b.lane; i < span.end; i += kWarp) {
    const int expert = b.current()[i] == kHomeless ? __ldcg(wanted + i) : -1;
    if (expert < 0) continue;
    any = true;
    atomicAdd(b.counted(b.warp) + b.bound_of()[expert], b.own_entry(i).units(b.p.policy.load));
  }
  any = __any_sync(kFullMask, any);
  __syncthreads();
  if (any) {
    start_running(b);
#pragma unroll 1
    for (int first = span.begin; first < span.end; first += kWarp) {
      const int i = first + b.lane;
      const int expert = i < span.end && b.current()[i] == kHomeless ? __ldcg(wanted + i) : -1;
      const bool asks = expert >= 0, rows = b.p.policy.load == Load::kRows;
      const int n = asks ? b.bound_of()[expert] : 0, units = asks ? b.own_entry(i).units(b.p.policy.load) : 0;
      const bool accepted = accept_in_order(asks, n, units, rows, b.running(), room[n]);
      turned_away |= asks && !accepted;
      if (!accepted) continue;
      b.current()[i] = static_cast<int16_t>(expert);
      count_row(b, i, expert);
      atomicAdd(taken + n, units);
    }
  }
  turned_away = __syncthreads_or(turned_away) != 0;
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) {
    room[n] -= taken[n];
    taken[n] = 0;
  }
  __syncthreads();
  return turned_away;
}

// Rounds of proposals, until nobody was turned away. False: a block of this rank did not take part.
template <int kKeys>
__device__ inline bool reroute_own(const FusedBlock& b) {
  if (b.p.policy.reroute == Reroute::kNone || b.me.router_logits == nullptr) return true;
#pragma unroll 1
  for (int round = 0; round < b.p.policy.reroute_rounds; ++round) {
    int32_t* const wanted = b.own<int32_t>(b.p.layout.wanted) + (round & 1) * b.p.shape.max_tokens * b.p.shape.top_k;
    propose<kKeys>(b, wanted);
    if (!b.barrier(1 + round, Fault::kProposals)) return false;
    if (!accept(b, wanted)) return true;  // who found no candidate will find none later
  }
  return true;
}

}  // namespace macs::cuda
