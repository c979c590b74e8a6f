// What one file of kernels offers the others: the single steps that the fused launchers chain.
#pragma once
#include <cuda_runtime.h>

#include "assignments.cuh"
#include "macs/params.h"
#include "macs/replicas.h"
#include "segment_sums.cuh"

namespace macs::cuda {

// Zero two buffers (16-byte aligned, sizes multiples of 4 and of 16); `second` may be null.
struct ZeroArgs {
  void* first;
  void* second;
  int64_t first_bytes, second_bytes;
};
__device__ __forceinline__ void zero_all(const ZeroArgs& args) {  // by the whole grid
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t vectors = args.first_bytes / 16, more = args.second_bytes / 16;
#pragma unroll 1
  for (int64_t i = first; i < vectors; i += stride) static_cast<uint4*>(args.first)[i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int64_t i = first; i < more; i += stride) static_cast<uint4*>(args.second)[i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int64_t i = vectors * 4 + first; i < args.first_bytes / 4; i += stride) static_cast<int*>(args.first)[i] = 0;
}
cudaError_t enqueue_zero(const ZeroArgs& args, cudaStream_t stream);

// Entropies, and the sums of their segments where `layout.sums` is given (zeroed by the kernel before).
struct EntropyScoreArgs {
  EntropyScoreParams p;
  SumsLayout layout;
};
cudaError_t enqueue_entropy_score(const EntropyScoreArgs& args, bool overlap, cudaStream_t stream);

// The histogram, with the weights computed from the sums where `layout.sums` is given, or 0.5 and written to `weight.weight`
// where that is, or else taken from `p.in.weight`. With places ids are physical, and the exchange's rows of ranks and replicas
// are counted behind the histogram, zeroed before.
struct LoadHistogramArgs {
  LoadHistogramParams p;
  EntropyWeightParams weight;
  SumsLayout layout;
  Places places = {};
  TokenShares shares = {};          // with places
  int32_t* block_counts = nullptr;  // with places; of ReplicaScratch
};
cudaError_t enqueue_load_histogram(const LoadHistogramArgs& args, cudaStream_t stream);

}  // namespace macs::cuda
