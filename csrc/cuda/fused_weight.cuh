// The entropy weights of a block's tokens, from the entropies of all of the rank's tokens (docs/method.md 2).
//
// The moments of a segment are those of segment_sums.cuh to the bit: integers, however they are added up. Here they are
// added in limbs that a warp sums with one instruction each.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "segment_sums.cuh"

namespace macs::cuda {

constexpr int kLimbBits = 26;  // 32 of them fit into 31 bits

// Adds a warp's entropies to the limbs of their segment: n; q low and high; and, with |q| = a + b 2^26, a^2 in two, a b in
// two, b^2.
__device__ __forceinline__ void add_to_limbs(unsigned long long* limbs, bool counts, float entropy) {
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
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    const long long sum = __reduce_add_sync(kFullMask, values[i]);
    if (threadIdx.x % kWarp == i) atomicAdd(limbs + i, static_cast<unsigned long long>(sum));
  }
}

__device__ __forceinline__ SegmentSums sums_of(const unsigned long long* limbs) {
  using Wide = unsigned __int128;
  const Wide square = static_cast<Wide>(limbs[3]) + (static_cast<Wide>(limbs[4]) << kLimbBits) +
                      (static_cast<Wide>(limbs[5]) << (kLimbBits + 1)) +
                      (static_cast<Wide>(limbs[6]) << (2 * kLimbBits + 1)) +
                      (static_cast<Wide>(limbs[7]) << (2 * kLimbBits));
  return {limbs[0], limbs[1] + (limbs[2] << kLimbBits), static_cast<unsigned long long>(square) & 0xffffffffull,
          static_cast<unsigned long long>(square >> 32)};
}

// The rank's entropies into shared memory; those of its only segment, where it has one, are added up as they come.
__device__ inline bool hear_entropies(const FusedBlock& b) {
  const uint64_t* const letters = b.own<uint64_t>(b.p.layout.entropy);
  float* const entropies = b.at<float>(b.args.desk.entropies);
  bool ok = true;
  for (int first = b.warp * kWarp; first < b.me.num_tokens; first += kFusedThreads) {
    const int token = first + b.lane;
    const bool inside = token < b.me.num_tokens, visual = inside && __ldg(b.me.segment + token) >= 0;
    uint64_t letter = inside ? load_relaxed_sys(letters + token) : make_letter(0, b.patience.round);
    ok = ok && await_letter(letters + token, letter, b.patience, Fault::kEntropies, b.me.rank);
    const float entropy = __uint_as_float(value_of(letter));
    if (inside) entropies[token] = entropy;
    if (b.p.num_segments == 1) add_to_limbs(b.scalars().limbs, visual && ok, entropy);
  }
  return __syncthreads_and(ok) != 0;
}

// One warp: the sums of one of several segments.
__device__ __forceinline__ SegmentSums warp_segment_sums(const FusedBlock& b, int segment) {
  SegmentSums sums = {0, 0, 0, 0};
  for (int token = b.lane; token < b.me.num_tokens; token += kWarp) {
    if (__ldg(b.me.segment + token) == segment) sums.add(b.at<float>(b.args.desk.entropies)[token]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sums.count += __shfl_xor_sync(kFullMask, sums.count, offset);
    sums.sum += __shfl_xor_sync(kFullMask, sums.sum, offset);
    sums.square_low += __shfl_xor_sync(kFullMask, sums.square_low, offset);
    sums.square_high += __shfl_xor_sync(kFullMask, sums.square_high, offset);
  }
  return sums;
}

// The weight of each of this block's tokens, a token a warp. False: a block of this rank never scored its own.
__device__ inline bool weigh_tokens(const FusedBlock& b) {
  if (b.p.needs_entropy && !hear_entropies(b)) return false;
  for (int token = b.first + b.warp; token < b.end; token += kFusedWarps) {
    const int segment = __ldg(b.me.segment + token);
    float weight = segment < 0 ? 1.0f : 0.5f;
    if (segment >= 0 && b.p.needs_entropy) {
      const SegmentSums sums = b.p.num_segments == 1 ? sums_of(b.scalars().limbs) : warp_segment_sums(b, segment);
      weight = weight_of(b.at<float>(b.args.desk.entropies)[token], moments_of(sums), b.p.delta);
    }
    if (b.lane == 0) b.at<float>(b.args.desk.weight)[token - b.first] = weight;
  }
  __syncthreads();
  return true;
}

}  // namespace macs::cuda
