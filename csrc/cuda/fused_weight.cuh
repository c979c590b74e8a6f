// The entropy weights of tokens, from the entropies of all of the rank's tokens (docs/design/method.md 2).
//
// The moments of a segment are those of segment_sums.cuh to the bit: integers, however they are added up. Here they are
// added in limbs that a warp sums with one instruction each, and adds in two halves: shared memory adds 32 bits at once, 64
// only in a loop.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "segment_sums.cuh"

namespace macs::cuda {

constexpr int kLimbBits = 26;  // 32 of them fit into 31 bits
constexpr int kHalfBits = 16;  // of such a sum; the other half keeps its sign

// Adds a warp's entropies to the limbs of their segment: n; q low and high; and, with |q| = a + b 2^26, a^2 in two, a b in
// two, b^2.
__device__ __forceinline__ void add_to_limbs(int* halves, bool counts, float entropy) {
  if (__ballot_sync(kFullMask, counts) == 0) return;
  constexpr uint64_t kLow = (1ull << kLimbBits) - 1;
  const long long q = counts ? quantized(entropy) : 0;
  const uint64_t size = static_cast<uint64_t>(q < 0 ? -q : q), a = size & kLow, b = size >> kLimbBits;
  const int values[kLimbs] = {
      counts ? 1 : 0,
      static_cast<int>(static_cast<uint64_t>(q) & kLow),
      static_cast<int>(q >> kLimbBits),
      static_cast<int>(a * a & kLow),
      static_cast<int>(a * a >> kLimbBits),
      static_cast<int>(a * b & kLow),
      static_cast<int>(a * b >> kLimbBits),
      static_cast<int>(b * b),
  };
  const int lane = threadIdx.x % kWarp;
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    const int sum = __reduce_add_sync(kFullMask, values[i]);
    if (lane / 2 == i) mine = lane % 2 == 0 ? sum & ((1 << kHalfBits) - 1) : sum >> kHalfBits;
  }
  if (lane < 2 * kLimbs) atomicAdd(halves + lane, mine);
}

__device__ __forceinline__ SegmentSums sums_of(const int* halves) {
  using Wide = unsigned __int128;
  unsigned long long limbs[kLimbs];
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    limbs[i] = static_cast<unsigned long long>(halves[2 * i] + static_cast<long long>(halves[2 * i + 1]) * (1 << kHalfBits));
  }
  const Wide square = static_cast<Wide>(limbs[3]) + (static_cast<Wide>(limbs[4]) << kLimbBits) +
                      (static_cast<Wide>(limbs[5]) << (kLimbBits + 1)) +
                      (static_cast<Wide>(limbs[6]) << (2 * kLimbBits + 1)) +
                      (static_cast<Wide>(limbs[7]) << (2 * kLimbBits));
  return {limbs[0], limbs[1] + (limbs[2] << kLimbBits), static_cast<unsigned long long>(square) & 0xffffffffull,
          static_cast<unsigned long long>(square >> 32)};
}

// The limbs of a segment, while `cells` holds nothing else yet.
__device__ __forceinline__ int* limbs_of(const FusedBlock& b, int segment) {
  return b.at<int>(b.args.tables.cells) + segment * 2 * kLimbs;
}

// The rank's entropies into shared memory; added up by segment as they come, where there is room for all segments.
__device__ inline bool receive_entropies(const FusedBlock& b) {
  const uint64_t* const words = b.own<uint64_t>(b.p.layout.entropy);
  float* const entropies = b.at<float>(b.args.tables.entropies);
  bool ok = true;
#pragma unroll 1
  for (int first = b.warp * kWarp; first < b.me.num_tokens; first += kFusedThreads) {
    const int token = first + b.lane;
    const bool inside = token < b.me.num_tokens;
    const int segment = inside ? min(__ldg(b.me.segment + token), b.p.num_segments - 1) : -1;
    uint64_t word = inside ? load_relaxed_sys(words + token) : make_ll_word(0, b.wait.epoch);
    ok = ok && await_word(words + token, word, b.wait, Fault::kEntropies, b.rank);
    const float entropy = __uint_as_float(value_of(word));
    if (inside) entropies[token] = entropy;
    if (!b.args.keeps_limbs) continue;
    for (unsigned left = __ballot_sync(kFullMask, segment >= 0 && ok); left != 0;) {
      const int one = __shfl_sync(kFullMask, segment, __ffs(left) - 1);
      add_to_limbs(limbs_of(b, one), segment == one && ok, entropy);
      left &= ~__ballot_sync(kFullMask, segment == one);
    }
  }
  return __syncthreads_and(ok) != 0;
}

