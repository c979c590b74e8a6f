// The host side: CUDA's calls for launchers, and the emulator's own for tests (extern "C", see tests/support/emulated.py).
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulator/launches.h"
#include "emulator/scheduler.h"

namespace {

constexpr int kMaxSharedBytes = 227 * 1024;         // of a block, on Hopper
constexpr int kMaxSharedBytesUnasked = 48 * 1024;   // before cudaFuncSetAttribute
constexpr unsigned kMaxThreads = 1024;

bool hold = false;
cudaError_t last_error = cudaSuccess;
std::map<const void*, int> max_dynamic_shared;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t run_now() {
  if (hold) return cudaSuccess;
  return remember(emulator::run_all() ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::device().num_sms; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMaxSharedBytes; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 1; return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  constexpr size_t kAlign = 256;
  *memory = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
  return remember(*memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return cudaMemsetAsync(memory, value, bytes, nullptr); }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  emulator::Launch launch;
  launch.host = [=] { std::memset(memory, value, bytes); };
  emulator::enqueue(stream, std::move(launch));
  return run_now();
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return run_now(); }
cudaError_t cudaDeviceSynchronize() { return run_now(); }

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
  std::memcpy(handle->reserved, &memory, sizeof memory);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned) {
  std::memcpy(memory, handle.reserved, sizeof *memory);
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }

namespace emulator {

std::string demangled(const char* name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string whole = status == 0 ? text : name;
  std::free(text);
  const size_t scope = whole.rfind("::");
  return scope == std::string::npos ? whole : whole.substr(scope + 2);
}

cudaError_t set_max_dynamic_shared(const void* kernel, int bytes) {
  if (bytes > kMaxSharedBytes) return remember(cudaErrorInvalidValue);
  max_dynamic_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::string& name,
                   std::function<void()> body) {
  Launch launch;
  launch.name = name;
  launch.grid = config.gridDim, launch.block = config.blockDim;
  launch.shared_bytes = config.dynamicSmemBytes;
  launch.kernel = std::move(body);
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeCooperative: cooperative = attribute.val.cooperative != 0; break;
      case cudaLaunchAttributeClusterDimension: launch.cluster = static_cast<int>(attribute.val.clusterDim.x); break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launch.overlap = attribute.val.programmaticStreamSerializationAllowed != 0;
        break;
    }
  }
  const dim3 &grid = launch.grid, &block = launch.block;
  const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0) return remember(cudaErrorInvalidConfiguration);
  if (launch.cluster > device().max_cluster || grid.x % static_cast<unsigned>(launch.cluster) != 0) {
    return remember(cudaErrorInvalidConfiguration);
  }
  const auto asked = max_dynamic_shared.find(kernel);
  const int most = asked == max_dynamic_shared.end() ? kMaxSharedBytesUnasked : asked->second;
  if (launch.shared_bytes > static_cast<size_t>(most)) return remember(cudaErrorInvalidValue);
  if (cooperative && blocks > static_cast<unsigned>(device().resident_blocks())) {
    return remember(cudaErrorCooperativeLaunchTooLarge);
  }
  enqueue(config.stream, std::move(launch));
  return run_now();
}

}  // namespace emulator

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

EMULATOR_EXPORT void emulator_device(int num_sms, int max_cluster) {
  emulator::device() = {num_sms, max_cluster};
}
EMULATOR_EXPORT void emulator_find_races(int on) { emulator::find_races(on != 0); }
EMULATOR_EXPORT void emulator_configure(uint64_t seed, int random, int preempt_one_in) {
  emulator::options() = {seed, random != 0, preempt_one_in};
}
// Launches are kept, so that those of several streams run together.
EMULATOR_EXPORT void emulator_hold() { hold = true; }
EMULATOR_EXPORT int emulator_run() {
  hold = false;
  return run_now();
}
EMULATOR_EXPORT const char* emulator_report() { return emulator::report().c_str(); }
EMULATOR_EXPORT uint64_t emulator_steps() { return emulator::steps(); }
EMULATOR_EXPORT uint64_t emulator_launches() { return emulator::launches(); }
EMULATOR_EXPORT uint64_t emulator_now_ns() { return emulator::now_ns(); }
EMULATOR_EXPORT void emulator_forget_error() { last_error = cudaSuccess; }
