// What the fused dispatch decides: docs/method.md 4 and 5, from the assignments of the whole group.
//
// Every block of every rank derives the same totals, cuts and clipped slots for itself, so that nothing has to be sent
// back. Only proposals, each of which reads a token's logits, are shared out over the blocks of a rank. Most of the time
// no bound is exceeded, which rows per expert alone show.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "assignments.cuh"
#include "fused_block.cuh"
#include "fused_exchange.cuh"
#include "fused_sort.cuh"
#include "fused_weight.cuh"
#include "reroute.cuh"

namespace macs::cuda {

__device__ __forceinline__ int units_of_expert(const FusedBlock& b, int expert) {
  return b.p.load == Load::kRows ? static_cast<int>(b.at<uint32_t>(b.args.desk.group_rows)[expert] & 0xffffu)
                                 : b.at<int>(b.args.desk.group_units)[expert];
}

__device__ __forceinline__ Capacity capacity_of(const FusedBlock& b, bool mix = true) {
  const int* const sums = b.scalars().sums;
  return Capacity(b.args.threshold, make_int4(sums[0], sums[1], sums[2], sums[3]), mix);
}

__device__ __forceinline__ int bound_of_expert(const FusedBlock& b, const Capacity& capacity, int expert) {
  const ClipThresholdParams& t = b.args.threshold;
  return Capacity::bound_of(t.gamma, capacity.of_expert(t, __ldg(t.modality + expert)), capacity.units);
}

constexpr int kExceeded = -1;  // as room: the cut is yet to be found

__device__ __forceinline__ RawCut load_cut(const RawCut* from) {
  RawCut cut;
  cut.cut = __ldcg(&from->cut);
  cut.kept = {__ldcg(&from->kept.group), __ldcg(&from->kept.own)};
  return cut;
}

// A bound and its units. Returns whether it is exceeded.
__device__ __forceinline__ bool set_bound(const FusedBlock& b, int n, int units, int bound) {
  const bool over = units > bound;
  b.at<RawCut>(b.args.desk.raw)[n].cut = make_int4(-1, 0, over ? kExceeded : bound - units, bound);
  const int place = over ? atomicAdd(&b.scalars().num_over, 1) : -1;
  b.at<int>(b.args.desk.place)[n] = place;
  if (over) b.at<int>(b.args.desk.over)[place] = n;
  return over;
}

// Every bound against its units; whether any is exceeded. `known`: the weights are. Else every row weighs the most it can, and
// the group's mix is the worst: a no is certain, and with rows a yes as well, but where rho tells experts apart. It is the
// same on all ranks.
__device__ inline bool find_exceeded(const FusedBlock& b, bool known) {
  const ClipThresholdParams& t = b.args.threshold;
  Capacity capacity = capacity_of(b, known && t.scope == Scope::kExpert);
  const int most = known || t.load == Load::kRows ? 1 : kWeightOne;
  const bool in_rows = t.load == Load::kRows || !known;
  const uint32_t* const rows = b.at<uint32_t>(b.args.desk.group_rows);
  const int* const units = b.at<int>(b.args.desk.group_units);
  const auto units_of = [&](int j) { return in_rows ? static_cast<int>(rows[j] & 0xffffu) * most : units[j]; };
  bool over = false;
  if (t.scope == Scope::kRank) {
    const int bound = capacity.of_rank(t);
#pragma unroll 1
    for (int n = b.warp; n < t.num_ranks; n += kFusedWarps) {
      int sum = 0;
#pragma unroll 1
      for (int j = b.lane; j < b.args.per_rank; j += kWarp) sum += units_of(n * b.args.per_rank + j);
      sum = __reduce_add_sync(kFullMask, sum);
      if (b.lane == 0) over |= set_bound(b, n, sum, bound);
    }
  } else {
#pragma unroll 1
    for (int j = threadIdx.x; j < t.num_experts; j += kFusedThreads) {
      const int modality = __ldg(t.modality + j);
      if (!known) capacity.visual_share = modality < 0 ? 1.0 : 0.0;  // the least: every rounding behind it is monotone
      over |= set_bound(b, j, units_of(j), Capacity::bound_of(t.gamma, capacity.of_expert(t, modality), capacity.units));
    }
  }
  return __syncthreads_or(over) != 0;
}

// How far every expert's buckets move down.
__device__ inline void find_shifts(const FusedBlock& b) {
  const ClipThresholdParams& t = b.args.threshold;
  const bool pressed = t.scope == Scope::kRank && t.alpha > 0.0;
  const Capacity capacity = capacity_of(b, pressed);
  int* const shift = b.at<int>(b.args.desk.shift);
  if (threadIdx.x == 0) b.scalars().any_over = b.scalars().num_over;
#pragma unroll 1
  for (int j = threadIdx.x; j < t.num_experts; j += kFusedThreads) {
    shift[j] = 0;
    if (!pressed) continue;
    const double rows = static_cast<double>(units_of_expert(b, j)) * (t.load == Load::kRows ? 1.0 : 1.0 / kWeightOne);
    shift[j] = pressure_shift(rows, capacity.of_expert(t, __ldg(t.modality + j)), t.alpha, t.bucket_bits);
  }
  __syncthreads();
}

// Where the bounds over[first] ... cut their levels, up to kCutsAtOnce of them in one pass over the group.
__device__ inline void cut_some(const FusedBlock& b, int first) {
  const ClipThresholdParams& t = b.args.threshold;
  const int num_levels = 2 * num_buckets(t.bucket_bits), num_over = b.scalars().num_over;
  int* const levels = b.at<int>(b.args.desk.levels);
  const int *over = b.at<int>(b.args.desk.over), *place = b.at<int>(b.args.desk.place);
  RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  const int now = min(num_over - first, kCutsAtOnce);
#pragma unroll 1
  for (int i = threadIdx.x; i < now * 2 * num_levels; i += kFusedThreads) levels[i] = 0;
  __syncthreads();
  for_each_entry(b, [&](const Entry& entry, int source) {
    const int at = place[b.bound_of()[entry.expert()]] - first;
    if (at < 0 || at >= now) return;
    int* const group = levels + at * 2 * num_levels;
    const int level = level_of_entry(b, entry), units = entry.units(t.load);
    atomicAdd(group + level, units);
    if (source == b.me.rank) atomicAdd(group + num_levels + level, units);
  });
  __syncthreads();
  if (b.warp < now) {
    int* const group = levels + b.warp * 2 * num_levels;
    const int n = over[first + b.warp], bound = raw[n].cut.w;
    const Levels found = {group, group + num_levels};
    const Cut cut = num_levels <= 8 * kWarp ? warp_find_cut<8>(found, num_levels, bound)
                                            : warp_find_cut<16>(found, num_levels, bound);
    __syncwarp();  // all lanes have read the bound
    if (b.lane == 0) raw[n] = RawCut::of(cut, bound);
  }
  __syncthreads();
}

// Of many bounds a block finds the cuts of its own share: the others are not exceeded for now.
__device__ inline void take_share(const FusedBlock& b) {
  int* const place = b.at<int>(b.args.desk.place);
  int* const over = b.at<int>(b.args.desk.over);
  if (threadIdx.x == 0) b.scalars().num_over = 0;
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) {
    if (place[n] < 0) continue;
    const bool mine = n % b.num_blocks == b.block;
    place[n] = mine ? atomicAdd(&b.scalars().num_over, 1) : -1;
    if (mine) over[place[n]] = n;
  }
  __syncthreads();
}

