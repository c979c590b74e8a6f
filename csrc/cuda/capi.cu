// The launchers as plain C functions, for scripts that call them without torch's C++ side (benchmarks/gpu). Not part of
// the extension. Parameters go by pointer to the structures of macs/params.h; every function answers a cudaError_t.
#if defined(MACS_C_API)
#include "macs/cuda.h"
#include "macs/peer_memory.h"

using namespace macs;

#define MACS_EXPORT extern "C" __attribute__((visibility("default")))

MACS_EXPORT size_t macs_sizeof(int which) {
  const size_t sizes[] = {sizeof(EntropyScoreParams),  sizeof(EntropyWeightParams), sizeof(LoadHistogramParams),
                          sizeof(ClipThresholdParams), sizeof(ClipApplyParams),     sizeof(SelectionScoreParams)};
  return which >= 0 && which < 6 ? sizes[which] : 0;
}
MACS_EXPORT size_t macs_entropy_weight_workspace_bytes(const EntropyWeightParams* p) {
  return cuda::entropy_weight_workspace_bytes(*p);
}
MACS_EXPORT int macs_entropy_score(const EntropyScoreParams* p, void* stream) {
  return cuda::launch_entropy_score(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_entropy_weight(const EntropyWeightParams* p, void* workspace, void* stream) {
  return cuda::launch_entropy_weight(*p, workspace, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_load_histogram(const LoadHistogramParams* p, void* stream) {
  return cuda::launch_load_histogram(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_clip_threshold(const ClipThresholdParams* p, void* stream) {
  return cuda::launch_clip_threshold(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT size_t macs_plan_workspace_bytes(const EntropyWeightParams* weight, const ClipApplyParams* apply) {
  return cuda::plan_workspace_bytes(*weight, *apply);
}
MACS_EXPORT int macs_selection_score(const SelectionScoreParams* p, void* stream) {
  return cuda::launch_selection_score(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_clip_apply(const ClipApplyParams* p, void* workspace, void* stream) {
  return cuda::launch_clip_apply(*p, workspace, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_score_histogram(const EntropyScoreParams* score, const EntropyWeightParams* weight,
                                     const LoadHistogramParams* histogram, void* workspace, void* stream) {
  return cuda::launch_score_histogram(*score, *weight, *histogram, workspace, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_threshold_apply(const ClipThresholdParams* threshold, const ClipApplyParams* apply,
                                     void* workspace, void* stream) {
  return cuda::launch_threshold_apply(*threshold, *apply, workspace, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT size_t macs_replica_workspace_bytes(const EntropyWeightParams* weight, const ClipApplyParams* apply,
                                                const Places* places) {
  return cuda::plan_workspace_bytes(*weight, *apply, *places);
}
MACS_EXPORT int macs_replica_histogram(const EntropyScoreParams* score, const EntropyWeightParams* weight,
                                       const LoadHistogramParams* histogram, void* workspace, const Places* places,
                                       void* stream) {
  return cuda::launch_score_histogram(*score, *weight, *histogram, workspace, static_cast<cudaStream_t>(stream), *places);
}
MACS_EXPORT int macs_replica_apply(const ClipThresholdParams* threshold, const ClipApplyParams* apply, void* workspace,
                                   const Places* places, int32_t* rank_rows, void* stream) {
  return cuda::launch_threshold_apply(*threshold, *apply, workspace, static_cast<cudaStream_t>(stream), *places, rank_rows);
}
MACS_EXPORT int macs_allocate_shared(size_t bytes, void** memory, void* handle) {
  return cuda::allocate_shared(bytes, memory, handle);
}
MACS_EXPORT int macs_open_shared(const void* handle, void** memory) { return cuda::open_shared(handle, memory); }
#endif
