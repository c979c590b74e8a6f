// Fibers: functions with a stack of their own that are suspended and resumed at will, all on one OS thread.
//
// ucontext starts a fiber, setjmp and longjmp switch: swapcontext alone would cost a system call a switch. Not for C++
// exceptions that leave a fiber.
#pragma once
#include <setjmp.h>

#include <cstddef>
#include <vector>

namespace emulator {

// Stacks with an inaccessible page below, kept for the next fiber. Each counts as two mappings, of which a process may
// have some ten thousands.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 * 1024;
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() { unmap(); }
  char* take();
  void give(char* stack) { free_.push_back(stack); }
  // When all have been given back: keeps a moderate number of them.
  void trim();

 private:
  void map_more();
  void unmap();
  std::vector<char*> free_;
  std::vector<char*> mapped_;
};

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;
};

using Entry = void (*)();

// Runs `fiber` (its `entry` at first, which must not return) until it suspends.
void resume(Fiber& fiber, Entry entry);
// From within the fiber that runs: back to who resumed it.
void suspend(Fiber& fiber);

}  // namespace emulator
