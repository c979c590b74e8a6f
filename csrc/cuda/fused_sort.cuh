// Cuts of many bounds at once, where experts are bounded and shared memory holds the group's assignments.
//
// Assignments are sorted by expert, once; four lanes then search a bound's cut in its expert's list, two bits of it at a
// time: what three levels leave above them are sums over the list. An own slot at the cut looks in the list for those
// before it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"

namespace macs::cuda {

constexpr int kCutLanes = 4;
constexpr int kCutsOfWarp = kWarp / kCutLanes;

// More bounds than cut_some counts at once.
__device__ __forceinline__ bool sorted(const FusedBlock& b) {
  return b.args.sorts && b.scalars().any_over > kCutsAtOnce;
}

__device__ __forceinline__ int level_of_entry(const FusedBlock& b, const Entry& entry) {
  return level_of(entry.bucket(), b.at<int>(b.args.desk.shift)[entry.expert()], entry.text(), b.p.protect_text,
                  b.p.bucket_bits);
}

// An assignment in its expert's list: 9 bits of level, 9 of units, and whose it is: 1 and 13 bits of slot, or 0.
struct Item {
  uint32_t bits;

  static __device__ __forceinline__ Item of(int level, int units, bool own, int slot) {
    return {static_cast<uint32_t>(level) | static_cast<uint32_t>(units) << 9 |
            (own ? 1u << 18 | static_cast<uint32_t>(slot) << 19 : 0u)};
  }
  __device__ __forceinline__ int level() const { return static_cast<int>(bits & 0x1ffu); }
  __device__ __forceinline__ int units() const { return static_cast<int>(bits >> 9 & 0x1ffu); }
  __device__ __forceinline__ bool own() const { return (bits >> 18 & 1u) != 0; }
  __device__ __forceinline__ int slot() const { return static_cast<int>(bits >> 19); }
};

// Every lane of kCutLanes has the sum.
__device__ __forceinline__ int sum_of_lanes(int x) {
#pragma unroll
  for (int offset = kCutLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// The list of an exceeded expert.
struct List {
  const Item* items;
  int count;

  __device__ __forceinline__ List(const FusedBlock& b, int expert)
      : count(static_cast<int>(b.at<uint32_t>(b.args.desk.group_rows)[expert] & 0xffffu)) {
    items = b.at<Item>(b.args.desk.lists) + b.at<int>(b.args.desk.starts)[expert] - count;
  }

  // kCutLanes lanes, of which this is `lane`; all lanes of the warp together: where `bound` cuts.
  __device__ __forceinline__ RawCut cut(int lane, int num_levels, int bound) const {
    int level = 0, step = 1;  // the greatest level with more than `bound` units on it and above
    while (4 * step < num_levels) step *= 4;
#pragma unroll 1
    for (; step > 0; step /= 4) {
      int units[3] = {0, 0, 0};
#pragma unroll 1
      for (int i = lane; i < count; i += kCutLanes) {
        const int over = items[i].level() - level;
#pragma unroll
        for (int j = 0; j < 3; ++j) units[j] += over >= (j + 1) * step ? items[i].units() : 0;
      }
      int up = 0;
#pragma unroll
      for (int j = 0; j < 3; ++j) up += sum_of_lanes(units[j]) > bound ? step : 0;
      level += up;
    }
    int above = 0, at = 0, own_at = 0, upto = 0, own_upto = 0;
#pragma unroll 1
    for (int i = lane; i < count; i += kCutLanes) {
      const int units = items[i].units(), own = items[i].own() ? units : 0, over = items[i].level() - level;
      above += over > 0 ? units : 0;
      at += over == 0 ? units : 0, own_at += over == 0 ? own : 0;
      upto += over <= 0 ? units : 0, own_upto += over <= 0 ? own : 0;
    }
    at = sum_of_lanes(at), own_at = sum_of_lanes(own_at);
    const int64_t remainder = bound - sum_of_lanes(above);
    const int quota = static_cast<int>(own_at == at ? remainder : remainder * own_at / at);
    const Kept kept = {static_cast<unsigned>(sum_of_lanes(upto)), static_cast<unsigned>(sum_of_lanes(own_upto))};
    return RawCut::of({level, quota, 0, kept}, bound);
  }

  // The own units at a level in slots up to `slot`.
  __device__ __forceinline__ int own_upto(int level, int slot) const {
    int sum = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      sum += items[i].own() && items[i].level() == level && items[i].slot() <= slot ? items[i].units() : 0;
    }
    return sum;
  }
};

// Lists of all exceeded experts; `starts`, which is not needed yet, is where each ends.
__device__ inline void sort_group(const FusedBlock& b) {
  const uint32_t* const rows = b.at<uint32_t>(b.args.desk.group_rows);
  int* const ends = b.at<int>(b.args.desk.starts);
  const int experts = b.p.shape.num_experts, share = (experts + kWarp - 1) / kWarp;
  if (b.warp == 0) {
    const int first = b.lane * share, end = min(first + share, experts);
    int sum = 0;
#pragma unroll 1
    for (int j = first; j < end; ++j) sum += static_cast<int>(rows[j] & 0xffffu);
    int next = warp_inclusive_sum(sum) - sum;
#pragma unroll 1
    for (int j = first; j < end; ++j) {
      ends[j] = next;
      next += static_cast<int>(rows[j] & 0xffffu);
    }
  }
  __syncthreads();
  Item* const lists = b.at<Item>(b.args.desk.lists);
  const int* const place = b.at<int>(b.args.desk.place);
  for (int source = 0; source < b.p.shape.num_ranks; ++source) {
    const int slots = b.at<int>(b.args.desk.tokens)[source] * b.p.shape.top_k;
#pragma unroll 1
    for (int slot = threadIdx.x; slot < slots; slot += kFusedThreads) {
      const Entry entry = {b.entries_of(source)[slot]};
      if (!entry.present() || place[entry.expert()] < 0) continue;
      const int at = atomicAdd(ends + entry.expert(), 1);
      lists[at] = Item::of(level_of_entry(b, entry), entry.units(b.p.load), source == b.me.rank, slot);
    }
  }
  __syncthreads();
}

// The cuts of all exceeded bounds, by every block for itself.
__device__ inline void cut_sorted(const FusedBlock& b) {
  sort_group(b);
  b.stamp(21);
  const int num_over = b.scalars().any_over, num_levels = 2 * num_buckets(b.p.bucket_bits);
  RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  const int lane = b.lane % kCutLanes;
#pragma unroll 1
  for (int first = b.warp * kCutsOfWarp; first < num_over; first += kFusedWarps * kCutsOfWarp) {
    const int i = first + b.lane / kCutLanes, n = b.at<int>(b.args.desk.over)[min(i, num_over - 1)];
    const RawCut cut = List(b, n).cut(lane, num_levels, raw[n].cut.w);
    __syncwarp();  // all lanes have read the bound
    if (lane == 0 && i < num_over) raw[n] = cut;
  }
  __syncthreads();
  b.stamp(22);
}

// The own assignments against these cuts; those at a cut in order, up to the quota.
__device__ inline void clip_sorted(const FusedBlock& b) {
  const RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
#pragma unroll 1
  for (int i = threadIdx.x; i < b.slots(); i += kFusedThreads) {
    const Entry entry = b.own_entry(i);
    int current = kEmptySlot;
    if (entry.present()) {
      const int n = entry.expert(), level = level_of_entry(b, entry);
      const int4 cut = raw[n].cut;
      const bool stays = level > cut.x || (level == cut.x && List(b, n).own_upto(level, i) <= cut.y);
      current = stays ? n : kHomeless;
    }
    b.current()[i] = static_cast<int16_t>(current);
  }
  __syncthreads();
}

}  // namespace macs::cuda
