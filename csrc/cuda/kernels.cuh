// What one file of kernels offers the others: the single steps that the fused launchers chain.
#pragma once
#include <cuda_runtime.h>

#include "macs/params.h"
#include "segment_sums.cuh"

namespace macs::cuda {

// Zero two buffers (16-byte aligned, sizes multiples of 16); `second` may be null.
struct ZeroArgs {
  void* first;
  void* second;
  int64_t first_bytes, second_bytes;
};
cudaError_t enqueue_zero(const ZeroArgs& args, cudaStream_t stream);

// Entropies, and the sums of their segments where `layout.sums` is given (zeroed by the kernel before).
struct EntropyScoreArgs {
  EntropyScoreParams p;
  SumsLayout layout;
};
cudaError_t enqueue_entropy_score(const EntropyScoreArgs& args, bool overlap, cudaStream_t stream);

// The histogram, with the weights taken from `p.in.weight`, or computed from the sums where `layout.sums` is given.
struct LoadHistogramArgs {
  LoadHistogramParams p;
  EntropyWeightParams weight;
  SumsLayout layout;
};
cudaError_t enqueue_load_histogram(const LoadHistogramArgs& args, cudaStream_t stream);

}  // namespace macs::cuda
