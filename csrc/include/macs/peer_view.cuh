// What a block sees of its peers: their regions, and how bytes, signals and waits cross between them.
//
// A region is one allocation with the same layout on every rank (fused.h). A rank that this device can address directly
// (the same GPU, or one behind NVLink whose region CUDA IPC or NCCL's symmetric memory has mapped here) is a base
// address; the mapping chooses it, so that there is one a peer and no common stride. The network policy is a compile-time
// parameter: `DirectNetwork` is all that the kernels have been run with.
//
// Signals are round numbers, never counters: a rank that missed a round cannot leave a peer one short for ever, and the
// next round needs no cleaning up. Rounds are compared by their signed difference, so that they may wrap.
#pragma once
#include <cstdint>

#include "macs/fused.h"
#include "macs/ptx.cuh"

namespace macs::cuda {

// Loads and stores reach every peer.
struct DirectNetwork {
  __device__ __forceinline__ explicit DirectNetwork(const void*) {}
  static __device__ __forceinline__ constexpr bool is_direct(int) { return true; }
  template <class T>
  __device__ __forceinline__ void write(int, int64_t, T) const {}
  __device__ __forceinline__ void put(int, int64_t, const uint4*, int, int) const {}
  __device__ __forceinline__ void signal(int, int64_t, uint32_t) const {}
};

// Where waits look before they go on: how long they may, and who else has given up.
struct Patience {
  FusedStatus* status;  // of this rank
  uint64_t timeout_ns;
  uint32_t round;
};

// The first fault of a rank stands; later ones follow from it.
__device__ inline void report(const Patience& patience, Fault fault, int peer, int block, int64_t seen,
                              int64_t expected) {
  constexpr int kClaimed = -1;
  FusedStatus* const status = patience.status;
  if (atomicCAS(&status->fault, 0, kClaimed) != 0) return;
  status->peer = peer, status->block = block, status->round = patience.round;
  status->seen = seen, status->expected = expected;
  __threadfence_system();
  atomicExch(&status->fault, static_cast<int32_t>(fault));
}

__device__ __forceinline__ bool reached(uint32_t seen, uint32_t expected) {
  return static_cast<int32_t>(seen - expected) >= 0;
}

// One thread: until `flag` has reached `expected`. False: it did not in time, or another thread of this rank gave up.
__device__ inline bool wait_until(const uint32_t* flag, uint32_t expected, const Patience& patience, Fault fault,
                                  int peer, int block) {
  constexpr int kPollsBetweenLooks = 64;  // at the clock, which is far away
  uint64_t start = 0;
  for (int polls = 0;; ++polls) {
    const uint32_t seen = load_acquire_sys(flag);
    if (reached(seen, expected)) return true;
    if (polls % kPollsBetweenLooks != 0) continue;
    const uint64_t now = global_timer_ns();
    if (start == 0) start = now;
    if (now - start > patience.timeout_ns) {
      report(patience, fault, peer, block, seen, expected);
      return false;
    }
    if (load_relaxed_sys(reinterpret_cast<const uint32_t*>(&patience.status->fault)) != 0) return false;
  }
}

// A network policy answers `is_direct(peer)`, and for the others carries a value, a warp's vectors of 16 bytes, and a signal
// that everything its block has sent to that peer before is there.
template <class Network>
class PeerView {
 public:
  // network: what FusedDispatchParams::network points to, for the policy.
  __device__ __forceinline__ PeerView(char* const (&regions)[kMaxPeers], const void* network)
      : regions_(regions), network_(network) {}

  // Only where the peer is direct; this rank itself always is.
  template <class T>
  __device__ __forceinline__ T* at(int peer, int64_t offset) const {
    return reinterpret_cast<T*>(regions_[peer] + offset);
  }
  template <class T>
  __device__ __forceinline__ void write(int peer, int64_t offset, T value) const {
    if (network_.is_direct(peer)) {
      *at<T>(peer, offset) = value;
    } else {
      network_.write(peer, offset, value);
    }
  }
  // One warp: `vectors` of 16 bytes, from this block's shared memory.
  __device__ __forceinline__ void put(int peer, int64_t offset, const uint4* from, int vectors, int lane) const {
    if (!network_.is_direct(peer)) return network_.put(peer, offset, from, vectors, lane);
    uint4* const to = at<uint4>(peer, offset);
#pragma unroll 4
    for (int i = lane; i < vectors; i += 32) store_streaming(to + i, from[i]);
  }
  // One thread, behind a barrier of its block: what the block wrote before is seen by whoever sees the signal.
  __device__ __forceinline__ void signal(int peer, int64_t offset, uint32_t round) const {
    if (!network_.is_direct(peer)) return network_.signal(peer, offset, round);
    store_release_sys(at<uint32_t>(peer, offset), round);
  }

 private:
  char* const (&regions_)[kMaxPeers];
  Network network_;
};

}  // namespace macs::cuda
