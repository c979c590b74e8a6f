// What NCCL 2.30 asks of an RMA plugin: layouts and values of NVIDIA/nccl v2.30.7, src/include/plugin/rma/rma_v14.h,
// plugin/net/net_v12.h, plugin/nccl_net.h, nccl_common.h and nccl_device/net_device.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rma_tcp {

enum Result : int {  // ncclResult_t
  kSuccess = 0,
  kCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kRemoteError = 6,
};

constexpr int kLogWarn = 2, kLogInfo = 3;  // ncclDebugLogLevel
constexpr unsigned long kLogNet = 0x10;    // ncclDebugLogSubSys
using Logger = void (*)(int level, unsigned long subsystem, const char* file, int line, const char* format, ...);

constexpr int kHandleBytes = 128;  // NCCL_NET_HANDLE_MAXSIZE
constexpr int kPointerHost = 1, kPointerCuda = 2, kPointerDmabuf = 4;  // NCCL_PTR_*
constexpr uint32_t kSignalIncrement = 1, kSignalAdd = 2;  // NCCL_NET_SIGNAL_OP_*
constexpr int kDeviceGinProxy = 2;  // NCCL_NET_DEVICE_GIN_PROXY

struct VirtualDevice {  // ncclNetVDeviceProps_v12_t
  int count;
  int devices[8];
};

struct Properties {  // ncclNetProperties_v12_t
  char* name;
  char* pci_path;
  uint64_t guid;
  int pointer_support;
  int registration_is_global;
  int force_flush;
  int speed;  // Mbit/s
  int port;
  float latency;  // us
  int max_comms;
  int max_receives;
  int device_type;
  int device_version;
  VirtualDevice virtual_device;
  size_t max_p2p_bytes;
  size_t max_collective_bytes;
  int max_multi_request;
  int16_t rail;
  int16_t plane;
};

struct ContextConfig {  // ncclRmaConfig_v14_t
  int contexts;
  int traffic_class;
  int rank_stride;
};

struct Plugin {  // ncclRma_v14_t
  const char* name;
  Result (*init)(void** instance, uint64_t comm_id, Logger);
  Result (*devices)(int* count);
  Result (*get_properties)(int device, Properties*);
  Result (*listen)(void* instance, int device, void* handle, void** listener);
  Result (*connect)(void* instance, void* handles[], int ranks, int rank, void* listener, void** group);
  Result (*create_context)(void* group, ContextConfig*, void** context);
  Result (*register_memory)(void* group, void* data, size_t size, int type, uint64_t flags, void** region);
  Result (*register_dmabuf)(void* group, void* data, size_t size, int type, uint64_t offset, int fd, uint64_t flags,
                            void** region);
  Result (*deregister)(void* group, void* region);
  Result (*destroy_context)(void* context);
  Result (*close_group)(void* group);
  Result (*close_listener)(void* listener);
  Result (*put)(void* context, int index, uint64_t from, void* from_region, size_t size, uint64_t to, void* to_region,
                uint32_t rank, void** request);
  Result (*put_signal)(void* context, int index, uint64_t from, void* from_region, size_t size, uint64_t to,
                       void* to_region, uint32_t rank, uint64_t signal, void* signal_region, uint64_t value,
                       uint32_t operation, bool strong, void** request);
  Result (*get)(void* context, int index, uint64_t from, void* from_region, size_t size, uint64_t to, void* to_region,
                uint32_t rank, void** request);
  Result (*flush)(void* context, int index, void* region, uint32_t rank, void** request);
  Result (*test)(void* group, void* request, int* done);
  Result (*progress)(void* context);
  Result (*query_last_error)(void* context, bool* failed);
  Result (*finalize)(void* instance);
};

static_assert(sizeof(void*) == 8 && sizeof(Plugin) == 21 * 8);
static_assert(sizeof(Properties) == 128 && sizeof(ContextConfig) == 12);

}  // namespace rma_tcp
