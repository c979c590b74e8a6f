// Where the exceeded bounds of the fused dispatch cut (docs/design/method.md 4 and 5).
//
// The group's units on a bound are counted by level, and a warp finds the level that is cut and the own quota at it. The own
// units at that level are then counted by slot, and the same search finds the slot at which the quota is used up. What
// becomes of an assignment is from then on one comparison with its bound's *edge*: nobody has to agree on an order.
//
// This is where the fused dispatch truly differs from clip_apply, which finds levels in histograms and hands the quota out
// in order over a grid (plan/threshold.cuh, plan/accept.cuh). Both give the same bits; bounds, shifts, quota and headroom
// are the same code.
//
// From kCutsAtOnce bounds on the rank's blocks take a share each and exchange cuts as LL words.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "fused_exchange.cuh"
#include "plan/threshold.cuh"
#include "warp.cuh"

namespace macs::cuda {

// The bounds that a block cuts: all, or a share of many.
struct CutShare {
  int first, end;
  bool several;  // blocks, each with its own: they send each other what they cut

  __device__ __forceinline__ explicit CutShare(const FusedBlock& b) : first(0), end(b.args.bounds) {
    several = end >= kCutsAtOnce;
    if (!several) return;
    first = b.args.by_blocks.divide(b.args.bounds * b.block);
    end = b.args.by_blocks.divide(b.args.bounds * (b.block + 1));
  }
  __device__ __forceinline__ int size() const { return end - first; }
};

// Experts of a bound.
__device__ __forceinline__ int experts_of_bound(const FusedBlock& b) {
  return b.p.policy.scope == Scope::kExpert ? 1 : b.args.per_rank;
}

constexpr int kCutWords = 4;  // of a bound: edge; level and quota; units kept by the group and by this rank
constexpr int kLevelBits = 9, kSlotBits = 14;
constexpr int kLastSlot = (1 << kSlotBits) - 1;
static_assert(kMaxFusedSlots <= kLastSlot);

// What a pass knows of an expert, a word each: how far its buckets move down, and above that what the pass is about. While
// bounds are cut, the mark of its bound if that is one of those; to clip, the bound's edge.
struct ExpertCut {
  static constexpr int kShiftBits = 8;

  uint32_t word;

  __device__ __forceinline__ int shift() const { return static_cast<int>(word & (1u << kShiftBits) - 1); }
  __device__ __forceinline__ uint32_t about() const { return word >> kShiftBits; }
  __device__ __forceinline__ static uint32_t change(uint32_t word, uint32_t about) {
    return about << kShiftBits | (word & (1u << kShiftBits) - 1);
  }
};
static_assert(kLevelBits + kSlotBits + 1 + ExpertCut::kShiftBits <= 32);  // an edge is at most one above all that may stand

// That an expert's bound is the one at `at` of those that are cut now, and at which level, once that is known.
__device__ __forceinline__ uint32_t mark_of(int at, int level = 0) {
  return static_cast<uint32_t>(at + 1) << kLevelBits | static_cast<uint32_t>(level);
}

// Which of those, -1: none.
__device__ __forceinline__ int marked_at(const ExpertCut& cut) { return static_cast<int>(cut.about() >> kLevelBits) - 1; }

__device__ __forceinline__ int level_of_entry(const FusedBlock& b, const Entry& entry, const ExpertCut& cut) {
  return level_of(entry.bucket(), cut.shift(), entry.text(), b.p.policy);
}

__device__ __forceinline__ void set_about(const FusedBlock& b, int expert, uint32_t about) {
  uint32_t& word = b.expert_cut()[expert];
  word = ExpertCut::change(word, about);
}

// One warp: marks the experts of bound `n`.
__device__ __forceinline__ void mark_experts(const FusedBlock& b, int n, uint32_t mark) {
  const int each = experts_of_bound(b);
#pragma unroll 1
  for (int j = n * each + b.lane; j < (n + 1) * each; j += kWarp) set_about(b, j, mark);
}

// Where an own assignment stands on its bound: those below the edge are clipped.
__device__ __forceinline__ int standing(int level, int slot) { return level << kSlotBits | (kLastSlot - slot); }

__device__ __forceinline__ RawCut& raw_cut(const FusedBlock& b, int n) { return b.at<RawCut>(b.args.tables.raw)[n]; }
__device__ __forceinline__ bool is_exceeded(const RawCut& raw) { return raw.cut.z < 0; }  // until it is cut

// Counters of up to kCutsAtOnce bounds: the group's units by level, the own ones by level, and those at the cut by slot, the
// first ones last.
struct CutCells {
  int* cells;
  int num_levels;  // a multiple of four warps

