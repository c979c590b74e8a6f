// Cuts of many bounds at once, where experts are bounded and shared memory holds the group's assignments.
//
// Assignments are sorted by expert, once; eight lanes then search a bound's cut in its expert's list, bit by bit: what a bit
// leaves is a sum over the list. The own slots at the cut that stay are the first ones in order, so that one more such
// search, over slots, tells where they end.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"

namespace macs::cuda {

constexpr int kCutLanes = 8;
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

// Eight lanes over an expert's list.
struct List {
  const Item* items;
  int count, lane;

  // The sum of units(item), in all eight. All lanes of the warp together.
  template <class Units>
  __device__ __forceinline__ int sum(Units units) const {
    int sum = 0;
#pragma unroll 2
    for (int i = lane; i < count; i += kCutLanes) sum += units(items[i]);
#pragma unroll
    for (int offset = kCutLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
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
    for (int j = first; j < end; ++j) sum += static_cast<int>(rows[j] & 0xffffu);
    int next = warp_inclusive_sum(sum) - sum;
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
#pragma unroll 2
    for (int slot = threadIdx.x; slot < slots; slot += kFusedThreads) {
      const Entry entry = {b.entries_of(source)[slot]};
      if (!entry.present() || place[entry.expert()] < 0) continue;
      const int at = atomicAdd(ends + entry.expert(), 1);
      lists[at] = Item::of(level_of_entry(b, entry), entry.units(b.p.load), source == b.me.rank, slot);
    }
  }
  __syncthreads();
}

// The greatest x below 2 * `top`, a power of two, for which holds(x): it holds from 0 up to there.
template <class Holds>
__device__ __forceinline__ int greatest(int top, Holds holds) {
  int x = 0;
#pragma unroll 1
  for (int bit = top; bit > 0; bit /= 2) {
    if (holds(x | bit)) x |= bit;
  }
  return x;
}

// The cut of a bound from its list, and the last own slot at the cut that stays. All lanes of the warp together.
__device__ __forceinline__ RawCut cut_of_list(const List& list, int num_levels, int num_slots, int bound, int& stay) {
  const int level =
      greatest(num_levels / 2, [&](int x) { return list.sum([&](Item i) { return i.level() >= x ? i.units() : 0; }) > bound; });
  const int above = list.sum([&](Item i) { return i.level() > level ? i.units() : 0; });
  const int at = list.sum([&](Item i) { return i.level() == level ? i.units() : 0; });
  const int own_at = list.sum([&](Item i) { return i.own() && i.level() == level ? i.units() : 0; });
  const int own = list.sum([&](Item i) { return i.own() && i.level() <= level ? i.units() : 0; });
  const int all = list.sum([&](Item i) { return i.units(); });
  const int64_t remainder = bound - above;
  const int quota = static_cast<int>(own_at == at ? remainder : remainder * own_at / at);
  const int top = 1 << (31 - __clz(max(num_slots, 1)));
  stay = greatest(top, [&](int x) {
           return list.sum([&](Item i) { return i.own() && i.level() == level && i.slot() < x ? i.units() : 0; }) <= quota;
         }) - 1;
  const Cut cut = {level, quota, 0, {static_cast<unsigned>(all - above), static_cast<unsigned>(own)}};
  return RawCut::of(cut, bound);
}

// The cuts of all exceeded bounds, by every block for itself.
__device__ inline void cut_sorted(const FusedBlock& b) {
  sort_group(b);
  const int num_over = b.scalars().any_over, num_levels = 2 * num_buckets(b.p.bucket_bits);
  const uint32_t* const rows = b.at<uint32_t>(b.args.desk.group_rows);
  RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  const int lane = b.lane % kCutLanes;
  for (int first = b.warp * kCutsOfWarp; first < num_over; first += kFusedWarps * kCutsOfWarp) {
    const int i = first + b.lane / kCutLanes, n = b.at<int>(b.args.desk.over)[min(i, num_over - 1)];
    const int count = static_cast<int>(rows[n] & 0xffffu), end = b.at<int>(b.args.desk.starts)[n];
    const List list = {b.at<Item>(b.args.desk.lists) + end - count, count, lane};
    int stay = 0;
    const RawCut cut = cut_of_list(list, num_levels, b.slots(), raw[n].cut.w, stay);
    __syncwarp();  // all lanes have read the bound
    if (lane != 0 || i >= num_over) continue;
    raw[n] = cut;
    b.at<int>(b.args.desk.stay)[n] = stay;
  }
  __syncthreads();
}

// The own assignments against these cuts.
__device__ inline void clip_sorted(const FusedBlock& b) {
  const RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  const int* const stay = b.at<int>(b.args.desk.stay);
  for (int i = threadIdx.x; i < b.slots(); i += kFusedThreads) {
    const Entry entry = b.own_entry(i);
    int current = kEmptySlot;
    if (entry.present()) {
      const int n = entry.expert(), level = level_of_entry(b, entry), cut = raw[n].cut.x;
      current = level > cut || (level == cut && i <= stay[n]) ? n : kHomeless;
    }
    b.current()[i] = static_cast<int16_t>(current);
  }
  __syncthreads();
}

}  // namespace macs::cuda
