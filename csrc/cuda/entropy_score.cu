// entropy_score: Shannon entropy of softmax(x) per visual token, nats.
//
// Problem:     [T, H] bf16 / f16 / f32 in, [T] f32 out; bound by reading the hidden vectors once.
// Algorithm:   a row stays in registers between its maximum and its sums. With u = (x - max) log2(e), Z = sum 2^u and
//              S = sum u 2^u the entropy is ln 2 (log2 Z - S / Z). Warps of one row take their own maxima and are
//              merged.
// Grid:        persistent; a block owns a contiguous range of rows. A warp per row up to 256 vectors of 16 bytes, else
//              a block of 4 or 8 warps per row (also for few rows, where latency counts); rows that no register file
//              holds, odd sizes and unaligned pointers take the generic kernel, one element at a time, in one pass.
// Determinism: fixed order of additions for a given H and T; segment sums are integers (segment_sums.cuh).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.cuh"
#include "launch.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kWarpKernelThreads = 256;
constexpr int kGenericThreads = 256;
constexpr int kFewRowsPerMultiprocessor = 16;  // below: latency counts, several warps share a row

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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
};

__device__ __forceinline__ uint4 load_once(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The greatest float of a warp through the integer that orders like it (an integer maximum is one instruction).
__device__ __forceinline__ float warp_max(float x) {
  const int bits = __float_as_int(x);
  const int most = __reduce_max_sync(kFullMask, bits ^ ((bits >> 31) & 0x7fffffff));
  return __int_as_float(most ^ ((most >> 31) & 0x7fffffff));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// This thread's share of a row: vectors `first`, `first + stride`, ... of `num_vectors`. kExact: all of them exist, so
// that no branch separates one vector's arithmetic from the next one's.
template <class Element, int kVectors, bool kExact>
__device__ __forceinline__ Part score_share(const uint4* row, int first, int stride, int num_vectors) {
  using V = Vector<Element>;
  uint4 data[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (kExact || first + i * stride < num_vectors) data[i] = load_once(row + first + i * stride);
  }
  typename V::Packed most = V::lowest();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (kExact || first + i * stride < num_vectors) most = V::max(most, data[i]);
  }
  const float top = warp_max(V::top(most)) * kLog2E;
  float zero = 0.0f, one = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!kExact && first + i * stride >= num_vectors) continue;
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

// Rows of one block.
struct Rows {
  int64_t begin, end;
  __device__ __forceinline__ explicit Rows(int64_t num_tokens)
      : begin(num_tokens * blockIdx.x / gridDim.x), end(num_tokens * (blockIdx.x + 1) / gridDim.x) {}
};

template <class Element, int kVectors, bool kExact>
__global__ void __launch_bounds__(kWarpKernelThreads, 4)
    entropy_score_warp_kernel(const __grid_constant__ EntropyScoreArgs args) {
  start_dependents();
  const EntropyScoreParams& p = args.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int num_vectors = static_cast<int>(p.hidden_size) / Vector<Element>::kSize;
  const uint4* hidden = static_cast<const uint4*>(p.hidden_states);
  const Rows rows(p.num_tokens);
  const int copy = blockIdx.x * num_warps + warp;
  __shared__ SegmentAccumulator accumulators[kWarpKernelThreads / kWarp];
  SegmentAccumulator& accumulator = accumulators[warp];
  if (lane == 0) accumulator.clear();
  int segment = rows.begin + warp < rows.end ? __ldg(p.segment + rows.begin + warp) : -1;
  for (int64_t row = rows.begin + warp; row < rows.end; row += num_warps) {
    const int next = row + num_warps < rows.end ? __ldg(p.segment + row + num_warps) : -1;
    float entropy = 0.0f;
    if (segment >= 0) {
      const uint4* const vectors = hidden + row * num_vectors;
      entropy = entropy_of(score_share<Element, kVectors, kExact>(vectors, lane, kWarp, num_vectors));
    }
    if (lane == 0) {
      p.entropy[row] = entropy;
      if (args.layout.sums != nullptr && segment >= 0) accumulator.add(segment, entropy, args.layout, copy);
    }
    segment = next;
  }
  wait_for_previous();
  if (args.layout.sums == nullptr) return;
  __syncthreads();
  if (warp == 0 && lane < num_warps) {  // mostly all warps have one segment: add it up once per block
    if (lane == 0) {
      for (int other = 1; other < num_warps; ++other) accumulators[0].absorb(accumulators[other]);
    }
    __syncwarp((1u << num_warps) - 1u);
    accumulators[lane].flush(args.layout, copy + lane);
  }
}

template <class Element, int kVectors, int kWarps, bool kExact>
__global__ void __launch_bounds__(kWarps * kWarp, 32 / kWarps)
    entropy_score_block_kernel(const __grid_constant__ EntropyScoreArgs args) {
  start_dependents();
  __shared__ Part parts[2][kWarps];  // two, so that one barrier a row is enough
  const EntropyScoreParams& p = args.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_vectors = static_cast<int>(p.hidden_size) / Vector<Element>::kSize;
  const uint4* hidden = static_cast<const uint4*>(p.hidden_states);
  const Rows rows(p.num_tokens);
  __shared__ SegmentAccumulator accumulator;
  if (threadIdx.x == 0) accumulator.clear();
  int side = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int segment = __ldg(p.segment + row);
    if (segment < 0) {
      if (threadIdx.x == 0) p.entropy[row] = 0.0f;
      continue;
    }
    const uint4* const vectors = hidden + row * num_vectors;
    const Part part = score_share<Element, kVectors, kExact>(vectors, threadIdx.x, kWarps * kWarp, num_vectors);
    if (lane == 0) parts[side][warp] = part;
    __syncthreads();
    if (threadIdx.x == 0) {
      Part whole = parts[side][0];
#pragma unroll
      for (int i = 1; i < kWarps; ++i) whole = merge(whole, parts[side][i]);
      const float entropy = entropy_of(whole);
      p.entropy[row] = entropy;
      if (args.layout.sums != nullptr) accumulator.add(segment, entropy, args.layout, blockIdx.x);
    }
    side ^= 1;
  }
  wait_for_previous();
  if (threadIdx.x == 0 && args.layout.sums != nullptr) accumulator.flush(args.layout, blockIdx.x);
}

