// The sum over peers as plain C functions, for benchmarks/gpu and the emulated tests; as capi.cu.
#if defined(MACS_C_API)
#include "macs/cuda.h"
#include "macs/peer_all_reduce.h"

using namespace macs;

#define MACS_EXPORT extern "C" __attribute__((visibility("default")))

MACS_EXPORT size_t macs_peer_reduce_sizeof() { return sizeof(PeerReduceParams); }
MACS_EXPORT void macs_peer_reduce_layout(int64_t num_ranks, int64_t size, PeerReduceLayout* layout) {
  *layout = peer_reduce_layout(num_ranks, size);
}
MACS_EXPORT int macs_peer_all_reduce(const PeerReduceParams* p, void* stream) {
  return cuda::launch_peer_all_reduce(*p, static_cast<cudaStream_t>(stream));
}
#endif
