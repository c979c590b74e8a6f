// Which expert a homeless assignment proposes, one warp per token.
//
// A lane holds the logits of experts lane, lane + 32, ... as integer keys that order like them. What a token already
// has is struck out by one OR over the warp per 32 experts; a pick is an integer maximum and a minimum over the warp.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.cuh"
#include "macs/params.h"

namespace macs::cuda {

// Logits ordered as integers, greater first; 0 = no candidate. Adding 0 makes -0 the equal of +0.
__device__ __forceinline__ unsigned key_of(float logit) {
  if (!isfinite(logit)) return 0;
  const unsigned bits = __float_as_uint(logit + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

// What this lane's experts have to do with room and rank; the same for every token of a round.
template <int kKeys>
struct Lanes {
  int room[kKeys];  // of the expert's bound; -1 where there is no expert
  int rank[kKeys];

  __device__ __forceinline__ Lanes(int experts, const int* room_of_bound, const int* bound_of, const int* rank_of) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int j = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
      room[i] = j < experts ? room_of_bound[bound_of[j]] : -1;
      rank[i] = j < experts ? rank_of[j] : -1;
    }
  }
};

template <int kKeys>
__device__ __forceinline__ void load_logits(const float* router_logits, int experts, int64_t token,
                                            float (&logits)[kKeys]) {
  const float* row = router_logits + token * experts;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int j = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    logits[i] = j < experts ? __ldg(row + j) : 0.0f;
  }
}

// Every homeless slot in turn takes the best candidate that is left. A lane of the token brings its slot's `original`
// and `current` expert and its rank where only that is allowed (`rank`, else -1); lanes of other tokens bring -1 for
// all. Returns this lane's choice, -1 for none.
template <int kKeys>
__device__ __forceinline__ int choose(const Lanes<kKeys>& lanes, const float (&logits)[kKeys], unsigned homeless,
                                      int original, int current, int rank, int units) {
  const int lane = threadIdx.x % kWarp;
  unsigned keys[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const unsigned before = original >= 0 && original / kWarp == i ? 1u << (original % kWarp) : 0;
    const unsigned now = current >= 0 && current / kWarp == i ? 1u << (current % kWarp) : 0;
    const unsigned had = __reduce_or_sync(kFullMask, before | now);
    keys[i] = lanes.room[i] >= units && (had >> lane & 1u) == 0 ? key_of(logits[i]) : 0;
  }
  int choice = -1;
  for (; homeless != 0; homeless &= homeless - 1) {
    const int taker = __ffs(homeless) - 1;
    const int only = __shfl_sync(kFullMask, rank, taker);
    unsigned best = 0;
    int index = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (keys[i] > best && (only < 0 || lanes.rank[i] == only)) best = keys[i], index = i;
    }
    const unsigned most = __reduce_max_sync(kFullMask, best);
    if (most == 0) continue;
    const unsigned expert = static_cast<unsigned>(index * kWarp + lane);
    const int winner = static_cast<int>(__reduce_min_sync(kFullMask, best == most ? expert : 0xffffffffu));
    if (lane == taker) choice = winner;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (i * kWarp + lane == winner) keys[i] = 0;
    }
  }
  return choice;
}

}  // namespace macs::cuda
