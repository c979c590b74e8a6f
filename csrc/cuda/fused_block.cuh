// What a block of the fused dispatch knows: its rank, its tokens, its tables in shared memory, and how it waits.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "divisor.cuh"
#include "fused_entry.cuh"
#include "fused_rank.cuh"
#include "fused_row.cuh"
#include "launch.cuh"
#include "macs/fused.h"
#include "macs/peer_view.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {

constexpr int kFusedThreads = 512;
constexpr int kFusedWarps = kFusedThreads / kWarp;
constexpr int kRowGroups = kFusedWarps / kRowWarps;
constexpr int kCutsAtOnce = 8;            // bounds that a block cuts in one pass over the group
constexpr int kSlotCellBits = 7, kSlotCells = 1 << kSlotCellBits;  // by which it counts a bound's slots
constexpr int kStepsPerEpoch = 64;        // of the rank's own barrier: one per proposal round

// What becomes of an own assignment, in `current`: an expert, or one of these.
constexpr int kUnplaced = -1, kEmptySlot = -2;

constexpr int kLimbs = 8;  // of a segment's sums (fused_weight.cuh)
constexpr int kClaim = 4;  // LL words of a lane that it waits for together
constexpr int kMostListed = kFusedThreads;  // own assignments: one a thread

// How many lanes take the scales of a row that came in one piece.
MACS_HOST_DEVICE int scale_chunks(const FusedShape& s) {
  return static_cast<int>((scale_words(s) + kClaim - 1) / kClaim);
}

// Offsets into a block's shared memory, in bytes.
struct FusedTables {
  int rank;         // FusedRank
  int group_rows;   // [named] u32: rows of all sources, and << 16 those before this block's: lower sources', own blocks'
  int group_units;  // [named] i32, once weights are sent
  int expert_cut;   // [named] u32: what a pass over assignments asks of their expert (fused_cut.cuh)
  int own_rows;     // [E] u32, behind a cut: rows of this rank that stay, and << 16 those before this block's tokens
  int bound_of;     // [E]
  int modality;     // [E]
  int starts;       // [E] first row of each expert in its rank's buffer
  int raw;          // [NB] RawCut
  int edge;         // [NB] where own assignments stop to stay (fused_cut.cuh)
  int headroom;     // [NB]
  int proposed;     // [NB] units, by the whole rank
  int accepted;     // [NB] units, in a round
  int running;      // [warps, NB + 1] units proposed to a bound by the warps before, then by this warp so far
  int struck;       // [warps, kStruckWords], to re-route
  int listed;       // [kMostListed] own slots of the bounds that this block cuts
  int cells;        // CutCells; or limbs [segments, kLimbs, 2] i32, which are not needed where cells are
  int counts;       // [3, E, 2]
  int current;      // [max_tokens * K] i16
  int entries;      // u32 assignments: [R, max_tokens * K] where `keeps_group`, else this rank's
  int entropies;    // [max_tokens] f32
  int ids;          // [block tokens * K] as given
  int gates;        // [block tokens * K]
  int weight;       // [max_tokens] f32
  int parts;        // [2, kRowGroups, kRowWarps] Part
  int tokens;       // [R]
  int scalars;      // FusedScalars
  int staged;       // rows
};

struct FusedScalars {
  int sums[kNumSums];
  int claims[2];                     // of LL words to be received, by exchange
  int listed;                        // own slots, more than there is room for included
  bool faulty;                       // this rank has a fault of an earlier epoch on record
  int visual_weight;                 // of the rank's visual tokens, fixed-point
};

// What has been decided.
struct Decision {
  bool ok;       // else this rank sends nothing
  bool cut;      // a bound was exceeded
  bool weighed;  // by weights that are known, with the group's sums
};

struct FusedArgs {
  FusedDispatchParams p;
  ClipThresholdParams threshold;  // options only
  FusedTables tables;
  int bounds;       // NB
  int per_rank;     // experts
  Divisor by_per_rank, by_ranks, by_top_k, by_blocks, by_scale_chunks;
  int row_stride;   // bytes between staged rows
  int staged_rows;  // how many fit at once
  bool keeps_group;  // shared memory holds everybody's assignments
  bool keeps_limbs;  // `cells` has room for the limbs of all segments
};

__device__ __forceinline__ bool has_step(uint32_t seen, uint32_t expected) {
  return seen / kStepsPerEpoch == expected / kStepsPerEpoch && seen >= expected;
}

struct FusedBlock {
  const FusedArgs& args;
  const FusedDispatchParams& p;
  const FusedRank& me;  // in shared memory; what is asked for all the time, in registers
  const int rank;
  char* const home;  // this rank's region
  const PeerView peers;
  unsigned char* const shared;
  const int block, num_blocks, lane, warp;
  const int first, end;  // this block's tokens
  WaitContext wait;

