// A row on its way: read once, scored, cast, and kept in shared memory until it is known where it goes.
//
// Four warps share a row, each lane holding vectors of 16 bytes (8 features) in registers: the shares, and therefore the
// bits of the entropy, are those of entropy_score. Sixteen neighbouring lanes hold the 128 features of one FP8 scale.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "entropy.cuh"
#include "launch.cuh"
#include "macs/fused.h"

namespace macs::cuda {

constexpr int kRowWarps = 4;
constexpr int kRowThreads = kRowWarps * kWarp;
constexpr int kLanesPerScale = kScaleFeatures / 8;

// Bytes of a row in shared memory: its features, then its scales.
struct RowBytes {
  int features, scales;

  __host__ __device__ explicit RowBytes(const FusedShape& s)
      : features(s.hidden_size * (is_fp8(s.format) ? 1 : 2)),
        scales((static_cast<int>(scale_words(s)) * 4 + 15) / 16 * 16) {}
  __host__ __device__ int all() const { return features + scales; }
};

// The smallest power of two that is at least x, as its exponent. From the float's own bits: exact.
__device__ __forceinline__ int ceil_log2(float x) {
  const unsigned bits = __float_as_uint(x);
  return static_cast<int>(bits >> 23 & 0xffu) - 127 + ((bits & 0x7fffffu) != 0 ? 1 : 0);
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

// How 128 features become e4m3: multiplied by `to`; whoever reads them multiplies by `back`. The numbers are DeepEP's.
struct Fp8Scale {
  static constexpr float kLeast = 1e-4f, kMost = 448.0f;
  float to, back;
  int exponent;  // of `back`, where it is a power of two

  __device__ __forceinline__ Fp8Scale(float greatest, RowFormat format) {
    const float amax = fmaxf(greatest, kLeast);
    if (format == RowFormat::kFp8) {
      to = __fdiv_rn(kMost, amax), back = __fmul_rn(amax, 1.0f / kMost), exponent = 0;
    } else {
      exponent = ceil_log2(__fmul_rn(amax, 1.0f / kMost));
      to = power_of_two(-exponent), back = power_of_two(exponent);
    }
  }
};

__device__ __forceinline__ uint2 to_fp8(const float (&x)[8], float scale) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = make_float2(x[2 * i] * scale, x[2 * i + 1] * scale);
    const uint32_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    words[i / 2] |= two << (16 * (i % 2));
  }
  return make_uint2(words[0], words[1]);
}

// This thread's vectors of a row into `staged` (RowBytes::all() bytes). All lanes of the warp together.
template <int kVectors, bool kExact>
__device__ __forceinline__ void stage(const Share<__nv_bfloat16, kVectors, kExact>& share, RowFormat format,
                                      int feature_bytes, unsigned char* staged) {
  if (format == RowFormat::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (share.has(i)) reinterpret_cast<uint4*>(staged)[share.first + i * share.stride] = share.data[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const bool has = share.has(i);  // the same for the sixteen lanes of a scale
    float x[8], greatest = 0.0f;
    Vector<__nv_bfloat16>::unpack(has ? share.data[i] : make_uint4(0, 0, 0, 0), x);
#pragma unroll
    for (int j = 0; j < 8; ++j) greatest = fmaxf(greatest, fabsf(x[j]));
#pragma unroll
    for (int offset = kLanesPerScale / 2; offset > 0; offset /= 2) {
      greatest = fmaxf(greatest, __shfl_xor_sync(kFullMask, greatest, offset));
    }
    if (!has) continue;
    const Fp8Scale scale(greatest, format);
    const int vector = share.first + i * share.stride;
    reinterpret_cast<uint2*>(staged)[vector] = to_fp8(x, scale.to);
    if (vector % kLanesPerScale != 0) continue;
    const int index = vector / kLanesPerScale;
    if (format == RowFormat::kFp8Ue8m0) {
      staged[feature_bytes + index] = static_cast<unsigned char>(scale.exponent + 127);
    } else {
      reinterpret_cast<float*>(staged + feature_bytes)[index] = scale.back;
    }
  }
}

}  // namespace macs::cuda
