#include "emulator/static_shared.h"

#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace emulator {
namespace {

// There is a segment, and it is mapped once this has been touched.
thread_local volatile int touched = 0;

int look_at(dl_phdr_info* library, size_t, void* found) {
  const auto here = reinterpret_cast<uintptr_t>(&look_at);
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& segment = library->dlpi_phdr[i];
    const uintptr_t begin = library->dlpi_addr + segment.p_vaddr;
    ours |= segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (ours) *static_cast<StaticShared*>(found) = {static_cast<unsigned char*>(library->dlpi_tls_data), bytes};
  return ours ? 1 : 0;
}

}  // namespace

StaticShared StaticShared::find() {
  touched = 1;
  StaticShared found = {nullptr, 0};
  dl_iterate_phdr(look_at, &found);
  if (found.base == nullptr) {
    std::fputs("emulator: no thread-local segment found\n", stderr);
    std::abort();
  }
  return found;
}

}  // namespace emulator
