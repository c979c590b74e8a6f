// The tables that clip_apply keeps in shared memory, and the scratch through which its blocks agree.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "assignments.cuh"
#include "cut_broadcast.cuh"
#include "divisor.cuh"
#include "grid.cuh"
#include "launch.cuh"
#include "macs/params.h"
#include "macs/ptx.cuh"
#include "plan/accept.cuh"
#include "plan/choose.cuh"
#include "plan/headroom.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {

// Scratch in device memory, behind what was prepared.
struct Scratch {
  RawCut* raw;          // [NB]
  uint64_t* totals[2];  // [blocks, NB] LL words: units per bound and block; the epoch is the prefix's number from 1. Two, so that
                        // the next prefix may begin before all have read this one. Behind a barrier: as many plain ints.
  int* accepted;        // [blocks, NB] units accepted in a round

  static __host__ __device__ size_t bytes(int num_bounds, int num_blocks) {
    return num_bounds * (sizeof(RawCut) + (2 * sizeof(uint64_t) + sizeof(int)) * num_blocks);
  }
  __device__ __forceinline__ Scratch(void* memory, int num_bounds, int num_blocks) {
    raw = static_cast<RawCut*>(memory);
    totals[0] = reinterpret_cast<uint64_t*>(raw + num_bounds);
    totals[1] = totals[0] + num_bounds * num_blocks;
    accepted = reinterpret_cast<int*>(totals[1] + num_bounds * num_blocks);
  }
  // One block, everybody's words. Nobody may publish or wait for one before it knows.
  __device__ __forceinline__ void clear_words(int num_bounds) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * num_bounds * static_cast<int>(gridDim.x); i += blockDim.x) totals[0][i] = 0;
  }
};

// What the host works out: a division by what it does not know costs a block 25 instructions or, in 64 bits, 100.
struct ApplySizes {
  TokenShares shares;
  int per_rank;                          // experts
  int parts;                             // threads of a block that share a bound's entries
  Divisor by_rank, by_bounds, by_top_k;  // by experts per rank, bounds, slots per token

  static ApplySizes of(const ClipApplyParams& p, int num_blocks, int num_threads) {
    const int per_rank = p.in.policy.num_experts / p.in.policy.num_ranks, bounds = macs::num_bounds(p.in.policy);
    return {.shares = TokenShares::of(p.in.num_tokens, num_blocks),
            .per_rank = per_rank,
            .parts = num_threads / bounds,
            .by_rank = Divisor::of(per_rank),
            .by_bounds = Divisor::of(bounds),
            .by_top_k = Divisor::of(p.in.top_k)};
  }
};

// Shared memory of a block, in ints: per expert, per bound, per (warp, bound). Addresses are worked out where they are
// used (sizes are launch constants): a dozen pointers would not fit into the registers.
struct SharedStorage {
  int* ints;
  int experts, num_bounds;

  static __host__ __device__ size_t bytes(int num_experts, int num_bounds, int num_warps) {
    return sizeof(int) * (9 * num_experts + 6 * num_bounds + num_warps * (num_bounds + 1 + kStruckWords));
  }
  __device__ __forceinline__ SharedStorage(const ClipApplyParams& p, unsigned char* shared)
      : ints(reinterpret_cast<int*>(shared)), experts(p.in.policy.num_experts),
        num_bounds(macs::num_bounds(p.in.policy)) {}

