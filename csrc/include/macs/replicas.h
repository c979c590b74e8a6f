// Where the experts of a layer lie, and the parameters of what a plan does with their replicas (docs/design/method.md, 3b, 4b).
// No torch.
#pragma once
#include <cstdint>

#include "macs/level.h"

namespace macs {

constexpr int kShareOne = 256;       // a place's share of its expert's rows, in 256ths
constexpr int kBalanceSweeps = 8;
constexpr int kReplicaCounts = 4;    // kept, clipped, re-routed in, moved

// A layer's tables in one piece of memory, which sglang_macs/plan/places.py writes and refreshes in place:
//   own rank | number of replicated experts | number of steps
//   logical    [P]      of each physical expert
//   first      [E + 1]  of each expert, its first place; places go by (expert, rank)
//   rank       [P]      of each place
//   physical   [P]      of each place
//   row        [E]      of each replicated expert, which of them it is; -1
//   step_end   [X]      of each step, behind its last expert in
//   step_order [X]      the replicated experts, as they are poured
struct Places {
  const int32_t* table;
  int32_t num_experts, num_physical, num_ranks;  // 0 in all: no tables, every expert has one place, linearly

  MACS_HOST_DEVICE static constexpr int64_t size(int64_t num_physical) { return 4 + 5 * num_physical; }

  MACS_HOST_DEVICE bool any() const { return num_physical > 0; }
  MACS_HOST_DEVICE int32_t redundant() const { return num_physical - num_experts; }
  MACS_HOST_DEVICE int32_t own_rank() const { return table[0]; }
  MACS_HOST_DEVICE int32_t num_replicated() const { return table[1]; }
  MACS_HOST_DEVICE int32_t num_steps() const { return table[2]; }
  MACS_HOST_DEVICE const int32_t* logical() const { return table + 3; }
  MACS_HOST_DEVICE const int32_t* first() const { return logical() + num_physical; }
  MACS_HOST_DEVICE const int32_t* rank() const { return first() + num_experts + 1; }
  MACS_HOST_DEVICE const int32_t* physical() const { return rank() + num_physical; }
  MACS_HOST_DEVICE const int32_t* row() const { return physical() + num_physical; }
  MACS_HOST_DEVICE const int32_t* step_end() const { return row() + num_experts; }
  MACS_HOST_DEVICE const int32_t* step_order() const { return step_end() + redundant(); }

  MACS_HOST_DEVICE int32_t num_places(int32_t expert) const { return first()[expert + 1] - first()[expert]; }
  MACS_HOST_DEVICE int32_t rank_of(int32_t physical_id) const { return physical_id / (num_physical / num_ranks); }
};

// What lies behind the histogram in the exchange: routed [R], and (text, visual) rows [R, X, 2] of replicated experts.
MACS_HOST_DEVICE int64_t replica_exchange_size(const Places& p) {
  return p.any() ? p.num_ranks + 2LL * p.num_ranks * p.redundant() : 0;
}

// Of each rank, what replica_balance passes to replica_choose; kNotExceeded: its bound holds as it is.
struct RankLimit {
  int32_t limit, first, room, bound;  // rows that this source may keep, counted from level `first` on; room as in `cut`
};
constexpr int32_t kNotExceeded = -1;

struct ReplicaBalanceParams {
  const int32_t* own;      // [E * 2 * B + kNumSums + replica_exchange_size]
  const int32_t* group;    // the same, summed over the EP group
  const int8_t* modality;  // [E] in {-1, 0, +1}
  int32_t* shift;          // [E] out
  int32_t* quota;          // [P] out: rows of each place over the group; 0 behind the last place
  int32_t* load;           // [R] out: rows of each rank
  RankLimit* limits;       // [R] out
  Policy policy;
  Places places;
};

struct ReplicaChooseParams {
  Assignments in;           // ids: physical
  const int32_t* exchanged;  // [R + R * X * 2]: of the group, what lies behind its histogram
  const int32_t* shift;     // [E]
  const int32_t* quota;     // [P]
  const RankLimit* limits;  // [R]
  void* chosen;             // [T, K] out, dtype of topk_ids: physical
  int32_t* cut;             // [R, 4] out: level, quota, room, bound
  Places places;
};

// Where the row of number g goes, of n rows of an expert with quota [c] at its places: nested floors.
MACS_HOST_DEVICE int32_t place_of(int64_t g, int64_t n, const int32_t* quota, int32_t places) {
  for (int32_t i = 0; i < places - 1; ++i) {
    const int64_t before = g * quota[i] / n;
    if ((g + 1) * quota[i] / n > before) return i;
    g -= before, n -= quota[i];
  }
  return places - 1;
}

// How many of an expert's first g rows go to place i.
MACS_HOST_DEVICE int64_t rows_before(int64_t g, int64_t n, const int32_t* quota, int32_t places, int32_t place) {
  for (int32_t i = 0; i < places - 1; ++i) {
    const int64_t mine = n > 0 ? g * quota[i] / n : 0;
    if (i == place) return mine;
    g -= mine, n -= quota[i];
  }
  return g;
}

}  // namespace macs