// The rank's blocks tell each other the cuts of their shares. False: one did not.
__device__ inline bool exchange_cuts(const FusedBlock& b) {
  const int* const over = b.at<int>(b.args.desk.over);
  RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  RawCut* const cuts = b.own<RawCut>(b.p.layout.cuts);
#pragma unroll 1
  for (int i = threadIdx.x; i < b.scalars().num_over; i += kFusedThreads) cuts[over[i]] = raw[over[i]];
  if (!b.barrier(1, Fault::kCuts)) return false;
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) {
    if (raw[n].cut.z == kExceeded) raw[n] = load_cut(cuts + n);
  }
  __syncthreads();
  return true;
}

// The cuts of all exceeded bounds, then the room that this rank has.
__device__ inline bool find_cuts(const FusedBlock& b) {
  const ClipThresholdParams& t = b.args.threshold;
  RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  int* const room = b.at<int>(b.args.desk.room);
  if (sorted(b)) {
    cut_sorted(b);
  } else {
    const bool many = b.scalars().any_over > kCutsAtOnce;  // not num_over: take_share begins to count anew while others look
    if (many) take_share(b);
#pragma unroll 1
    for (int first = 0; first < b.scalars().num_over; first += kCutsAtOnce) cut_some(b, first);
    if (many && !exchange_cuts(b)) return false;
  }
  if (t.reroute == Reroute::kNone) {
#pragma unroll 1
    for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) raw[n].cut.z = 0;
    return true;
  }
  const int pools = t.reroute == Reroute::kLocal ? t.num_ranks : 1, pool_size = b.args.bounds / pools;
#pragma unroll 1
  for (int pool = b.warp; pool < pools; pool += kFusedWarps) {
    warp_share_rooms(t, raw, pool * pool_size, (pool + 1) * pool_size, room);
  }
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) raw[n].cut.z = room[n];
  return true;
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

