// Allocation and mapping of memory that processes share (macs/peer_memory.h).
#include "macs/peer_memory.h"

#include <cuda_runtime.h>

#include <cstring>

namespace macs::cuda {

cudaError_t allocate_shared(size_t bytes, void** memory, void* handle) {
  cudaError_t error = cudaMalloc(memory, bytes);
  if (error != cudaSuccess) return error;
  cudaIpcMemHandle_t made;
  error = cudaMemset(*memory, 0, bytes);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();  // before anybody learns of it
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(&made, *memory);
  if (error != cudaSuccess) {
    cudaFree(*memory);
    return error;
  }
  std::memcpy(handle, &made, sizeof made);
  return cudaSuccess;
}

cudaError_t free_shared(void* memory) { return cudaFree(memory); }

cudaError_t open_shared(const void* handle, void** memory) {
  cudaIpcMemHandle_t made;
  std::memcpy(&made, handle, sizeof made);
  return cudaIpcOpenMemHandle(memory, made, cudaIpcMemLazyEnablePeerAccess);
}

cudaError_t close_shared(void* memory) { return cudaIpcCloseMemHandle(memory); }

}  // namespace macs::cuda
