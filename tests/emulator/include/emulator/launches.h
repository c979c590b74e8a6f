// Launches as the host API hands them to the scheduler.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "emulator/language.h"

namespace emulator {

// What the device says of itself; launchers ask once and remember, so it is chosen when a library is built.
#ifndef EMULATOR_MULTIPROCESSORS
#define EMULATOR_MULTIPROCESSORS 4
#endif
#ifndef EMULATOR_MAX_CLUSTER
#define EMULATOR_MAX_CLUSTER 8
#endif
constexpr int kMultiprocessors = EMULATOR_MULTIPROCESSORS;
constexpr int kMaxClusterBlocks = EMULATOR_MAX_CLUSTER;
constexpr int kResidentBlocks = 16 * kMultiprocessors;  // further blocks wait until others have ended

struct Options {
  uint64_t seed = 0;
  bool random = true;      // else round robin
  int preempt_one_in = 4;  // ordered memory operations that let others run first; 0: none
};

struct Launch {
  std::string name;
  dim3 grid, block;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool overlap = false;          // may start once every block of the launch before has let it
  std::function<void()> kernel;  // of one thread; empty: `host` runs instead
  std::function<void()> host;
};

Options& options();

// Appends to a stream, which runs in order; different streams run at once. Nothing runs before run_all.
void enqueue(void* stream, Launch launch);
// Until every stream is empty. False after a failure, which drops what is left and leaves a report.
bool run_all();
const std::string& report();
// Threads resumed since this library was loaded.
uint64_t steps();

}  // namespace emulator