  __device__ __forceinline__ int* shift() const { return ints; }                  // [E]
  __device__ __forceinline__ int* bound_of() const { return ints + experts; }     // [E]
  __device__ __forceinline__ int* rank_of() const { return ints + 2 * experts; }  // [E]
  __device__ __forceinline__ int* counts() const { return ints + 3 * experts; }   // [3, E, 2]
  __device__ __forceinline__ int* of_bounds(int i) const { return ints + 9 * experts + i * num_bounds; }
  __device__ __forceinline__ int* level() const { return of_bounds(0); }
  __device__ __forceinline__ int* quota() const { return of_bounds(1); }
  __device__ __forceinline__ int* headroom() const { return of_bounds(2); }
  __device__ __forceinline__ int* base() const { return of_bounds(3); }   // units of the blocks before this one
  __device__ __forceinline__ int* total() const { return of_bounds(4); }  // units of all blocks
  __device__ __forceinline__ int* accepted() const { return of_bounds(5); }  // units that this block accepted in a round
  // [warps, NB + 1] units of the warps before, then of this warp so far.
  __device__ __forceinline__ int* running(int warp) const { return of_bounds(6) + warp * (num_bounds + 1); }
  __device__ __forceinline__ int* own_running() const { return running(threadIdx.x / kWarp); }
  __device__ __forceinline__ int* moved(int num_warps) const {  // [E, 2], behind the rest, with replicas
    return ints + bytes(experts, num_bounds, num_warps) / sizeof(int);
  }
  __device__ __forceinline__ unsigned* own_struck() const {  // [kStruckWords]
    return reinterpret_cast<unsigned*>(running(blockDim.x / kWarp)) + threadIdx.x / kWarp * kStruckWords;
  }

  __device__ __forceinline__ void clear_own_running() const {
#pragma unroll 1
    for (int n = threadIdx.x % kWarp; n < num_bounds; n += kWarp) own_running()[n] = 0;
    __syncwarp();
  }
};

// What does not depend on the kernels before.
__device__ inline void clear_storage(const ClipApplyParams& p, const ApplySizes& sizes, const SharedStorage& storage) {
#pragma unroll 1
  for (int j = threadIdx.x; j < p.in.policy.num_experts; j += blockDim.x) {
    const int rank = sizes.by_rank.divide(j);
    storage.rank_of()[j] = rank;
    storage.bound_of()[j] = p.in.policy.scope == Scope::kExpert ? j : rank;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < 6 * p.in.policy.num_experts; i += blockDim.x) storage.counts()[i] = 0;
  storage.clear_own_running();
}

// Returns whether any bound is cut.
__device__ inline bool fill_bounds(const ClipApplyParams& p, const SharedStorage& storage) {
  bool any = false;
#pragma unroll 1
  for (int j = threadIdx.x; j < p.in.policy.num_experts; j += blockDim.x) storage.shift()[j] = p.shift[j];
#pragma unroll 1
  for (int n = threadIdx.x; n < storage.num_bounds; n += blockDim.x) {
    const int4 cut = __ldg(reinterpret_cast<const int4*>(p.cut) + n);
    storage.level()[n] = cut.x, storage.quota()[n] = cut.y, storage.headroom()[n] = cut.z;
    any |= cut.x >= 0;
  }
  return __syncthreads_or(any) != 0;
}

// The same from the raw cuts, the shifts being there: every block shares the headroom out for itself, a warp per pool, and the
// first one writes the result.
__device__ inline bool fill_bounds(const ClipThresholdParams& p, const SharedStorage& storage, const RawCut* raws) {
  bool any = false;
#pragma unroll 1
  for (int n = threadIdx.x; n < storage.num_bounds; n += blockDim.x) {
    const int4 cut = raws[n].cut;
    storage.level()[n] = cut.x, storage.quota()[n] = cut.y;
    any |= cut.x >= 0;
  }
  block_share_headroom(p.policy, raws, storage.num_bounds, storage.headroom());
  any = __syncthreads_or(any) != 0;
  if (blockIdx.x != 0) return any;
#pragma unroll 1
  for (int n = threadIdx.x; n < storage.num_bounds; n += blockDim.x) {
    int4 cut = raws[n].cut;
    cut.z = storage.headroom()[n];
    reinterpret_cast<int4*>(p.cut)[n] = cut;
  }
  return any;
}

