#include "memory.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "fault.h"

namespace rma_tcp {

namespace {

constexpr size_t kStagingBytes = 1 << 20;
constexpr int kDeinitialized = 4;  // CUDA_ERROR_DEINITIALIZED

// Through the copy engines and pinned memory on a stream of its own: a kernel may fill every SM while this runs, and
// the default stream may wait for it. The driver's functions are looked up: the plugin loads where there is no GPU.
class Cuda {
 public:
  Cuda() {
    const char* path = std::getenv("RMA_TCP_LIBCUDA");
    void* library = dlopen(path ? path : "libcuda.so.1", RTLD_NOW);
    if (!library) throw Error(kCudaError, std::string("no CUDA driver: ") + dlerror());
    find(library, "cuCtxGetCurrent", get_current_);
    find(library, "cuCtxSetCurrent", set_current_);
    find(library, "cuThreadExchangeStreamCaptureMode", exchange_capture_mode_);
    find(library, "cuMemcpyDtoHAsync_v2", to_host_);
    find(library, "cuMemcpyHtoDAsync_v2", to_device_);
    find(library, "cuStreamSynchronize", synchronize_);
    int (*create_stream)(void**, unsigned);
    int (*allocate)(void**, size_t, unsigned);
    find(library, "cuStreamCreate", create_stream);
    find(library, "cuMemHostAlloc", allocate);
    check("cuCtxGetCurrent", get_current_(&context_));
    if (!context_) throw Error(kCudaError, "no CUDA context on the thread that registers memory");
    check("cuStreamCreate", create_stream(&stream_, 1));  // CU_STREAM_NON_BLOCKING
    void* memory;
    check("cuMemHostAlloc", allocate(&memory, kStagingBytes, 1));  // CU_MEMHOSTALLOC_PORTABLE
    staging_ = static_cast<char*>(memory);
  }

  void enter() {
    const int status = set_current_(context_);
    if (status == kDeinitialized) return;  // the process ends: NCCL's thread is the last to hear of it
    check("cuCtxSetCurrent", status);
    int mode = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED: another thread may capture a graph
    check("cuThreadExchangeStreamCaptureMode", exchange_capture_mode_(&mode));
  }

  void read(const char* from, char* to, size_t bytes) {
    for (size_t done = 0; done < bytes; done += kStagingBytes) {
      const size_t part = std::min(kStagingBytes, bytes - done);
      check("cuMemcpyDtoHAsync", to_host_(staging_, reinterpret_cast<uint64_t>(from) + done, part, stream_));
      check("cuStreamSynchronize", synchronize_(stream_));
      std::memcpy(to + done, staging_, part);
    }
  }

  void write(char* to, const char* from, size_t bytes) {
    for (size_t done = 0; done < bytes; done += kStagingBytes) {
      const size_t part = std::min(kStagingBytes, bytes - done);
      std::memcpy(staging_, from + done, part);
      check("cuMemcpyHtoDAsync", to_device_(reinterpret_cast<uint64_t>(to) + done, staging_, part, stream_));
      check("cuStreamSynchronize", synchronize_(stream_));
    }
  }

 private:
  template <class F>
  static void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw Error(kCudaError, std::string("the CUDA driver has no ") + name);
  }
  static void check(const char* name, int status) {
    if (status) throw Error(kCudaError, std::string(name) + ": CUDA error " + std::to_string(status));
  }

  int (*get_current_)(void**);
  int (*set_current_)(void*);
  int (*exchange_capture_mode_)(int*);
  int (*to_host_)(void*, uint64_t, size_t, void*);
  int (*to_device_)(uint64_t, const void*, size_t, void*);
  int (*synchronize_)(void*);
  void* context_ = nullptr;
  void* stream_ = nullptr;
  char* staging_ = nullptr;
};

Cuda* cuda = nullptr;   // of the process, which holds one GPU; never freed: the context may be gone first
std::mutex cuda_mutex;  // of the staging memory

}  // namespace

void use_current_cuda_context() {
  std::lock_guard lock(cuda_mutex);
  if (!cuda) cuda = new Cuda();
}

void enter_cuda_context() {
  std::lock_guard lock(cuda_mutex);
  if (cuda) cuda->enter();
}

void Region::check(const char* what, int rank, uint64_t offset, uint64_t bytes) const {
  const uint64_t whole = sizes[rank];
  if (offset <= whole && bytes <= whole - offset) return;
  throw Error(kInvalidArgument, std::string(what) + ": bytes " + std::to_string(offset) + " + " +
                                    std::to_string(bytes) + " of region " + std::to_string(id) + ", which has " +
                                    std::to_string(whole) + " on rank " + std::to_string(rank));
}

void Region::read(uint64_t offset, char* to, size_t bytes) const {
  std::lock_guard lock(cuda_mutex);
  if (on_gpu) return cuda->read(data + offset, to, bytes);
  std::memcpy(to, data + offset, bytes);
}

void Region::write(uint64_t offset, const char* from, size_t bytes) const {
  std::lock_guard lock(cuda_mutex);
  if (on_gpu) return cuda->write(data + offset, from, bytes);
  std::memcpy(data + offset, from, bytes);
}

void Region::add(uint64_t offset, uint64_t value) const {
  if (!on_gpu) {
    __atomic_fetch_add(reinterpret_cast<uint64_t*>(data + offset), value, __ATOMIC_RELEASE);
    return;
  }
  uint64_t sum;
  read(offset, reinterpret_cast<char*>(&sum), sizeof sum);
  sum += value;
  write(offset, reinterpret_cast<const char*>(&sum), sizeof sum);
}

}  // namespace rma_tcp