  static __host__ __device__ __forceinline__ int levels(int bucket_bits) {
    return max(2 * num_buckets(bucket_bits), 4 * kWarp);
  }
  static __host__ __device__ __forceinline__ int words(int bucket_bits) { return 2 * levels(bucket_bits) + kSlotCells; }

  __device__ __forceinline__ explicit CutCells(const FusedBlock& b)
      : cells(b.at<int>(b.args.tables.cells)), num_levels(levels(b.p.policy.bucket_bits)) {}
  __device__ __forceinline__ int stride() const { return 2 * num_levels + kSlotCells; }
  __device__ __forceinline__ int* group(int at) const { return cells + at * stride(); }
  __device__ __forceinline__ int* own(int at) const { return group(at) + num_levels; }
  __device__ __forceinline__ int* slots(int at) const { return own(at) + num_levels; }
};

// For the next cut_some, which cuts up to `bounds`. A barrier has to follow.
__device__ __forceinline__ void clear_cells(const FusedBlock& b, int bounds, int thread) {
  int* const cells = b.at<int>(b.args.tables.cells);
  const int words = min(bounds, kCutsAtOnce) * CutCells::words(b.p.policy.bucket_bits);
#pragma unroll 1
  for (int i = thread; i < words; i += kFusedThreads) cells[i] = 0;
}

struct Crossing {
  int at, above;
};

// One warp: the greatest of `count` cells (four of a warp at a time) with more than `limit` units on it and above it, -1 if
// there is none; and the units above it.
__device__ __forceinline__ Crossing warp_find_crossing(const int* cells, int count, int limit) {
  const int lane = threadIdx.x % kWarp;
  int above = 0;
#pragma unroll 1
  for (int base = count - 4 * kWarp; base >= 0; base -= 4 * kWarp) {
    const int4 units = reinterpret_cast<const int4*>(cells + base)[lane];
    const int here = units.x + units.y + units.z + units.w, sum = __reduce_add_sync(kFullMask, here);
    if (above + sum > limit) {
      int upto = above + sum - warp_inclusive_sum(here) + units.w, at = base + 4 * lane + 3;
      const int lowest = upto - units.w + here;
      const int source = kWarp - 1 - __clz(__ballot_sync(kFullMask, lowest > limit));
      int over = units.w;
      if (upto <= limit) upto += over = units.z, --at;
      if (upto <= limit) upto += over = units.y, --at;
      if (upto <= limit) upto += over = units.x, --at;
      return {__shfl_sync(kFullMask, at, source), __shfl_sync(kFullMask, upto - over, source)};
    }
    above += sum;
  }
  return {-1, above};
}

// One warp: the level that exceeded bound `n` cuts, its quota and what is kept.
__device__ __forceinline__ void find_level(const FusedBlock& b, int n, const CutCells& cells, int at) {
  const int headroom = raw_cut(b, n).cut.z, bound = raw_cut(b, n).cut.w;
  const int *const group = cells.group(at), *const own = cells.own(at);
  const Crossing found = warp_find_crossing(group, cells.num_levels, bound);
  const int here = group[found.at], own_here = own[found.at];
  int own_kept = 0;
  if (b.p.policy.reroute != Reroute::kNone) {
#pragma unroll 1
    for (int level = b.lane; level <= found.at; level += kWarp) own_kept += own[level];
    own_kept = __reduce_add_sync(kFullMask, own_kept);
  }
  __syncwarp();  // all lanes have read the bound
  mark_experts(b, n, mark_of(at, found.at));
  if (b.lane != 0) return;
  raw_cut(b, n).cut.x = found.at, raw_cut(b, n).cut.y = own_quota(bound - found.above, here, own_here);
  raw_cut(b, n).kept = {static_cast<unsigned>(bound - headroom - found.above), static_cast<unsigned>(own_kept)};
}

// Log of how many own slots share a cell.
__device__ __forceinline__ int slots_of_cell(const FusedBlock& b) {
  return max(5, kWarp - __clz(b.slots() - 1) - kSlotCellBits);
}

// One warp: the edge of bound `n`, whose level and quota are known. Equals are kept in order of their slots.
__device__ __forceinline__ int find_edge(const FusedBlock& b, int n, const CutCells& cells, int at) {
  const int level = raw_cut(b, n).cut.x, quota = raw_cut(b, n).cut.y, log = slots_of_cell(b);
  const Crossing found = warp_find_crossing(cells.slots(at), kSlotCells, quota);
  const int begin = (kSlotCells - 1 - found.at) << log, end = found.at < 0 ? begin : begin + (1 << log);
  int before = found.above;
#pragma unroll 1
  for (int first = begin; first < end; first += kWarp) {
    const int slot = first + b.lane;
    const Entry entry = slot < b.slots() ? b.own_entry(slot) : Entry::nobody();
    const ExpertCut cut = {entry.in(b.expert_cut())};
    const bool equal = cut.about() == mark_of(at, level) && level_of_entry(b, entry, cut) == level;
    const int upto = before + warp_inclusive_sum(equal ? entry.units(b.p.policy.load) : 0);
    const unsigned over = __ballot_sync(kFullMask, upto > quota);
    if (over != 0) return standing(level, first + __ffs(over) - 1) + 1;
    before = __shfl_sync(kFullMask, upto, kWarp - 1);
  }
  return standing(level, kLastSlot);  // all of the level stay
}

__device__ __forceinline__ void set_edge(const FusedBlock& b, int n, int edge) { b.at<int>(b.args.tables.edge)[n] = edge; }

// One warp: a cut to the rank's other blocks.
__device__ __forceinline__ void send_cut(const FusedBlock& b, int n, int edge) {
  const RawCut& raw = raw_cut(b, n);
  if (b.lane >= kCutWords) return;
  uint32_t word = edge;
  if (b.lane == 1) word = static_cast<uint32_t>(raw.cut.x) | static_cast<uint32_t>(raw.cut.y) << kLevelBits;
  if (b.lane == 2) word = static_cast<uint32_t>(raw.kept.group);
  if (b.lane == 3) word = static_cast<uint32_t>(raw.kept.own);
  b.peers.send(b.rank, b.p.layout.cuts + 8LL * (n * kCutWords + b.lane), make_ll_word(word, b.wait.epoch));
}

// An own assignment of a bound that this block cuts while others cut others: few are.
__device__ __forceinline__ void list(const FusedBlock& b, int own_slot) {
  const int at = atomicAdd(&b.scalars().listed, 1);
  if (at < kMostListed) b.listed()[at] = own_slot;
}

// The bounds from `first` on, `now` of them, in one pass over all assignments and one over the own ones that it lists. Cells,
// marks and the list are empty before.
__device__ __forceinline__ void cut_some(const FusedBlock& b, int first, int now, const CutShare& share) {
  const CutCells cells(b);
  const int n = first + b.warp;
  const bool cuts = b.warp < now && is_exceeded(raw_cut(b, n));
  if (cuts) mark_experts(b, n, mark_of(b.warp));
  if (__syncthreads_or(cuts) == 0) return;
  for_each_assignment<false>(b, false, [&](const Entry& entry, int own_slot) {
    const ExpertCut cut = {entry.in(b.expert_cut())};
    const int at = marked_at(cut), level = level_of_entry(b, entry, cut), units = entry.units(b.p.policy.load);
    if (at < 0) return;
    atomicAdd(cells.group(at) + level, units);
    if (own_slot < 0) return;
    atomicAdd(cells.own(at) + level, units);
    if (share.several) list(b, own_slot);
  });
  __syncthreads();
  if (cuts) find_level(b, n, cells, b.warp);
  __syncthreads();
  b.stamp(21);
  const int log = slots_of_cell(b);
  for_each_assignment<true>(b, share.several && b.scalars().listed <= kMostListed, [&](const Entry& entry, int own_slot) {
    const ExpertCut cut = {entry.in(b.expert_cut())};
    const int at = marked_at(cut), level = level_of_entry(b, entry, cut);
    if (own_slot < 0 || at < 0 || cut.about() != mark_of(at, level)) return;
    atomicAdd(cells.slots(at) + (kSlotCells - 1 - (own_slot >> log)), entry.units(b.p.policy.load));
  });
  __syncthreads();
  if (!cuts) return;
  const int edge = find_edge(b, n, cells, b.warp);
  if (share.several) return send_cut(b, n, edge);
  if (b.lane == 0) set_edge(b, n, edge), raw_cut(b, n).cut.z = 0;
}

// The cuts that this block does not make itself, and those that it does. False: one did not arrive.
__device__ __forceinline__ bool receive_cuts(const FusedBlock& b) {
  bool ok = true;
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) {
    RawCut& raw = raw_cut(b, n);
    if (!is_exceeded(raw)) continue;
    const uint64_t* const address = b.own<uint64_t>(b.p.layout.cuts) + n * kCutWords;
    static_assert(kCutWords == kClaim);
    uint64_t words[kCutWords];
#pragma unroll
    for (int i = 0; i < kCutWords; ++i) words[i] = load_relaxed_sys(address + i);
    ok = ok && await_words(b, address, 1, words, Fault::kCuts, b.rank);
    const uint32_t cut = value_of(words[1]);
    set_edge(b, n, static_cast<int>(value_of(words[0])));
    raw.cut = make_int4(static_cast<int>(cut & (1u << kLevelBits) - 1), static_cast<int>(cut >> kLevelBits), 0, raw.cut.w);
    raw.kept = {value_of(words[2]), value_of(words[3])};
  }
  return ok;
}

