// Registered memory of this rank, of the host or of a GPU, and copies to and from it.
#pragma once
#include <vector>

#include "abi.h"

namespace rma_tcp {

// What NCCL holds as a handle. `id` is equal on all ranks, since they register together.
struct Region {
  uint32_t id;
  char* data;
  size_t size;
  bool on_gpu;
  std::vector<uint64_t> sizes;  // of this region on each rank

  // Raises Error where [offset, offset + bytes) is not in the region of `rank`.
  void check(const char* what, int rank, uint64_t offset, uint64_t bytes) const;
  void read(uint64_t offset, char* to, size_t bytes) const;
  void write(uint64_t offset, const char* from, size_t bytes) const;
  void add(uint64_t offset, uint64_t value) const;  // 64 bits. Only this plugin's threads may write there meanwhile
};

// Takes the calling thread's CUDA context for all later copies. Raises Error where there is none, or no libcuda.
void use_current_cuda_context();
// For a thread of NCCL, before its copies. Does nothing where no CUDA memory is registered.
void enter_cuda_context();

}  // namespace rma_tcp
