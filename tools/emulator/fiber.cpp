#include "emulator/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace emulator {
namespace {

constexpr int kStacksAtOnce = 256;
constexpr size_t kMostKept = 8;  // times as many
jmp_buf resumer;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t stride() { return Stacks::kBytes + page_bytes(); }

}  // namespace

void Stacks::unmap() {
  for (char* chunk : mapped_) munmap(chunk, kStacksAtOnce * stride());
  mapped_.clear();
  free_.clear();
}

void Stacks::trim() {
  if (mapped_.size() > kMostKept) unmap();
}

char* Stacks::take() {
  if (free_.empty()) map_more();
  char* const stack = free_.back();
  free_.pop_back();
  return stack;
}

void Stacks::map_more() {
  void* const memory = mmap(nullptr, kStacksAtOnce * stride(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulator: no memory for stacks");
    std::abort();
  }
  mapped_.push_back(static_cast<char*>(memory));
  for (int i = 0; i < kStacksAtOnce; ++i) {
    char* const guard = mapped_.back() + i * stride();
    if (mprotect(guard, page_bytes(), PROT_NONE) != 0) {
      std::perror("emulator: no guard of a stack (vm.max_map_count?)");
      std::abort();
    }
    free_.push_back(guard + page_bytes());
  }
}

void resume(Fiber& fiber, Entry entry) {
  if (_setjmp(resumer) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t first;
  getcontext(&first);
  first.uc_stack.ss_sp = fiber.stack;
  first.uc_stack.ss_size = Stacks::kBytes;
  first.uc_link = nullptr;
  makecontext(&first, entry, 0);
  setcontext(&first);
}

void suspend(Fiber& fiber) {
  if (_setjmp(fiber.context) == 0) _longjmp(resumer, 1);
}

}  // namespace emulator
