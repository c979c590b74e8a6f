// Where accesses come from: the calls that -fsanitize=thread puts before every plain load and store of a kernel, those
// of -fsanitize=alignment before a misaligned one, and the emulated intrinsics. What lies on a thread's own stack or in
// this library's data is not looked at.
#include <link.h>

#include <algorithm>

#include "emulator/machine.h"

namespace emulator {
namespace {

struct Image {
  uintptr_t begin = 0, end = 0;
};

int find_image(dl_phdr_info* library, size_t, void* image) {
  const auto here = reinterpret_cast<uintptr_t>(&find_image);
  Image found = {library->dlpi_addr, library->dlpi_addr};
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& segment = library->dlpi_phdr[i];
    const uintptr_t end = library->dlpi_addr + segment.p_vaddr + segment.p_memsz;
    if (segment.p_type == PT_LOAD) found.end = std::max(found.end, end);
  }
  if (here < found.begin || here >= found.end) return 0;
  *static_cast<Image*>(image) = found;
  return 1;
}

const Image& image() {
  static const Image it = [] {
    Image found;
    dl_iterate_phdr(find_image, &found);
    return found;
  }();
  return it;
}

bool is_private(const Thread& thread, const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address), stack = reinterpret_cast<uintptr_t>(thread.fiber.stack);
  return (at >= stack && at < stack + Stacks::kBytes) || (at >= image().begin && at < image().end);
}

// In the room that a block has around its dynamic shared memory, or across its border.
bool beyond_shared(Block& block, const void* address, size_t bytes) {
  const auto* const at = static_cast<const unsigned char*>(address);
  const unsigned char *room = block.dynamic.data(), *base = block.dynamic_base();
  if (at < room || at >= room + block.dynamic.size()) return false;
  return at < base || at + bytes > base + block.grid->launch.shared_bytes;
}

std::string outside(const Thread& thread, uint32_t place) {
  return "out of bounds: " + name_of(thread) + "\n  leaves its dynamic shared memory at " + code(place) + "\n";
}

void see(const void* address, size_t bytes, Access kind, const void* caller) {
  Machine& it = machine();
  if (!it.races.on || it.running == nullptr || is_private(*it.running, address)) return;
  const auto place = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(caller) - image().begin) - 1;
  if (beyond_shared(*it.running->block, address, bytes)) it.end_run(outside(*it.running, place));
  const std::string race = it.races.access(*it.running, address, bytes, kind, place);
  if (!race.empty()) it.end_run(race);
}

}  // namespace

#define EMULATOR_CALLER __builtin_extract_return_addr(__builtin_return_address(0))

void observe(const void* address, size_t bytes, Access kind) { see(address, bytes, kind, EMULATOR_CALLER); }

void observe_load(const void* address, size_t bytes, bool acquire) {
  see(address, bytes, Access::kAtomicRead, EMULATOR_CALLER);
  if (machine().races.on) machine().races.load(*machine().running, address, acquire);
}

void observe_store(const void* address, size_t bytes, bool release, bool adds) {
  see(address, bytes, Access::kAtomicWrite, EMULATOR_CALLER);
  if (machine().races.on) machine().races.store(*machine().running, address, release, adds);
}

void observe_fence() {
  if (machine().races.on) machine().races.fence(*machine().running);
}

}  // namespace emulator

using emulator::Access;

#define ON_ACCESS(name, bytes, kind) \
  extern "C" void __tsan_##name(void* address) { emulator::see(address, bytes, kind, EMULATOR_CALLER); }
#define ON_ACCESSES(bytes)                              \
  ON_ACCESS(read##bytes, bytes, Access::kRead)          \
  ON_ACCESS(write##bytes, bytes, Access::kWrite)        \
  ON_ACCESS(unaligned_read##bytes, bytes, Access::kRead) \
  ON_ACCESS(unaligned_write##bytes, bytes, Access::kWrite)
ON_ACCESSES(1)
ON_ACCESSES(2)
ON_ACCESSES(4)
ON_ACCESSES(8)
ON_ACCESSES(16)

extern "C" {
void __tsan_read_range(void* address, unsigned long bytes) {
  emulator::see(address, bytes, Access::kRead, EMULATOR_CALLER);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  emulator::see(address, bytes, Access::kWrite, EMULATOR_CALLER);
}

// What the compiler says of the access.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* access, unsigned long address) {
  emulator::Machine& it = emulator::machine();
  if (it.running == nullptr) return;
  const unsigned alignment = 1u << access->log_alignment;
  it.end_run("misaligned: " + emulator::name_of(*it.running) + "\n  uses an address that is " +
             std::to_string(address % alignment) + " past a multiple of " + std::to_string(alignment) + " at " +
             access->file + ":" + std::to_string(access->line) + "\n");
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// The guard of a function's static variable.
unsigned char __tsan_atomic8_load(const volatile unsigned char* guard, int) { return *guard; }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
