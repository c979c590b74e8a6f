// CUDA launchers on raw pointers. They allocate nothing, never synchronise with the host and may be captured in a graph.
// Limits, answered with cudaErrorInvalidValue: K <= 32, E <= 1024 (clip_apply).
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "macs/params.h"

namespace macs::cuda {

// Scratch of launch_entropy_weight and launch_score_histogram; the caller owns it, contents may be anything.
size_t entropy_weight_workspace_bytes(const EntropyWeightParams& p);

cudaError_t launch_entropy_score(const EntropyScoreParams& p, cudaStream_t stream);
cudaError_t launch_entropy_weight(const EntropyWeightParams& p, void* workspace, cudaStream_t stream);
cudaError_t launch_load_histogram(const LoadHistogramParams& p, cudaStream_t stream);
cudaError_t launch_clip_threshold(const ClipThresholdParams& p, cudaStream_t stream);
cudaError_t launch_clip_apply(const ClipApplyParams& p, cudaStream_t stream);

// The plan in two calls, one on each side of the exchange; the same bits as the five operators one after the other.
// What is before the exchange: score.entropy is weight.entropy, weight.weight is histogram.in.weight.
cudaError_t launch_score_histogram(const EntropyScoreParams& score, const EntropyWeightParams& weight,
                                   const LoadHistogramParams& histogram, void* workspace, cudaStream_t stream);
// What is behind it: threshold.shift and .cut are apply.shift and .cut.
cudaError_t launch_threshold_apply(const ClipThresholdParams& threshold, const ClipApplyParams& apply, cudaStream_t stream);

}  // namespace macs::cuda