template <class Element>
__global__ void __launch_bounds__(kGenericThreads) entropy_score_generic_kernel(
    const __grid_constant__ EntropyScoreArgs args) {
  start_dependents();
  __shared__ Part parts[kGenericThreads / kWarp];
  const EntropyScoreParams& p = args.p;
  const Rows rows(p.num_tokens);
  __shared__ SegmentAccumulator accumulator;
  if (threadIdx.x == 0) accumulator.clear();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int segment = __ldg(p.segment + row);
    if (segment < 0) {
      if (threadIdx.x == 0) p.entropy[row] = 0.0f;
      continue;
    }
    const Element* x = static_cast<const Element*>(p.hidden_states) + row * p.hidden_size;
    Part part = {0.0f, 0.0f, 0.0f};
    for (int64_t i = threadIdx.x; i < p.hidden_size; i += blockDim.x) {
      part = merge(part, {static_cast<float>(x[i]) * kLog2E, 1.0f, 0.0f});
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const Part other = {__shfl_down_sync(kFullMask, part.top, offset), __shfl_down_sync(kFullMask, part.zero, offset),
                          __shfl_down_sync(kFullMask, part.first, offset)};
      part = merge(part, other);
    }
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = part;
    __syncthreads();
    if (threadIdx.x == 0) {
      Part whole = parts[0];
      for (int i = 1; i < kGenericThreads / kWarp; ++i) whole = merge(whole, parts[i]);
      const float entropy = entropy_of(whole);
      p.entropy[row] = entropy;
      if (args.layout.sums != nullptr) accumulator.add(segment, entropy, args.layout, blockIdx.x);
    }
    __syncthreads();
  }
  wait_for_previous();
  if (threadIdx.x == 0 && args.layout.sums != nullptr) accumulator.flush(args.layout, blockIdx.x);
}

int grid_for(int64_t work, int blocks_per_multiprocessor) {
  const int64_t most = static_cast<int64_t>(num_multiprocessors()) * blocks_per_multiprocessor;
  return static_cast<int>(work < most ? work : most);
}

template <class Element>
cudaError_t enqueue(const EntropyScoreArgs& args, bool overlap, cudaStream_t stream) {
  const EntropyScoreParams& p = args.p;
  const int64_t num_vectors = p.hidden_size / Vector<Element>::kSize;
  const bool aligned = reinterpret_cast<uintptr_t>(p.hidden_states) % sizeof(uint4) == 0;
  const bool whole = aligned && p.hidden_size % Vector<Element>::kSize == 0;
  const bool few = p.num_tokens <= static_cast<int64_t>(num_multiprocessors()) * kFewRowsPerMultiprocessor;
  const auto run = [&](void (*kernel)(EntropyScoreArgs), int64_t work, int threads, int blocks) {
    return launch(kernel, {.grid = grid_for(work, blocks), .block = threads, .overlap = overlap}, args, stream);
  };
  const int64_t warps = (num_vectors + 8 * kWarp - 1) / (8 * kWarp);  // at 8 vectors per lane
  const int64_t row_blocks = (p.num_tokens + 7) / 8;
  if (!whole || warps > 8) return run(entropy_score_generic_kernel<Element>, p.num_tokens, kGenericThreads, 8);
  if (warps > 4) return run(entropy_score_block_kernel<Element, 8, 8, false>, p.num_tokens, 256, 4);
  if (num_vectors == 7 * 4 * kWarp) return run(entropy_score_block_kernel<Element, 7, 4, true>, p.num_tokens, 128, 8);
  if (warps > 1) return run(entropy_score_block_kernel<Element, 8, 4, false>, p.num_tokens, 128, 8);
  if (few && num_vectors == 2 * 4 * kWarp) {
    return run(entropy_score_block_kernel<Element, 2, 4, true>, p.num_tokens, 128, 16);
  }
  const auto kernel = num_vectors == 8 * kWarp ? entropy_score_warp_kernel<Element, 8, true>
                                               : entropy_score_warp_kernel<Element, 8, false>;
  return run(kernel, row_blocks, kWarpKernelThreads, 4);
}

}  // namespace

cudaError_t enqueue_entropy_score(const EntropyScoreArgs& args, bool overlap, cudaStream_t stream) {
  if (args.p.num_tokens == 0) return cudaSuccess;
  switch (args.p.dtype) {
    case DType::kFloat32: return enqueue<float>(args, overlap, stream);
    case DType::kFloat16: return enqueue<__half>(args, overlap, stream);
    case DType::kBFloat16: return enqueue<__nv_bfloat16>(args, overlap, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_entropy_score(const EntropyScoreParams& p, cudaStream_t stream) {
  return enqueue_entropy_score({.p = p, .layout = {}}, false, stream);
}

}  // namespace macs::cuda
