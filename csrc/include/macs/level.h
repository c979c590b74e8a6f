// The integer arithmetic that has to agree to the bit on every device: fixed-point weights, buckets and levels.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "macs/params.h"

#ifdef __CUDACC__
#define MACS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MACS_HOST_DEVICE inline
#endif

namespace macs {

MACS_HOST_DEVICE int32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

MACS_HOST_DEVICE int32_t clamp_i32(int32_t x, int32_t low, int32_t high) { return x < low ? low : (x > high ? high : x); }

MACS_HOST_DEVICE int32_t num_buckets(int32_t bucket_bits) { return kOctaves << bucket_bits; }

// Of a histogram, in ints: cells and the sums behind them.
MACS_HOST_DEVICE int64_t histogram_size(const Policy& p) {
  return static_cast<int64_t>(p.num_experts) * 2 * num_buckets(p.bucket_bits) + kNumSums;
}

// One bound per expert or one per rank.
MACS_HOST_DEVICE int32_t num_bounds(const Policy& p) { return p.scope == Scope::kExpert ? p.num_experts : p.num_ranks; }

// An entropy weight in units of 1 / 256, at least one unit so that no assignment is free.
MACS_HOST_DEVICE int32_t fixed_weight(float weight) {
#ifdef __CUDA_ARCH__
  const int32_t fixed = __float2int_rn(weight * static_cast<float>(kWeightOne));
#else
  const int32_t fixed = static_cast<int32_t>(std::nearbyintf(weight * static_cast<float>(kWeightOne)));
#endif
  return fixed < 1 ? 1 : fixed;
}

MACS_HOST_DEVICE int32_t load_units(Load load, float weight) { return load == Load::kRows ? 1 : fixed_weight(weight); }

MACS_HOST_DEVICE int32_t units_per_row(Load load) { return load == Load::kRows ? 1 : kWeightOne; }

MACS_HOST_DEVICE float importance_of(Importance importance, float weight, float gate) {
  return importance == Importance::kEntropy ? weight : (importance == Importance::kGate ? gate : weight * gate);
}

// The leading bits of a positive float are a piecewise linear log2: a bucket costs one shift and is exact everywhere.
MACS_HOST_DEVICE int32_t bucket_of(float importance, int32_t bucket_bits) {
  if (!(importance > 0.0f)) return 0;
  const int32_t lowest = (127 - kOctaves) << bucket_bits;
  return clamp_i32((float_bits(importance) >> (23 - bucket_bits)) - lowest, 0, num_buckets(bucket_bits) - 1);
}

// Order of giving up on a bound, ascending: visual below text where text is protected.
MACS_HOST_DEVICE int32_t level_of(int32_t bucket, int32_t shift, bool text, const Policy& p) {
  const int32_t shifted = bucket > shift ? bucket - shift : 0;
  return shifted + (text && p.protect_text ? num_buckets(p.bucket_bits) : 0);
}

// By how many buckets an expert over its capacity moves down: alpha * log2(load / capacity) by the same float bits.
MACS_HOST_DEVICE int32_t pressure_shift(double load, double capacity, double alpha, int32_t bucket_bits) {
  if (!(load > capacity)) return 0;
  const int32_t most = num_buckets(bucket_bits) - 1;
  if (!(capacity > 0.0)) return most;
  const float ratio = static_cast<float>(load / capacity);
  const int64_t log2_q23 = static_cast<int64_t>(float_bits(ratio)) - (127LL << 23);
  const int64_t alpha_q16 = static_cast<int64_t>(rint(alpha * 65536.0));
  const int64_t shift = (log2_q23 * alpha_q16 + (1LL << (38 - bucket_bits))) >> (39 - bucket_bits);
  return shift > most ? most : static_cast<int32_t>(shift);
}

}  // namespace macs
