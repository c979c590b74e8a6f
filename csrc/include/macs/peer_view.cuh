// What a block sees of its peers: their regions, and how bytes, signals and waits cross between them.
//
// A region is one allocation with the same layout on every rank (fused.h). Every rank is one that this device addresses
// directly, the same GPU or one behind NVLink whose region CUDA IPC has mapped here: a base address, which the mapping
// chooses, so that there is one a peer and no common stride. Between nodes there is none (docs/guide/multinode.md).
//
// What is short travels as LL words (ll_word.cuh), whose epoch is the dispatch's. Rows are too long for that: they are signalled.
//
// Signals are epochs, the numbers of dispatches, never counters: a rank that missed one cannot leave a peer one short for ever, and the
// next epoch needs no cleaning up. Epochs are compared by their signed difference, so that they may wrap.
#pragma once
#include <cstdint>

#include "macs/fused.h"
#include "macs/ll_word.cuh"
#include "macs/ptx.cuh"

namespace macs::cuda {

// What every wait of a block needs: how long it may take, what it waits for, and where a fault goes.
struct WaitContext {
  FusedStatus* status;  // of this rank
  uint64_t timeout_ns;
  uint32_t epoch;
  bool same_device;
  int32_t layer = -1;  // for the record
};

constexpr int32_t kClaimed = -1;  // the fault of a record that is being written

// Not inlined: code that does not run is fetched all the same.
static __device__ __noinline__ void record(FusedStatus* status, uint32_t epoch, int layer, uint64_t timeout_ns,
                                           Fault fault, int peer, int block, int64_t seen, int64_t expected) {
  if (atomicCAS(&status->fault, 0, kClaimed) != 0) return;
  status->peer = peer, status->block = block, status->layer = layer, status->epoch = epoch;
  status->limit_ms = static_cast<uint32_t>(timeout_ns / 1000000);
  status->seen = seen, status->expected = expected;
  __threadfence_system();
  atomicExch(&status->fault, static_cast<int32_t>(fault));
}

// The first fault of a rank stands; later ones follow from it.
__device__ __forceinline__ void report(const WaitContext& wait, Fault fault, int peer, int block, int64_t seen,
                                       int64_t expected) {
  record(wait.status, wait.epoch, wait.layer, wait.timeout_ns, fault, peer, block, seen, expected);
}

// Whether this rank has one on record.
__device__ __forceinline__ bool has_fault(const WaitContext& wait) {
  return load_relaxed_sys(reinterpret_cast<const uint32_t*>(&wait.status->fault)) != 0;
}

// Whether it has one of an earlier epoch, behind which it sends nothing. One of this epoch keeps no block from sending what
// it knows, however late it begins: peers wait for it.
__device__ __forceinline__ bool gave_up_before(const WaitContext& wait) {
  if (!has_fault(wait)) return false;
  const int32_t fault = static_cast<int32_t>(load_acquire_sys(reinterpret_cast<const uint32_t*>(&wait.status->fault)));
  return fault != kClaimed && wait.status->epoch != wait.epoch;
}

__device__ __forceinline__ bool is_as_late(uint32_t seen, uint32_t expected) {
  return static_cast<int32_t>(seen - expected) >= 0;
}

// Looks of one wait, until its time is up.
class Poll {
 public:
  // After a look that saw too little. False: time is up, or another thread of this rank has given up.
  __device__ __forceinline__ bool go_on(const WaitContext& wait, Fault fault, int peer, int block, uint32_t seen,
                                        uint32_t expected) {
    // At the clock, which is far away, and at the rank's fault, one word that every warp of every block would ask for at once.
    constexpr int kPollsBetweenLooks = 64;
    if (++polls_ % kPollsBetweenLooks != 0) return true;
    const uint64_t now = global_timer_ns();
    if (start_ == 0) start_ = now;
    if (now - start_ > wait.timeout_ns) {
      report(wait, fault, peer, block, seen, expected);
      return false;
    }
    return !has_fault(wait);
  }

