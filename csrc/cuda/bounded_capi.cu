// The bounded permutation as plain C functions, for benchmarks/gpu and the emulated tests; as capi.cu.
#if defined(MACS_C_API)
#include "macs/bounded.h"
#include "macs/cuda.h"

using namespace macs;

#define MACS_EXPORT extern "C" __attribute__((visibility("default")))

MACS_EXPORT size_t macs_bounded_sizeof(int which) {
  const size_t sizes[] = {sizeof(BoundedPermuteParams), sizeof(BoundedGatherParams)};
  return which >= 0 && which < 2 ? sizes[which] : 0;
}
MACS_EXPORT int macs_bounded_permute(const BoundedPermuteParams* p, void* stream) {
  return cuda::launch_bounded_permute(*p, static_cast<cudaStream_t>(stream));
}
MACS_EXPORT int macs_bounded_gather(const BoundedGatherParams* p, void* stream) {
  return cuda::launch_bounded_gather(*p, static_cast<cudaStream_t>(stream));
}
#endif
