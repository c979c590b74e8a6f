// Stands in for CUDA's header of this name.
#pragma once
#include "emulator/float16.h"

using __half = emulator::Float16<emulator::Half>;
using __half2 = emulator::Float16Pair<emulator::Half>;
using half = __half;
using half2 = __half2;
EMULATOR_FLOAT16(__half, __half2)

struct __half_raw {
  unsigned short x;
  operator __half() const { return __half::from_bits(x); }
};

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half::from_bits(bits); }