 private:
  int polls_ = 0;
  uint64_t start_ = 0;
};

// One thread: until reached(what `flag` holds, expected).
template <class Reached>
__device__ inline bool wait_until(const uint32_t* flag, uint32_t expected, Reached reached, const WaitContext& wait,
                                  Fault fault, int peer, int block) {
  for (Poll poll;;) {
    const uint32_t seen = wait.same_device ? load_acquire_gpu(flag) : load_acquire_sys(flag);
    if (reached(seen, expected)) return true;
    if (!poll.go_on(wait, fault, peer, block, seen, expected)) return false;
  }
}

enum class Flags : int { kRows = 0, kOutputs = 1 };

// Where `block` of `source` signals in a region.
__device__ __forceinline__ int64_t flag_offset(const FusedShape& s, const FusedLayout& layout, Flags kind, int source,
                                               int block) {
  const int64_t row = static_cast<int64_t>(kind) * s.num_ranks + source;
  return layout.flags + 4 * (row * s.num_blocks + block);
}

// A whole block: until every block of every rank but `skipped` has signalled in `region`, this rank's own. False at once
// behind a fault, for which the thread looks that has the fewest flags to wait for.
__device__ inline bool await_flags(const char* region, const FusedShape& s, const FusedLayout& layout, Flags kind,
                                   const WaitContext& wait, Fault fault, int skipped = -1) {
  const uint32_t* const flags = reinterpret_cast<const uint32_t*>(region + flag_offset(s, layout, kind, 0, 0));
  const int skip_from = skipped * s.num_blocks, skip_to = skip_from + s.num_blocks;
  bool ok = threadIdx.x != blockDim.x - 1 || !has_fault(wait);
#pragma unroll 1
  for (int i = threadIdx.x; i < s.num_ranks * s.num_blocks && ok; i += blockDim.x) {
    if (i >= skip_from && i < skip_to) continue;
    ok = wait_until(flags + i, wait.epoch, is_as_late, wait, fault, i / s.num_blocks, i % s.num_blocks);
  }
  return __syncthreads_and(ok) != 0;
}

// One thread: looks at `address` until `word`, what it saw there last, is of this epoch.
__device__ inline bool await_word(const uint64_t* address, uint64_t& word, const WaitContext& wait, Fault fault,
                                  int peer) {
  for (Poll poll; !is_of(word, wait.epoch); word = load_relaxed_sys(address)) {
    if (!poll.go_on(wait, fault, peer, -1, epoch_of(word), wait.epoch)) return false;
  }
  return true;
}

class PeerView {
 public:
  __device__ __forceinline__ explicit PeerView(char* const (&regions)[kMaxPeers]) : regions_(regions) {}

  template <class T>
  __device__ __forceinline__ T* at(int peer, int64_t offset) const {
    return reinterpret_cast<T*>(regions_[peer] + offset);
  }
  template <class T>
  __device__ __forceinline__ void write(int peer, int64_t offset, T value) const {
    *at<T>(peer, offset) = value;
  }
  // One warp: `vectors` of 16 bytes, from this block's shared memory.
  __device__ __forceinline__ void put(int peer, int64_t offset, const uint4* from, int vectors, int lane) const {
    uint4* const to = at<uint4>(peer, offset);
#pragma unroll 4
    for (int i = lane; i < vectors; i += 32) store_streaming(to + i, from[i]);
  }
  // An LL word, or another one that says by itself that it is here.
  template <class T>
  __device__ __forceinline__ void send(int peer, int64_t offset, T word) const {
    store_relaxed_sys(at<T>(peer, offset), word);
  }
  // One thread, behind a barrier of its block: what the block wrote before is seen by whoever sees the signal.
  __device__ __forceinline__ void signal(int peer, int64_t offset, const WaitContext& wait) const {
    uint32_t* const flag = at<uint32_t>(peer, offset);
    if (wait.same_device) {
      store_release_gpu(flag, wait.epoch);
    } else {
      store_release_sys(flag, wait.epoch);
    }
  }

 private:
  char* const (&regions_)[kMaxPeers];
};

}  // namespace macs::cuda
