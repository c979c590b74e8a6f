// The fused dispatch and combine, and the sum over peers, as plain C functions, for scripts/gpu and the emulated tests; as capi.cu.
#if defined(MACS_C_API)
#include "macs/cuda.h"
#include "macs/fused.h"

using namespace macs;

#define MACS_EXPORT extern "C" __attribute__((visibility("default")))

MACS_EXPORT size_t macs_fused_sizeof(int which) {
  const size_t sizes[] = {sizeof(FusedStatus), sizeof(FusedShape),          sizeof(FusedLayout),
                          sizeof(FusedRank),   sizeof(FusedDispatchParams), sizeof(FusedCombineParams),
                          sizeof(PeerReduceParams)};
  return which >= 0 && which < 7 ? sizes[which] : 0;
}
MACS_EXPORT void macs_fused_layout(const FusedShape* shape, FusedLayout* layout) { *layout = fused_layout(*shape); }
MACS_EXPORT int macs_fused_dispatch(const FusedDispatchParams* p, void* stream) {
  return cuda::launch_fused_dispatch(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT void macs_peer_reduce_layout(int64_t num_ranks, int64_t size, PeerReduceLayout* layout) {
  *layout = peer_reduce_layout(num_ranks, size);
}
MACS_EXPORT int macs_peer_all_reduce(const PeerReduceParams* p, void* stream) {
  return cuda::launch_peer_all_reduce(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_fused_combine(const FusedCombineParams* p, void* stream) {
  return cuda::launch_fused_combine(*p, static_cast<cudaStream_t>(stream));
}
#endif