// Per bound: the sum of all blocks' entries, and that of the blocks before this one. Both start from 0 in shared
// memory.
__device__ __forceinline__ void sum_blocks(const int* entries, int num_bounds, int* all, int* before) {
  const int blocks = gridDim.x, threads = blockDim.x, parts = max(1, threads / num_bounds);
  const int part = threadIdx.x / num_bounds;
  for (int n = parts > 1 ? threadIdx.x % num_bounds : threadIdx.x; n < num_bounds && (parts == 1 || part < parts);
       n += parts > 1 ? num_bounds : threads) {
    int sum = 0, lower = 0;
#pragma unroll 8
    for (int block = parts > 1 ? part : 0; block < blocks; block += parts) {
      const int units = __ldcg(entries + block * num_bounds + n);
      sum += units;
      lower += block < static_cast<int>(blockIdx.x) ? units : 0;
    }
    if (sum != 0) atomicAdd(all + n, sum);
    if (lower != 0) atomicAdd(before + n, lower);
  }
}

// The same of LL words, up to kMaxLlBounds of them a block: waits for each.
__device__ __forceinline__ void sum_words(const ApplySizes& sizes, const uint64_t* entries, unsigned epoch, int num_bounds,
                                          int* all, int* before) {
  constexpr int kAhead = 4;  // of a thread, on their way together
  const int blocks = gridDim.x, parts = sizes.parts, part = sizes.by_bounds.divide(threadIdx.x);
  const int n = threadIdx.x - part * num_bounds;
  if (part >= parts) return;
  int sum = 0, lower = 0;
#pragma unroll 1
  for (int first = part; first < blocks; first += kAhead * parts) {
    uint64_t words[kAhead];
    BlockWait wait;
    for (bool complete = false; !complete; wait.look_again()) {
      complete = true;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int block = first + i * parts;
        words[i] = block < blocks ? load_relaxed_gpu(entries + block * num_bounds + n) : make_ll_word(0, epoch);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) complete &= is_of(words[i], epoch);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int units = static_cast<int>(value_of(words[i]));
      sum += units;
      lower += first + i * parts < static_cast<int>(blockIdx.x) ? units : 0;
    }
  }
  if (sum != 0) atomicAdd(all + n, sum);
  if (lower != 0) atomicAdd(before + n, lower);
}

// Units per (warp, bound) -> prefixes: `running` over the warps of the block, `base` over the blocks of the grid, and
// the totals. `number`: of the prefix within this launch, from 0. kLlWords: where the words were cleared before a
// barrier, few bounds do without another one; nothing else that a block wrote is visible to the others then.
template <bool kLlWords>
__device__ inline void grid_prefix(const ApplySizes& sizes, const SharedStorage& storage, const Scratch& scratch,
                                   Grid& grid, int number) {
  const bool by_words = kLlWords && storage.num_bounds <= kMaxLlBounds;
  uint64_t* const totals = (number & 1) == 0 ? scratch.totals[0] : scratch.totals[1];
  int* const plain = reinterpret_cast<int*>(totals);
  __syncthreads();
  scan_warps(storage.running(0), storage.num_bounds + 1, storage.num_bounds, [&](int n, int units) {
    const int at = blockIdx.x * storage.num_bounds + n;
    if (by_words) {
      publish(totals + at, units, static_cast<unsigned>(number) + 1);
    } else {
      plain[at] = units;
    }
    storage.base()[n] = storage.total()[n] = storage.accepted()[n] = 0;
  });
  if (by_words) {
    __syncthreads();
    sum_words(sizes, totals, static_cast<unsigned>(number) + 1, storage.num_bounds, storage.total(), storage.base());
  } else {
    grid.barrier();
    sum_blocks(plain, storage.num_bounds, storage.total(), storage.base());
  }
  __syncthreads();
}

// What all blocks accepted in a round, in `total`. Behind a barrier of the block.
__device__ inline void grid_sum_accepted(const SharedStorage& storage, const Scratch& scratch, Grid& grid) {
#pragma unroll 1
  for (int n = threadIdx.x; n < storage.num_bounds; n += blockDim.x) {
    scratch.accepted[blockIdx.x * storage.num_bounds + n] = storage.accepted()[n];
    storage.total()[n] = storage.base()[n] = 0;
  }
  grid.barrier();
  sum_blocks(scratch.accepted, storage.num_bounds, storage.total(), storage.base());
  __syncthreads();
}

}  // namespace macs::cuda
