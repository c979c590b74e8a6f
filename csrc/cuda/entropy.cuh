// Shannon entropy of a softmax, from vectors of 16 bytes: what a thread, a warp and several warps make of a row.
//
// With u = (x - max) log2(e), Z = sum 2^u and S = sum u 2^u the entropy is ln 2 (log2 Z - S / Z).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "launch.cuh"
#include "macs/ptx.cuh"
#include "order.cuh"

namespace macs::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Part of a row: its maximum times log2(e), and the two sums relative to it. `zero == 0`: no element yet.
struct Part {
  float top, zero, first;
};

__device__ __forceinline__ Part merge(const Part& a, const Part& b) {
  if (b.zero == 0.0f) return a;
  if (a.zero == 0.0f) return b;
  const float top = fmaxf(a.top, b.top);
  const float da = a.top - top, db = b.top - top;
  const float ea = exp2_approx(da), eb = exp2_approx(db);
  return {top, a.zero * ea + b.zero * eb, ea * (a.first + da * a.zero) + eb * (b.first + db * b.zero)};
}

__device__ __forceinline__ float entropy_of(const Part& part) {
  return kLn2 * (log2f(part.zero) - __fdiv_rn(part.first, part.zero));
}

template <class Element>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  using Packed = float;
  static __device__ __forceinline__ Packed lowest() { return -INFINITY; }
  static __device__ __forceinline__ Packed max(Packed m, const uint4& v) {
    m = fmaxf(m, fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)));
    return fmaxf(m, fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
  }
  static __device__ __forceinline__ float top(Packed m) { return m; }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[kSize]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
};

template <class Pair>
struct PairVector {
  static constexpr int kSize = 8;
  using Packed = Pair;
  static __device__ __forceinline__ Packed max(Packed m, const uint4& v) {
    const Pair* pairs = reinterpret_cast<const Pair*>(&v);
    return __hmax2(__hmax2(m, __hmax2(pairs[0], pairs[1])), __hmax2(pairs[2], pairs[3]));
  }
};

template <>
struct Vector<__half> : PairVector<__half2> {
  static __device__ __forceinline__ Packed lowest() { return __float2half2_rn(-INFINITY); }
  static __device__ __forceinline__ float top(Packed m) { return fmaxf(__low2float(m), __high2float(m)); }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[kSize]) {
    const __half2* pairs = reinterpret_cast<const __half2*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(pairs[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct Vector<__nv_bfloat16> : PairVector<__nv_bfloat162> {
  static __device__ __forceinline__ Packed lowest() { return __float2bfloat162_rn(-INFINITY); }
  static __device__ __forceinline__ float top(Packed m) { return fmaxf(__low2float(m), __high2float(m)); }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[kSize]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bf16 is the upper half of an f32
      x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[kSize]) {
    uint4 packed;
    __nv_bfloat162* const pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return packed;
  }
};

__device__ __forceinline__ float warp_max(float x) { return of_order(__reduce_max_sync(kFullMask, order_of(x))); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// This thread's share of a row: vectors `first`, `first + stride`, ... of `num_vectors`. kExact: all of them exist, so
// that no branch separates one vector's arithmetic from the next one's.
template <class Element, int kVectors, bool kExact>
struct Share {
  int first, stride, num_vectors;
  uint4 data[kVectors];

  __device__ __forceinline__ bool has(int i) const { return kExact || first + i * stride < num_vectors; }

  __device__ __forceinline__ void load(const uint4* row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has(i)) data[i] = load_once(row + first + i * stride);
    }
  }

  __device__ __forceinline__ Part score() const {
    using V = Vector<Element>;
    typename V::Packed most = V::lowest();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has(i)) most = V::max(most, data[i]);
    }
    const float top = warp_max(V::top(most)) * kLog2E;
    float zero = 0.0f, one = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!has(i)) continue;
      float x[V::kSize];
      V::unpack(data[i], x);
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) {
        const float u = fmaf(x[j], kLog2E, -top);
        const float e = exp2_approx(u);
        zero += e;
        one = fmaf(e, u, one);
      }
    }
    return {top, warp_sum(zero), warp_sum(one)};
  }
};

template <class Element, int kVectors, bool kExact>
__device__ __forceinline__ Part score_share(const uint4* row, int first, int stride, int num_vectors) {
  Share<Element, kVectors, kExact> share{first, stride, num_vectors};
  share.load(row);
  return share.score();
}

// The parts of a row, in order.
template <int kParts>
__device__ __forceinline__ float entropy_of_parts(const Part* parts) {
  Part whole = parts[0];
#pragma unroll
  for (int i = 1; i < kParts; ++i) whole = merge(whole, parts[i]);
  return entropy_of(whole);
}

}  // namespace macs::cuda
