// Stands in for CUDA's header of this name: language, intrinsics and the host calls that launchers use.
#pragma once
#include "cuda_runtime_api.h"
#include "emulator/arithmetic.h"
#include "emulator/atomics.h"
#include "emulator/collectives.h"
#include "emulator/language.h"
#include "emulator/memory.h"
#include "emulator/scheduler.h"

inline long long clock64() { return 2 * static_cast<long long>(emulator::now_ns()); }
inline void __nanosleep(unsigned, EMULATOR_WHERE) {
  emulator::spin("__nanosleep", where);
}
[[noreturn]] inline void __trap(EMULATOR_WHERE) {
  emulator::fail("__trap", where);
}
