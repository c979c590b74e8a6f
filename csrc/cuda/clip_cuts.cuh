// The cuts that clip_apply.cu clips by, where it makes them itself: by all blocks together, or by each from what a choice of
// replicas has left over.
#pragma once

#include "clip_walk.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {

// One block, before any adds to them.
__device__ __forceinline__ void clear_counts(const ClipApplyParams& p) {
#pragma unroll 1
  for (int i = threadIdx.x; i < 6 * p.in.policy.num_experts; i += kThreads) p.counts[i] = 0;
}

// The cuts as they are found: to all blocks as LL words, or behind a barrier.
struct StoreCuts {
  const ClipThresholdParams& p;
  RawCut* raw;
  const CutBroadcast& broadcast;
  unsigned epoch;  // 0: by a barrier

  __device__ __forceinline__ void shift(int expert, int shift) const {
    if (threadIdx.x % kWarp != 0) return;
    if (epoch != 0) broadcast.publish_shift(expert, shift, epoch);
    p.shift[expert] = shift;
  }
  __device__ __forceinline__ void cut(int n, const Cut& cut, int bound) const {
    if (epoch != 0) return broadcast.publish_cut(n, RawCut::of(cut, bound), epoch);
    if (threadIdx.x % kWarp == 0) raw[n] = RawCut::of(cut, bound);
  }
};

// Cuts, by all blocks together, and what follows from them, by each. Returns whether any bound is cut. Behind it the words
// are cleared and the counts zero, by the last block, which has no cuts to make where there are others.
__device__ __forceinline__ bool make_cuts(const ThresholdApplyArgs& args, const SharedStorage& storage,
                                          const Scratch& scratch, Grid& grid, int* levels) {
  __shared__ RawCut raw[kMaxLlBounds];
  const CutBroadcast broadcast(args.state, storage.experts);
  const bool by_words = storage.num_bounds <= kMaxLlBounds;
  const unsigned epoch = by_words ? grid.launch() : 0;
  if (blockIdx.x == gridDim.x - 1) {
    clear_counts(args.apply);
    if (by_words) {
      scratch.clear_words(storage.num_bounds);
      broadcast.publish_ready(epoch);
    }
  }
  find_cuts(args.threshold, args.sizes.per_rank, levels, blockIdx.x, gridDim.x,
            StoreCuts{args.threshold, scratch.raw, broadcast, epoch});
  if (by_words) {
    broadcast.await_all(epoch, storage.num_bounds, storage.shift(), raw);
  } else {
    grid.barrier();
#pragma unroll 1
    for (int j = threadIdx.x; j < storage.experts; j += kThreads) storage.shift()[j] = args.threshold.shift[j];
  }
  return fill_bounds(args.threshold, storage, by_words ? raw : scratch.raw);
}

// This source's cuts from what all blocks send to the ranks that are exceeded, by each block. Returns whether any bound is cut.
__device__ __forceinline__ bool fill_replica_bounds(const ThresholdApplyArgs& args, const SharedStorage& storage) {
  const Policy& policy = args.threshold.policy;
  const int num_levels = 2 * num_buckets(policy.bucket_bits), lane = threadIdx.x % kWarp;
  Kept stake = {0, 0};
#pragma unroll 1
  for (int r = 0; r < storage.num_bounds; ++r) {
    stake.group += args.replicas.stakes[r].group, stake.own += args.replicas.stakes[r].own;
  }
  bool any = false;
#pragma unroll 1
  for (int r = threadIdx.x / kWarp; r < storage.num_bounds; r += kWarps) {
    const RankLimit limit = args.replicas.limits[r];
    int4 cut = make_int4(-1, 0, own_headroom(policy, limit.room, stake), limit.bound);
    if (limit.limit != kNotExceeded) {
      int32_t* const levels = args.replicas.levels + r * num_levels;
      const Cut own = warp_find_cut<2 * (kOctaves << kMaxBucketBits) / kWarp>({levels, levels}, num_levels, limit.limit);
      cut.x = own.level < 0 ? limit.first - 1 : own.level, cut.y = own.level < 0 ? 0 : own.quota;
    }
    any |= cut.x >= 0;
    if (lane != 0) continue;
    storage.level()[r] = cut.x, storage.quota()[r] = cut.y, storage.headroom()[r] = cut.z;
    if (blockIdx.x == 0) reinterpret_cast<int4*>(args.threshold.cut)[r] = cut;
  }
  return __syncthreads_or(any) != 0;
}

}  // namespace macs::cuda
