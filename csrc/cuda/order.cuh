// Floats through integers that order like them: a maximum of integers over a warp is one instruction.
#pragma once
#include <cuda_runtime.h>

namespace macs::cuda {

__device__ __forceinline__ int order_of_bits(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }  // and back

// -0 comes before +0, which equals it as a float.
__device__ __forceinline__ int order_of(float x) { return order_of_bits(__float_as_int(x)); }
__device__ __forceinline__ float of_order(int order) { return __int_as_float(order_of_bits(order)); }

}  // namespace macs::cuda
