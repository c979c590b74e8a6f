// An RMA plugin of NCCL over TCP, for tests: NCCL's GIN with its proxy between processes that share no memory and have
// no network card. It is never fast: GPU memory goes through the host, and nothing is overlapped.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "abi.h"
#include "fault.h"
#include "group.h"

namespace rma_tcp {
namespace {

Logger logger = nullptr;

void log(int level, const std::string& line) {
  if (logger) logger(level, level == kLogWarn ? ~0ul : kLogNet, __FILE__, __LINE__, "rma_tcp: %s", line.c_str());
}

// Runs a function of the table: errors become NCCL's, each said once. A group that has failed stays failed.
template <class F>
Result guarded(Group* group, F body) {
  const auto fail = [&](Result result, const char* what) {
    log(kLogWarn, what);
    if (!group) return result;
    std::lock_guard lock(group->mutex);
    group->error = what;
    return result;
  };
  try {
    if (group && group->failed()) return kRemoteError;
    body();
    return kSuccess;
  } catch (const Error& error) {
    return fail(error.result, error.what());
  } catch (const std::exception& error) {
    return fail(kInternalError, error.what());
  }
}

template <class F>
Result guarded(Context* context, F body) {
  std::lock_guard lock(context->group.mutex);
  return guarded(&context->group, body);
}

Group* group_of(void* group) { return static_cast<Group*>(group); }
Context* context_of(void* context) { return static_cast<Context*>(context); }
const Region* region_of(void* region) { return static_cast<const Region*>(region); }

Result init(void** instance, uint64_t, Logger nccl) {
  logger = nccl;
  *instance = nullptr;
  return guarded(static_cast<Group*>(nullptr), [] {
    static bool read = false;  // once: a later communicator must not undo rma_tcp_fault()
    const char* text = read ? nullptr : std::getenv("RMA_TCP_FAULT");
    read = true;
    if (text) faults().set(text);
  });
}

Result devices(int* count) {
  *count = 1;
  return kSuccess;
}

Result get_properties(int, Properties* properties) {
  static char name[] = "rma_tcp";
  *properties = {};
  properties->name = name;
  properties->guid = 0x726d61746370;  // no other device's
  // DMA-BUF, which is not used: NCCL takes windows of several allocations only where it is supported.
  properties->pointer_support = kPointerHost | kPointerCuda | kPointerDmabuf;
  properties->speed = 10000;
  properties->max_comms = 1 << 16;
  properties->max_receives = 1;
  properties->device_type = kDeviceGinProxy;
  properties->virtual_device.count = 1;
  properties->max_p2p_bytes = properties->max_collective_bytes = 1 << 30;
  properties->max_multi_request = 1;
  properties->rail = properties->plane = -1;
  return kSuccess;
}

Result listen(void*, int, void* handle, void** listener) {
  return guarded(static_cast<Group*>(nullptr), [&] {
    std::memset(handle, 0, kHandleBytes);
    *listener = new int(listen_here(static_cast<char*>(handle), kHandleBytes));
  });
}

Result connect(void*, void* handles[], int ranks, int rank, void* listener, void** group) {
  return guarded(static_cast<Group*>(nullptr), [&] {
    std::vector<std::string> addresses;
    for (int r = 0; r < ranks; ++r) addresses.emplace_back(static_cast<const char*>(handles[r]));
    *group = new Group(addresses, rank, dup(*static_cast<int*>(listener)));
  });
}

Result create_context(void* group, ContextConfig* config, void** context) {
  return guarded(group_of(group), [&] { *context = new Context(*group_of(group), *config); });
}

Result register_memory(void* group, void* data, size_t size, int type, uint64_t, void** region) {
  return guarded(group_of(group), [&] {
    if (type != kPointerHost && type != kPointerCuda) throw Error(kInvalidArgument, "memory of an unknown type");
    const Region* made = group_of(group)->register_memory(static_cast<char*>(data), size, type == kPointerCuda);
    *region = const_cast<Region*>(made);
  });
}

Result register_dmabuf(void* group, void* data, size_t size, int type, uint64_t, int, uint64_t flags, void** region) {
  return register_memory(group, data, size, type, flags, region);
}

Result deregister(void* group, void* region) {
  group_of(group)->deregister(region_of(region));
  return kSuccess;
}

Result destroy_context(void* context) {
  log(kLogInfo, context_of(context)->report());
  std::lock_guard lock(context_of(context)->group.mutex);
  delete context_of(context);
  return kSuccess;
}

Result close_group(void* group) {
  delete group_of(group);
  return kSuccess;
}

Result close_listener(void* listener) {
  close(*static_cast<int*>(listener));
  delete static_cast<int*>(listener);
  return kSuccess;
}

Result put_signal(void* context, int index, uint64_t from, void* from_region, size_t size, uint64_t to, void* to_region,
                  uint32_t rank, uint64_t signal, void* signal_region, uint64_t value, uint32_t operation, bool,
                  void** request) {
  return guarded(context_of(context), [&] {
    if (operation != kSignalIncrement && operation != kSignalAdd) throw Error(kInvalidArgument, "an unknown signal");
    enter_cuda_context();
    *request = context_of(context)->put(index, region_of(from_region), from, size, region_of(to_region), to,
                                        static_cast<int>(rank), region_of(signal_region), signal,
                                        operation == kSignalIncrement ? 1 : value);
  });
}

Result put(void* context, int index, uint64_t from, void* from_region, size_t size, uint64_t to, void* to_region,
           uint32_t rank, void** request) {
  return guarded(context_of(context), [&] {
    enter_cuda_context();
    *request = context_of(context)->put(index, region_of(from_region), from, size, region_of(to_region), to,
                                        static_cast<int>(rank), nullptr, 0, 0);
  });
}

Result get(void* context, int index, uint64_t from, void* from_region, size_t size, uint64_t to, void* to_region,
           uint32_t rank, void** request) {
  return guarded(context_of(context), [&] {
    *request = context_of(context)->get(index, *region_of(from_region), from, size, *region_of(to_region), to,
                                        static_cast<int>(rank));
  });
}

// A get is done when its bytes are in this rank's memory: nothing is left to flush.
Result flush(void*, int, void*, uint32_t, void** request) {
  *request = nullptr;
  return kSuccess;
}

// Looks only: NCCL tests hundreds of requests in turn, and makes progress behind them.
Result test(void*, void* request, int* done) {
  auto* asked = static_cast<Request*>(request);
  Context* context = asked->context;
  *done = 0;
  return guarded(context, [&] {
    if (asked->done) {
      *done = 1;
      context->forget(asked);
    }
  });
}

Result progress(void* context) {
  return guarded(context_of(context), [&] { context_of(context)->progress(); });
}

Result query_last_error(void* context, bool* failed) {
  *failed = context_of(context)->group.failed();
  return kSuccess;
}

Result finalize(void*) { return kSuccess; }

}  // namespace
}  // namespace rma_tcp

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED rma_tcp::Plugin ncclRmaPlugin_v14;
rma_tcp::Plugin ncclRmaPlugin_v14 = {
    "rma_tcp",
    rma_tcp::init,
    rma_tcp::devices,
    rma_tcp::get_properties,
    rma_tcp::listen,
    rma_tcp::connect,
    rma_tcp::create_context,
    rma_tcp::register_memory,
    rma_tcp::register_dmabuf,
    rma_tcp::deregister,
    rma_tcp::destroy_context,
    rma_tcp::close_group,
    rma_tcp::close_listener,
    rma_tcp::put,
    rma_tcp::put_signal,
    rma_tcp::get,
    rma_tcp::flush,
    rma_tcp::test,
    rma_tcp::progress,
    rma_tcp::query_last_error,
    rma_tcp::finalize,
};

// Replaces this process's faults (fault.h). Returns 0, or ncclInvalidArgument for a word that is none.
EXPORTED int rma_tcp_fault(const char* text) {
  return rma_tcp::guarded(static_cast<rma_tcp::Group*>(nullptr), [&] { rma_tcp::faults().set(text); });
}