// What the next pass asks of each expert: about(expert). A barrier of the block is in it.
template <class About>
__device__ __forceinline__ void set_expert_cuts(const FusedBlock& b, About about) {
#pragma unroll 1
  for (int j = threadIdx.x; j < b.p.shape.num_experts; j += kFusedThreads) set_about(b, j, about(j));
  __syncthreads();
}

// The cuts of all exceeded bounds. False: a block of this rank did not send its own.
__device__ inline bool cut_bounds(const FusedBlock& b) {
  const CutShare share(b);
#pragma unroll 1
  for (int first = share.first; first < share.end; first += kCutsAtOnce) {
    if (first > share.first) {
      __syncthreads();
      if (threadIdx.x == 0) b.scalars().listed = 0;
      clear_cells(b, share.end - first, threadIdx.x);
      set_expert_cuts(b, [](int) { return 0u; });
    }
    cut_some(b, first, min(share.end - first, kCutsAtOnce), share);
  }
  b.stamp(22);
  __syncthreads();  // nobody looks for exceeded bounds any more
  if (__syncthreads_and(!share.several || receive_cuts(b)) == 0) return false;
  const int* const edge = b.at<int>(b.args.tables.edge);
  set_expert_cuts(b, [&](int j) { return static_cast<uint32_t>(edge[b.bound_of()[j]]); });
  return true;
}

}  // namespace macs::cuda
