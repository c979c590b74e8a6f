// Where the rows of clip_apply.cu go, with replicas: those of a replicated expert are numbered over the group, text before
// visual, then by source rank, token and slot; the number says to which place.
//
// load_histogram.cu counted the rows of every block before the exchange. A block adds up those before its own, counts by
// warp, and numbers a step of 32 assignments at a time (match_any).
#pragma once

#include "clip_walk.cuh"
#include "histogram.cuh"
#include "plan/accept.cuh"

namespace macs::cuda {

// Shared memory of a block, in ints, behind the tables of places.
struct Numbers {
  int* ints;
  int redundant, physical, ranks;

  static size_t bytes(const Places& p) {
    const size_t own = 3ull * p.redundant() + p.num_physical + 2ull * p.num_ranks + 2ull * kWarps * p.redundant();
    return sizeof(int) * (own + Places::size(p.num_physical));
  }
  __device__ __forceinline__ Numbers(int* memory, const Places& p)
      : ints(memory + Places::size(p.num_physical)), redundant(p.redundant()), physical(p.num_physical), ranks(p.num_ranks) {}
  __device__ __forceinline__ int* rows() const { return ints; }                    // [X] of the group
  __device__ __forceinline__ int* first() const { return ints + redundant; }       // [X, 2] number of this block's first row
  __device__ __forceinline__ int* running(int warp) const { return ints + (3 + 2 * warp) * redundant; }  // [X, 2]
  __device__ __forceinline__ int* own_running() const { return running(threadIdx.x / kWarp); }
  __device__ __forceinline__ int* quota() const { return running(kWarps); }        // [P]
  __device__ __forceinline__ int* limit() const { return quota() + physical; }     // [R] kNotExceeded, or not
  __device__ __forceinline__ int* lowest() const { return limit() + ranks; }       // [R] first level that it counts
};

// Before a barrier of the block.
__device__ __forceinline__ void clear_numbers(const Numbers& numbers) {
  for (int* i = numbers.rows() + threadIdx.x; i < numbers.quota(); i += kThreads) *i = 0;
}

// This warp's rows, into zeros. Needs nothing of the kernels before.
template <class Walk>
__device__ __forceinline__ void count_own_rows(const Walk& walk, const Numbers& numbers) {
  const auto count = [&](const Slot& slot) {
    const int row = slot.expert >= 0 ? walk.places.row()[slot.expert] : -1;
    if (row >= 0) atomicAdd(numbers.own_running() + replica_key(row, slot.text()), 1);
  };
  count(walk.first.slot);
  for (int64_t at = walk.begin + walk.step.tokens; at < walk.end; at += walk.step.tokens) {
    count(walk.template load<false>(at, false).slot);
  }
}

// Behind the exchange, into zeros: text of all sources before the visual rows of any. A source a warp, then a block a warp.
// Behind it a barrier of the block. Returns whether any rank is exceeded.
__device__ __forceinline__ bool number_block(const ThresholdApplyArgs& args, const Places& places, const Numbers& numbers) {
  const ReplicaScratch& scratch = args.replicas;
  const int32_t* const sources = args.threshold.group + histogram_size(args.apply.in.policy) + places.num_ranks;
  const int keys = 2 * places.redundant(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int row = lane; row < places.num_replicated(); row += kWarp) {
    int all = 0, first_text = 0, first_visual = 0;
#pragma unroll 2
    for (int s = warp; s < places.num_ranks; s += kWarps) {
      const int32_t* const source = sources + s * keys + 2 * row;
      const int text = __ldcg(source), visual = __ldcg(source + 1);
      const bool before = s < places.own_rank();
      all += text + visual;
      first_text += before ? text : 0, first_visual += text + (before ? visual : 0);
    }
    if (all == 0) continue;
    atomicAdd(numbers.rows() + row, all);
    atomicAdd(numbers.first() + replica_key(row, true), first_text);
    atomicAdd(numbers.first() + replica_key(row, false), first_visual);
  }
#pragma unroll 1
  for (int key = lane; key < keys; key += kWarp) {
    int before = 0;
#pragma unroll 4
    for (int block = warp; block < static_cast<int>(blockIdx.x); block += kWarps) {
      before += __ldcg(scratch.block_counts + block * keys + key);
    }
    if (before != 0) atomicAdd(numbers.first() + key, before);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < places.num_physical; i += kThreads) numbers.quota()[i] = __ldcg(scratch.quota + i);
  bool exceeded = false;
#pragma unroll 1
  for (int r = threadIdx.x; r < places.num_ranks; r += kThreads) {
    const int4 limit = __ldcg(reinterpret_cast<const int4*>(scratch.limits) + r);
    numbers.limit()[r] = limit.x, numbers.lowest()[r] = limit.y;
    exceeded |= limit.x != kNotExceeded;
  }
  return __syncthreads_or(exceeded) != 0;
}

// One warp, in lane order: the number of this lane's row among those of its key.
__device__ __forceinline__ int number_in_order(bool counted, int key, int first, int* running) {
  const unsigned active = __ballot_sync(kFullMask, counted);
  int number = 0;
  if (counted) {
    const int lane = threadIdx.x % kWarp;
    const unsigned peers = __match_any_sync(active, key);
    const int so_far = running[key];
    number = first + so_far + __popc(peers & ((1u << lane) - 1u));
    __syncwarp(active);
    if (lane == kWarp - 1 - __clz(peers)) running[key] = so_far + __popc(peers);
  }
  __syncwarp();
  return number;
}

// The place of every assignment of this warp, into its state. Returns whether any rank is exceeded: then the blocks count by
// level what they send there, and a barrier of the grid has to follow. `shift` of the storage is filled.
template <class Walk>
__device__ __forceinline__ bool choose_places(const ThresholdApplyArgs& args, Walk& walk, const Numbers& numbers) {
  const Policy& policy = walk.p.in.policy;
  const Places& places = walk.places;
  const int keys = 2 * places.redundant(), buckets = num_buckets(policy.bucket_bits);
#pragma unroll 1
  for (int j = threadIdx.x; j < walk.storage.experts; j += kThreads) walk.storage.shift()[j] = args.threshold.shift[j];
  const bool exceeded = number_block(args, places, numbers);
  scan_warps(numbers.running(0), keys, keys, [](int, int) {});
  __syncthreads();
  walk.for_each(false, [&](State& state, int64_t) {
    const Slot& slot = state.slot;
    const int expert = slot.expert, row = expert >= 0 ? places.row()[expert] : -1;
    const int key = row >= 0 ? replica_key(row, slot.text()) : 0;
    const int number = number_in_order(row >= 0, key, row >= 0 ? numbers.first()[key] : 0, numbers.own_running());
    if (!slot.inside) return;
    if (expert < 0) return walk.put(state, -1);
    int place = places.first()[expert];
    if (row >= 0) place += place_of(number, numbers.rows()[row], numbers.quota() + place, places.num_places(expert));
    walk.put(state, places.physical()[place]);
    const int rank = places.rank()[place];
    if (numbers.limit()[rank] == kNotExceeded) return;
    const int level = level_of(bucket_of_slot(walk.p.in, slot), walk.storage.shift()[expert], slot.text(), policy);
    const int lowest = numbers.lowest()[rank];
    const bool text_stays = policy.protect_text && lowest == 0;
    if (level < lowest || (text_stays && level >= buckets)) return;
    atomicAdd(args.replicas.levels + rank * 2 * buckets + level, 1);
  });
  return exceeded;
}

}  // namespace macs::cuda
