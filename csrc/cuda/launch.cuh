// Launch helpers: programmatic dependent launch, thread block clusters, device limits.
//
// Every kernel here calls `start_dependents()` first and `wait_for_previous()` before it touches what an earlier kernel
// wrote. The first kernel of a chain is launched plainly (or waits at its top), so that inputs older than the chain are
// complete by the time any kernel of the chain runs, and a later kernel may read those before it waits.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "macs/ptx.cuh"

namespace macs::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxCluster = 16;   // Hopper's largest; above 8 a kernel has to opt in
constexpr int kMaxDevices = 64;

struct Shape {
  int grid, block;
  int cluster = 1;
  int rows = 1;  // of the grid
  size_t shared_bytes = 0;
  bool overlap = false;      // start while the previous kernel of the stream still runs
  bool cooperative = false;  // all blocks on the device at once
};

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Shape& shape, const Args& args, cudaStream_t stream) {
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid, shape.rows);
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (shape.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device < kMaxDevices ? device : 0;
}

// SMs of the current device (under MPS: this client's share).
inline int num_sms() {
  static int cached[kMaxDevices] = {};
  const int device = current_device();
  if (cached[device] == 0) cudaDeviceGetAttribute(&cached[device], cudaDevAttrMultiProcessorCount, device);
  return cached[device];
}

inline int max_shared_bytes() {
  static int cached[kMaxDevices] = {};
  const int device = current_device();
  if (cached[device] == 0) cudaDeviceGetAttribute(&cached[device], cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return cached[device];
}

// Launches of `kernel` may take so many bytes of dynamic shared memory: said once per kernel and device. `raised` belongs to
// the kernel.
template <class Args>
cudaError_t raise_shared_limit(void (*kernel)(Args), int bytes, bool (&raised)[kMaxDevices]) {
  bool& done = raised[current_device()];
  if (done) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  done = error == cudaSuccess;
  return error;
}

// The largest cluster of `kernel` that this device can hold, asked once per kernel and device. `cached` belongs to the
// kernel. Asked with all the shared memory there is, so that any launch of it fits.
template <class Args>
int largest_cluster(void (*kernel)(Args), int block, int (&cached)[kMaxDevices]) {
  int& size = cached[current_device()];
  if (size != 0) return size;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, kernel);
  const int dynamic_bytes = max_shared_bytes() - static_cast<int>(attributes.sharedSizeBytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
  for (int candidate = kMaxCluster; candidate > 1; candidate /= 2) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = candidate;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(candidate);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = dynamic_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters > 0) return size = candidate;
    cudaGetLastError();  // too large is an answer, not an error to be found by somebody else
  }
  return size = 1;
}

}  // namespace macs::cuda
