// Which expert an unplaced assignment proposes, one warp per token (docs/design/method.md 5).
//
// A lane holds the scores of experts lane, lane + 32, ... (logits, or those of selection_score); -infinity is no candidate. What a token already has is struck
// out through a word of shared memory per 32 experts; a pick is a maximum and a minimum of integers over the warp.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "../order.cuh"
#include "macs/params.h"

namespace macs::cuda {

__device__ __forceinline__ float candidate_of(float logit) { return isfinite(logit) ? logit : -INFINITY; }

// Of this lane's experts, the same for every token of a round; -1 where there is no expert.
template <int kKeys>
struct Headroom {
  int of[kKeys];

  __device__ __forceinline__ Headroom(int experts, const int* of_bound, const int* bound_of) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int j = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
      of[i] = j < experts ? of_bound[bound_of[j]] : -1;
    }
  }
};

// Router logits [T, E] as the model has them: converted where they are read.
struct Logits {
  const void* data;
  DType dtype;

  __device__ __forceinline__ float at(int64_t index) const {
    if (dtype == DType::kFloat32) return __ldg(static_cast<const float*>(data) + index);
    const unsigned short bits = __ldg(static_cast<const unsigned short*>(data) + index);
    return dtype == DType::kBFloat16 ? __uint_as_float(static_cast<unsigned>(bits) << 16)
                                     : __half2float(__ushort_as_half(bits));
  }
};

template <int kKeys>
__device__ __forceinline__ void load_logits(const Logits& router, int experts, int64_t token, float (&logits)[kKeys]) {
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int j = i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    logits[i] = j < experts ? router.at(token * experts + j) : 0.0f;
  }
}

// Words of shared memory that a warp needs to strike out, whatever the numbers of tokens and experts.
constexpr int kStruckWords = 32;

// Strikes the experts that the lanes bring, two each (-1: none), out of each token's candidates. `words`: of this warp.
template <int kTokens, int kKeys>
__device__ __forceinline__ void strike_out(float (&keys)[kTokens][kKeys], const int2 (&experts)[kTokens],
                                           unsigned* words) {
  static_assert(kTokens * kKeys <= kStruckWords);
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
  if (lane < kTokens * kKeys) words[lane] = 0;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const unsigned one = static_cast<unsigned>(experts[t].x), other = static_cast<unsigned>(experts[t].y);
    if (experts[t].x >= 0) atomicOr(words + t * kKeys + one / kWarp, 1u << one % kWarp);
    if (experts[t].y >= 0) atomicOr(words + t * kKeys + other / kWarp, 1u << other % kWarp);
  }
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if ((words[t * kKeys + i] >> lane & 1u) != 0) keys[t][i] = -INFINITY;
    }
  }
}

// The best candidate of every token, struck out for the next time; -1: none. `from`: the first expert of the only rank
// allowed (of `per_rank` experts), or -1. The tokens go together: one alone would wait for its own last instruction.
template <int kTokens, int kKeys>
__device__ __forceinline__ void pick(float (&keys)[kTokens][kKeys], const int (&from)[kTokens], int per_rank,
                                     int (&winner)[kTokens]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float allowed[kKeys], best = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) allowed[i] = keys[t][i];
    if (from[t] >= 0) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (static_cast<unsigned>(i * kWarp + lane - from[t]) >= static_cast<unsigned>(per_rank)) allowed[i] = -INFINITY;
      }
    }
    int expert = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (allowed[i] > best) best = allowed[i], expert = i * kWarp + lane;
    }
    // Adding 0 makes -0 the equal of +0.
    const int order = order_of(best + 0.0f), most = __reduce_max_sync(kFullMask, order);
    const unsigned first = __reduce_min_sync(kFullMask, order == most ? static_cast<unsigned>(expert) : 0xffffffffu);
    winner[t] = most != order_of(-INFINITY) ? static_cast<int>(first) : -1;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (i * kWarp + lane == winner[t]) keys[t][i] = -INFINITY;
    }
  }
}

// A token whose unplaced slots choose. Lanes that hold its slots bring each slot's `original` and `current` expert and
// `from` (see pick); other lanes bring -1 for all.
template <int kKeys>
struct UnplacedToken {
  unsigned unplaced;  // lanes
  int original, current, from, units;
  float logits[kKeys];
};

// Every unplaced slot in turn takes the best candidate that is left. `words`: see strike_out. Returns this lane's choice,
// -1 for none.
template <int kTokens, int kKeys>
__device__ __forceinline__ int choose(const Headroom<kKeys>& headroom, const UnplacedToken<kKeys> (&tokens)[kTokens],
                                      int per_rank, unsigned* words) {
  const int lane = threadIdx.x % kWarp;
  float keys[kTokens][kKeys];
  unsigned unplaced[kTokens], all = 0;
  int2 has[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    all |= unplaced[t] = tokens[t].unplaced;
    has[t] = make_int2(tokens[t].original, tokens[t].current != tokens[t].original ? tokens[t].current : -1);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      keys[t][i] = headroom.of[i] >= tokens[t].units ? candidate_of(tokens[t].logits[i]) : -INFINITY;
    }
  }
  strike_out<kTokens, kKeys>(keys, has, words);
  int choice = -1;
  while (all != 0) {
    int taker[kTokens], from[kTokens], winner[kTokens];
    all = 0;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      taker[t] = __ffs(unplaced[t]) - 1;  // -1: this token has done
      from[t] = __shfl_sync(kFullMask, tokens[t].from, max(taker[t], 0));
      all |= unplaced[t] &= unplaced[t] - 1;
    }
    pick<kTokens, kKeys>(keys, from, per_rank, winner);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) choice = lane == taker[t] ? winner[t] : choice;
  }
  return choice;
}

// The slot of greatest gate of a token, the lowest among equals; its slots are `top_k` lanes from `first_lane` on, a multiple
// of it.
struct Reference {
  int expert;
  float gate;
};

__device__ __forceinline__ Reference reference_of(int expert, float gate, int first_lane, int top_k) {
  Reference best = {expert, gate};
  if ((top_k & (top_k - 1)) == 0) {  // halves that exchange what they have
    int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int offset = 1; offset < top_k; offset *= 2) {
      const int other = __shfl_xor_sync(kFullMask, best.expert, offset), from = __shfl_xor_sync(kFullMask, lane, offset);
      const float other_gate = __shfl_xor_sync(kFullMask, best.gate, offset);
      const bool first = other_gate > best.gate || (other_gate == best.gate && from < lane);
      if (other >= 0 && (best.expert < 0 || first)) best = {other, other_gate}, lane = from;
    }
    return best;
  }
  best = {-1, 0.0f};
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    const int lane = min(first_lane + k, kWarp - 1);
    const int other = __shfl_sync(kFullMask, expert, lane);
    const float other_gate = __shfl_sync(kFullMask, gate, lane);
    if (other >= 0 && (best.expert < 0 || other_gate > best.gate)) best = {other, other_gate};
  }
  return best;
}

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The gate of a re-routed expert: its own router probability under the scaling that the token's top-k weights had.
// `to`, `from`: the new expert's logit and the reference's.
__device__ __forceinline__ float rerouted_weight(Scoring scoring, float gate, float to, float from) {
  if (gate == 0.0f) return gate;  // what the router has rounded to nothing
  if (scoring == Scoring::kSoftmax) return gate * expf(to - from);
  if (scoring == Scoring::kSigmoid) return gate * ((1.0f + expf(-from)) / (1.0f + expf(-to)));
  return gate * sqrtf(softplus(to) / softplus(from));
}

}  // namespace macs::cuda
