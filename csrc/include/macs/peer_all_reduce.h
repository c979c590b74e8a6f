// The sum of the ranks' histograms in one launch, among ranks that address each other's memory: parameters, and the layout
// of what they share. No torch.
#pragma once
#include <cstdint>

#include "macs/fused.h"

namespace macs {

// Fewer in a test, which emulates every thread of every rank.
#ifndef MACS_REDUCE_BLOCKS
#define MACS_REDUCE_BLOCKS 64
#endif
constexpr int kMostReduceBlocks = MACS_REDUCE_BLOCKS;

// With more, values go over their owners: by the line through what two and four ranks took, one way more is the cheaper.
constexpr int kMostRanksOfOneHop = 4;

// Byte offsets into a rank's region; every rank has the same. Zero-filled before the first launch. Peers write `inbox`.
struct PeerReduceLayout {
  int64_t status;  // FusedStatus
  int64_t epochs;  // [kMostReduceBlocks] u32: how often each block has added
  int64_t inbox;   // [2, R, size] LL words (ll_word.cuh): odd epochs lie behind even ones
  int64_t bytes;
};

inline PeerReduceLayout peer_reduce_layout(int64_t num_ranks, int64_t size) {
  constexpr int64_t kLine = 128;
  const PeerReduceLayout layout = {0, kLine, kLine + 4 * kMostReduceBlocks, 0};
  return {layout.status, layout.epochs, layout.inbox, layout.inbox + 8 * 2 * num_ranks * size};
}

struct PeerReduceParams {
  char* region[kMaxPeers];  // of every rank, as this device sees them
  PeerReduceLayout layout;
  const int32_t* values;    // [size] of this rank
  int32_t* sum;             // [size] out, may be `values`; not written where a peer's part never came
  int64_t size;             // the same in every launch over these regions, so that a value is always the same block's
  int32_t num_ranks, rank;
  int32_t hops;             // 1 or 2, the same on all ranks in every launch over these regions; 0: by the number of ranks
  uint64_t timeout_ns;
};

}  // namespace macs
