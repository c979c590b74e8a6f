// Launches as the host API hands them to the scheduler.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "emulator/language.h"

namespace emulator {

// What the device says of itself. Launchers ask once and remember: to be set before the first launch.
struct Device {
  int num_sms = 4;
  int max_cluster = 8;  // blocks

  int resident_blocks() const { return 16 * num_sms; }  // further blocks wait until others have ended
};

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

Device& device();
Options& options();
void find_races(bool on);

// Appends to a stream, which runs in order; different streams run at once. Nothing runs before run_all.
void enqueue(void* stream, Launch launch);
// Until every stream is empty. False after a failure, which drops what is left and leaves a report.
bool run_all();
const std::string& report();
// Since this library was loaded: threads resumed, kernels started.
uint64_t steps();
uint64_t launches();

}  // namespace emulator