// One warp: the sums of a segment, token by token.
__device__ __forceinline__ SegmentSums warp_segment_sums(const FusedBlock& b, int segment) {
  SegmentSums sums = {0, 0, 0, 0};
#pragma unroll 1
  for (int token = b.lane; token < b.me.num_tokens; token += kWarp) {
    if (__ldg(b.me.segment + token) == segment) sums.add(b.at<float>(b.args.tables.entropies)[token]);
  }
  sums.add_over<kWarp>();
  return sums;
}

// body(token, weight) for the rank's tokens, behind receive_entropies: a thread a token, or a warp where the sums of its segment
// are yet to be made.
template <class Body>
__device__ __forceinline__ void for_each_weight(const FusedBlock& b, Body body) {
  const int together = b.args.keeps_limbs ? 1 : kWarp;
#pragma unroll 1
  for (int token = threadIdx.x / together; token < b.me.num_tokens; token += kFusedThreads / together) {
    const int segment = __ldg(b.me.segment + token);
    float weight = 1.0f;
    if (segment >= 0) {
      const SegmentSums sums = b.args.keeps_limbs ? sums_of(limbs_of(b, min(segment, b.p.num_segments - 1)))
                                                  : warp_segment_sums(b, segment);
      weight = weight_of(b.at<float>(b.args.tables.entropies)[token], moments_of(sums), b.p.policy.delta);
    }
    if (together == 1 || b.lane == 0) body(token, weight);
  }
}

// The weights of all of the rank's tokens. False: a block of this rank never scored its own.
__device__ inline bool weigh_tokens(const FusedBlock& b) {
  if (!receive_entropies(b)) return false;
  float* const weights = b.at<float>(b.args.tables.weight);
  for_each_weight(b, [&](int token, float weight) { weights[token] = weight; });
  __syncthreads();
  return true;
}

// By one of the rank's blocks, where the weights decide nothing and are only reported: those of all of the rank's tokens,
// and the group's sums. Rows are on their way by then. Ranks may be an epoch apart here, so that the LL words alternate.
__device__ inline bool report_weights(const FusedBlock& b) {
  if (!receive_entropies(b)) return false;
  for_each_weight(b, [&](int token, float weight) {
    b.me.weight[token] = weight;
    bool counts = false;
#pragma unroll 1
    for (int slot = token * b.p.shape.top_k; slot < (token + 1) * b.p.shape.top_k; ++slot) {
      counts |= b.own_entry(slot).present() && !b.own_entry(slot).text();
    }
    if (counts) atomicAdd(&b.scalars().visual_weight, fixed_weight(weight));
  });
  __syncthreads();
  const int64_t words = b.p.layout.weights + 8LL * (b.wait.epoch & 1) * b.p.shape.num_ranks;
  bool ok = true;
  if (static_cast<int>(threadIdx.x) < b.p.shape.num_ranks) {
    const int peer = threadIdx.x;
    b.peers.send(peer, words + 8LL * b.rank, make_ll_word(b.scalars().visual_weight, b.wait.epoch));
    const uint64_t* const address = b.own<uint64_t>(words) + peer;
    uint64_t word = load_relaxed_sys(address);
    ok = await_word(address, word, b.wait, Fault::kEntropies, peer);
    atomicAdd(&b.scalars().sums[2], static_cast<int>(value_of(word)));
    atomicAdd(&b.scalars().sums[3], static_cast<int>(value_of(word)));
  }
  return __syncthreads_and(ok) != 0;
}

}  // namespace macs::cuda