  __device__ __forceinline__ FusedBlock(const FusedArgs& a, const FusedRank& described, unsigned char* memory)
      : args(a), p(a.p), me(described), rank(me.rank), home(me.region[rank]), peers(me.region),
        shared(memory), block(blockIdx.x), num_blocks(gridDim.x), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp),
        first(args.by_blocks.divide(me.num_tokens * block)), end(args.by_blocks.divide(me.num_tokens * (block + 1))) {
    wait = {own<FusedStatus>(p.layout.status), p.timeout_ns, 0, p.same_device, p.layer};
  }

  template <class T>
  __device__ __forceinline__ T* own(int64_t offset) const { return reinterpret_cast<T*>(home + offset); }
  template <class T>
  __device__ __forceinline__ T* at(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  __device__ __forceinline__ FusedScalars& scalars() const { return *at<FusedScalars>(args.tables.scalars); }
  __device__ __forceinline__ int16_t* current() const { return at<int16_t>(args.tables.current); }
  __device__ __forceinline__ int* bound_of() const { return at<int>(args.tables.bound_of); }
  __device__ __forceinline__ int* modality() const { return at<int>(args.tables.modality); }
  __device__ __forceinline__ uint32_t* group_rows() const { return at<uint32_t>(args.tables.group_rows); }
  __device__ __forceinline__ int* group_units() const { return at<int>(args.tables.group_units); }
  __device__ __forceinline__ int* headroom() const { return at<int>(args.tables.headroom); }
  __device__ __forceinline__ uint32_t* expert_cut() const { return at<uint32_t>(args.tables.expert_cut); }
  __device__ __forceinline__ int* listed() const { return at<int>(args.tables.listed); }
  __device__ __forceinline__ int* running(int of_warp) const {
    return at<int>(args.tables.running) + of_warp * (args.bounds + 1);
  }
  __device__ __forceinline__ unsigned char* staged(int row) const {
    return shared + args.tables.staged + static_cast<int64_t>(row) * args.row_stride;
  }
  __device__ __forceinline__ int slots() const { return me.num_tokens * p.shape.top_k; }
  __device__ __forceinline__ int most_slots() const { return p.shape.max_tokens * p.shape.top_k; }
  // LL words of a source's assignments; shared memory keeps what they say.
  __device__ __forceinline__ const uint64_t* words_of(int64_t words, int source) const {
    return own<uint64_t>(words) + static_cast<int64_t>(source) * most_slots();
  }
  // Of what a source sends of its rows per expert in this epoch.
  __device__ __forceinline__ int64_t counts_of(int source) const {
    const int row = (wait.epoch & 1) * p.shape.num_ranks + source;
    return p.layout.counts + 8LL * row * p.shape.num_experts;
  }
  __device__ __forceinline__ uint32_t* entries_of(int source) const {
    return at<uint32_t>(args.tables.entries) + (args.keeps_group ? source * most_slots() : 0);
  }
  __device__ __forceinline__ Entry own_entry(int slot) const { return {entries_of(rank)[slot]}; }
  // Where assignments are sent that hold all that decides.
  __device__ __forceinline__ int64_t whole_words() const {
    return p.policy.needs_entropy ? p.layout.weighed : p.layout.entries;
  }

  // What comes out of an own slot.
  __device__ __forceinline__ void write_slot(int slot, int id, float weight) const {
    me.new_weights[slot] = weight;
    if (p.ids_are_i64) {
      static_cast<int64_t*>(me.new_ids)[slot] = id;
    } else {
      static_cast<int32_t*>(me.new_ids)[slot] = id;
    }
  }

  // What the clock says at a stage, for whoever looks for microseconds.
  __device__ __forceinline__ void stamp(int stage) const {
#ifdef MACS_STAMPS
    if (threadIdx.x == 0) own<uint64_t>(p.layout.stamps)[block * kStamps + stage] = clock_cycles();
#endif
  }

  // This block's signal to every peer. What its threads wrote before is visible to whoever sees it.
  __device__ __forceinline__ void signal_all(Flags kind) const {
    __syncthreads();
#pragma unroll 1
    for (int peer = threadIdx.x; peer < p.shape.num_ranks; peer += kFusedThreads) {
      peers.signal(peer, flag_offset(p.shape, p.layout, kind, rank, block), wait);
    }
  }
  __device__ __forceinline__ bool await_all(Flags kind, Fault fault) const {
    return await_flags(own<char>(0), p.shape, p.layout, kind, wait, fault);
  }
  // A barrier of the rank's own blocks. Most epochs have none, so that a flag may be of an epoch long ago: only one of this
  // very epoch counts (of its lower 26 bits, so that one in 2^26 old flags would, too).
  __device__ __forceinline__ bool barrier(int step, Fault fault) const {
    const uint32_t now = wait.epoch * kStepsPerEpoch + step;
    uint32_t* const flags = own<uint32_t>(p.layout.barrier);
    __syncthreads();
    if (threadIdx.x == 0) store_release_gpu(flags + block, now);
    bool ok = true;
    for (int i = threadIdx.x; i < num_blocks && ok; i += kFusedThreads) {
      ok = wait_until(flags + i, now, has_step, wait, fault, rank, i);
    }
    return __syncthreads_and(ok) != 0;
  }
};

}  // namespace macs::cuda
