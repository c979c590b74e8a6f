// How an operator reaches its device: CPU threads, or a stream of the current CUDA device.
#pragma once
#include <ATen/Parallel.h>

#include "checks.h"

#ifdef MACS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "macs/cuda.h"
#endif

namespace macs {

inline const cpu::ParallelFor kParallelFor{[](int64_t n, int64_t grain, cpu::ParallelFor::Body body, void* context) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

// This rank's part of a sum over peers' memory (fused.cpp).
void sum_over_peers(const Tensor& region, at::IntArrayRef peers, int64_t rank, const Tensor& values, const Tensor& sum,
                    int64_t timeout_ns, int64_t hops = 0);

#ifdef MACS_WITH_CUDA

// Launches go to the current device.
struct DeviceGuard {
  c10::cuda::OptionalCUDAGuard guard;
  explicit DeviceGuard(at::Device device) {
    if (device.is_cuda()) guard.set_device(device);
  }
};

inline void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, "sglang_macs::", op, ": ", cudaGetErrorString(error));
}

inline cudaStream_t stream_of(const Tensor& on) { return c10::cuda::getCurrentCUDAStream(on.get_device()); }

inline Tensor workspace_on(const Tensor& on, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, on.options().dtype(at::kByte));
}

#else

struct DeviceGuard {
  explicit DeviceGuard(at::Device) {}
};

#endif

}  // namespace macs
