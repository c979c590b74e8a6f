// Device memory that processes of one host share: allocated by one, mapped by the others through CUDA IPC. No torch.
//
// Allocated by itself, not out of a caching allocator's pool: a handle names a whole allocation, and one that another
// process has mapped must not be handed out again.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

namespace macs::cuda {

constexpr size_t kShareHandleBytes = sizeof(cudaIpcMemHandle_t);

// Zero-filled on the current device; `handle` [kShareHandleBytes] is what another process opens.
cudaError_t allocate_shared(size_t bytes, void** memory, void* handle);
cudaError_t free_shared(void* memory);

// As the current device sees it; peer access is enabled on the way. Not in the process that allocated it.
cudaError_t open_shared(const void* handle, void** memory);
cudaError_t close_shared(void* memory);

}  // namespace macs::cuda
