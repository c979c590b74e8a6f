// The fused dispatch and combine as plain C functions, for benchmarks/gpu and the emulated tests; as capi.cu.
#if defined(MACS_C_API)
#include "macs/cuda.h"
#include "macs/fused.h"

using namespace macs;

#define MACS_EXPORT extern "C" __attribute__((visibility("default")))

MACS_EXPORT size_t macs_fused_sizeof(int which) {
  const size_t sizes[] = {sizeof(FusedStatus), sizeof(FusedShape),          sizeof(FusedLayout),
                          sizeof(FusedRank),   sizeof(FusedDispatchParams), sizeof(FusedCombineParams)};
  return which >= 0 && which < 6 ? sizes[which] : 0;
}
MACS_EXPORT void macs_fused_layout(const FusedShape* shape, FusedLayout* layout) { *layout = fused_layout(*shape); }
MACS_EXPORT int macs_fused_dispatch(const FusedDispatchParams* p, void* stream) {
  return cuda::launch_fused_dispatch(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_fused_carry(const FusedDispatchParams* p, void* stream) {
  return cuda::launch_fused_carry(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_fused_combine(const FusedCombineParams* p, void* stream) {
  return cuda::launch_fused_combine(*p, static_cast<cudaStream_t>(stream));
}
#endif
