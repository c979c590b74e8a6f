// Assignments as lanes hold them, and their order.
//
// How a warp walks over assignments: a *step* is as many whole tokens as fit into its lanes (32 / K tokens of K slots),
// so that a token never straddles two steps and the lanes of a step are in (token, slot) order.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "divisor.cuh"
#include "launch.cuh"
#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

struct Slot {
  int64_t token;
  int expert;  // -1: empty, or a lane without a slot
  int segment;
  float gate, weight;
  bool inside;  // the lane has a slot of a token in range

  __device__ __forceinline__ bool text() const { return segment < 0; }
};

// The weight of a token where no entropy is asked for.
__device__ __forceinline__ float plain_weight(int segment) { return segment < 0 ? 1.0f : 0.5f; }

struct Step {
  int tokens;       // per step
  int token_lane;   // which token of the step this lane belongs to
  int slot;         // which slot of the token
  bool used;        // lanes behind the last whole token idle

  __device__ __forceinline__ explicit Step(int top_k) : Step(top_k, threadIdx.x % kWarp / top_k, kWarp / top_k) {}
  // `by_top_k` divides by top_k.
  __device__ __forceinline__ Step(int top_k, Divisor by_top_k)
      : Step(top_k, by_top_k.divide(threadIdx.x % kWarp), by_top_k.divide(kWarp)) {}
  __device__ __forceinline__ int first_lane(int top_k) const { return token_lane * top_k; }
  __device__ __forceinline__ unsigned token_mask(int top_k) const {
    return top_k == kWarp ? kFullMask : ((1u << top_k) - 1u) << first_lane(top_k);
  }

 private:
  __device__ __forceinline__ Step(int top_k, int of_lane, int whole)
      : tokens(whole), token_lane(of_lane), slot(threadIdx.x % kWarp - of_lane * top_k), used(of_lane < whole) {}
};

// The warps of a grid own T / W tokens each, in order, the first T mod W of them one more. Kernels that number assignments
// together have the same grid.
constexpr int kShareThreads = 512;  // of a block

struct TokenShares {
  int64_t each;
  int longer;

  static TokenShares of(int64_t num_tokens, int num_blocks) {
    const int64_t warps = static_cast<int64_t>(num_blocks) * (kShareThreads / kWarp);
    return {num_tokens / warps, static_cast<int>(num_tokens % warps)};
  }
  __device__ __forceinline__ int64_t begin(int warp) const { return each * warp + min(warp, longer); }
  __device__ __forceinline__ int64_t end(int warp) const { return begin(warp) + each + (warp < longer ? 1 : 0); }
};

// One token per warp, until every SM has a block; a block per rank has its levels to add up.
inline int share_blocks(const Assignments& in) {
  constexpr int kWarps = kShareThreads / kWarp;
  const int64_t blocks = (in.num_tokens + kWarps - 1) / kWarps, ranks = in.policy.num_ranks;
  const int64_t wanted = blocks > ranks ? blocks : ranks;
  return static_cast<int>(wanted < num_sms() ? wanted : num_sms());
}

__device__ __forceinline__ int load_id(const Assignments& in, int64_t index) {
  return in.ids_are_i64 ? static_cast<int>(__ldg(static_cast<const int64_t*>(in.topk_ids) + index))
                        : __ldg(static_cast<const int32_t*>(in.topk_ids) + index);
}

template <class Id, bool kWithWeight>
__device__ __forceinline__ Slot load_slot(const Assignments& in, const Step& step, int64_t first, int64_t end) {
  Slot slot;
  slot.token = first + step.token_lane;
  slot.inside = step.used && slot.token < end;
  slot.expert = -1;
  slot.segment = -1;
  slot.gate = slot.weight = 0.0f;
  if (slot.inside) {
    const int64_t index = slot.token * in.top_k + step.slot;
    slot.expert = static_cast<int>(__ldg(static_cast<const Id*>(in.topk_ids) + index));
    slot.gate = __ldg(in.topk_weights + index);
    slot.segment = __ldg(in.segment + slot.token);
    if constexpr (kWithWeight) slot.weight = in.weight[slot.token];
  }
  return slot;
}

__device__ __forceinline__ int bucket_of_slot(const Assignments& in, const Slot& slot) {
  const float product = __fmul_rn(slot.weight, slot.gate);  // rounded once, never contracted
  const bool both = in.policy.importance == Importance::kEntropyGate;
  return bucket_of(both ? product : importance_of(in.policy.importance, slot.weight, slot.gate), in.policy.bucket_bits);
}

}  // namespace macs::cuda
