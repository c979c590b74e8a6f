// CUDA's words as C++20: qualifiers, vector types, built-in variables.
#pragma once
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

// One OS thread runs every emulated thread, so the thread-local memory of this library holds the static shared arrays
// of one block at a time: the scheduler exchanges it when it goes from block to block. `extern __shared__` does not
// compile: dynamic shared memory has one name, macs::cuda::dynamic_shared().
#define __shared__ static thread_local

#define EMULATOR_VECTOR(type, name, align2, align4)                                                \
  struct alignas(align2) name##2 { type x, y; };                                                   \
  struct name##3 { type x, y, z; };                                                                \
  struct alignas(align4) name##4 { type x, y, z, w; };                                             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                 \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                      \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTOR(signed char, char, 2, 4)
EMULATOR_VECTOR(unsigned char, uchar, 2, 4)
EMULATOR_VECTOR(short, short, 4, 8)
EMULATOR_VECTOR(unsigned short, ushort, 4, 8)
EMULATOR_VECTOR(int, int, 8, 16)
EMULATOR_VECTOR(unsigned, uint, 8, 16)
EMULATOR_VECTOR(float, float, 8, 16)
EMULATOR_VECTOR(long long, longlong, 16, 16)
EMULATOR_VECTOR(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTOR(double, double, 16, 16)
#undef EMULATOR_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the emulated thread that runs; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