// The own assignments against the cuts; those at a cut in order, up to the quota.
__device__ inline void clip_own(const FusedBlock& b) {
  const RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  const Span span(b);
  clear_counted(b);
  bool any = false;
#pragma unroll 1
  for (int i = span.begin + b.lane; i < span.end; i += kWarp) {
    const Entry entry = b.own_entry(i);
    int current = kEmptySlot;
    if (entry.present()) {
      const int n = b.bound_of()[entry.expert()], level = level_of_entry(b, entry), cut = raw[n].cut.x;
      current = level < cut ? kHomeless : entry.expert() + (level == cut ? kAtCut : 0);
      if (level == cut) any = true, atomicAdd(b.counted(b.warp) + n, entry.units(b.p.load));
    }
    b.current()[i] = static_cast<int16_t>(current);
  }
  any = __any_sync(kFullMask, any);
  __syncthreads();
  if (any) {
    start_running(b);
#pragma unroll 1
    for (int first = span.begin; first < span.end; first += kWarp) {
      const int i = first + b.lane, held = i < span.end ? b.current()[i] : kEmptySlot;
      const bool pending = held >= kAtCut;
      const Entry entry = pending ? b.own_entry(i) : Entry{0};
      const int expert = pending ? held - kAtCut : 0, n = b.bound_of()[expert];
      const bool rows = b.p.load == Load::kRows;
      const bool stays = accept_in_order(pending, n, entry.units(b.p.load), rows, b.running(), raw[n].cut.y);
      if (pending) b.current()[i] = static_cast<int16_t>(stays ? expert : kHomeless);
    }
  }
  __syncthreads();
}

// Adds the homeless of this warp's span to those of the block. Behind a barrier they are complete.
__device__ __forceinline__ void count_homeless(const FusedBlock& b) {
  const Span span(b);
  int number = 0;
#pragma unroll 1
  for (int i = span.begin + b.lane; i < span.end; i += kWarp) number += b.current()[i] == kHomeless ? 1 : 0;
  number = __reduce_add_sync(kFullMask, number);
  if (b.lane == 0 && number != 0) atomicAdd(&b.scalars().homeless, number);
}

// The homeless slots of this block's tokens, a token a warp: what each wants is told to the rank's other blocks.
template <int kKeys>
__device__ inline void propose(const FusedBlock& b, int32_t* wanted) {
  const int top_k = b.p.shape.top_k, experts = b.p.shape.num_experts;
  const Rooms<kKeys> rooms(experts, b.at<int>(b.args.desk.room), b.bound_of());
#pragma unroll 1
  for (int token = b.first + b.warp; token < b.end; token += kFusedWarps) {
    const int slot = token * top_k + b.lane;
    const int current = b.lane < top_k ? b.current()[slot] : kEmptySlot;
    const unsigned homeless = __ballot_sync(kFullMask, current == kHomeless);
    if (homeless == 0) continue;
    const Entry entry = b.lane < top_k ? b.own_entry(slot) : Entry{0};
    Chooser<kKeys> tokens[1];
    tokens[0].homeless = homeless;
    tokens[0].original = entry.present() ? entry.expert() : -1;
    tokens[0].current = max(current, -1);
    const bool local = b.p.reroute == Reroute::kLocal && entry.present();
    tokens[0].from = local ? entry.expert() / b.args.per_rank * b.args.per_rank : -1;
    const int leader = __ffs(homeless) - 1;
    tokens[0].units = __shfl_sync(kFullMask, entry.units(b.p.load), leader);
    load_logits<kKeys>(b.me.router_logits, experts, token, tokens[0].logits);
    const int choice = choose<1, kKeys>(rooms, tokens, b.args.per_rank);
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
    atomicAdd(b.counted(b.warp) + b.bound_of()[expert], b.own_entry(i).units(b.p.load));
  }
  any = __any_sync(kFullMask, any);
  __syncthreads();
  if (any) {
    start_running(b);
#pragma unroll 1
    for (int first = span.begin; first < span.end; first += kWarp) {
      const int i = first + b.lane;
      const int expert = i < span.end && b.current()[i] == kHomeless ? __ldcg(wanted + i) : -1;
      const bool asks = expert >= 0, rows = b.p.load == Load::kRows;
      const int n = asks ? b.bound_of()[expert] : 0, units = asks ? b.own_entry(i).units(b.p.load) : 0;
      const bool accepted = accept_in_order(asks, n, units, rows, b.running(), room[n]);
      turned_away |= asks && !accepted;
      if (!accepted) continue;
      b.current()[i] = static_cast<int16_t>(expert);
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
  if (b.p.reroute == Reroute::kNone || b.me.router_logits == nullptr) return true;
  count_homeless(b);
  __syncthreads();
  if (b.scalars().homeless == 0) return true;
#pragma unroll 1
  for (int round = 0; round < b.p.reroute_rounds; ++round) {
    int32_t* const wanted = b.own<int32_t>(b.p.layout.wanted) + (round & 1) * b.p.shape.max_tokens * b.p.shape.top_k;
    propose<kKeys>(b, wanted);
    if (!b.barrier(2 + round, Fault::kProposals)) return false;
    if (!accept(b, wanted)) return true;  // who found no candidate will find none later
  }
  return true;
}

}  // namespace macs::cuda
