// Stands in for csrc/include/macs/ptx.cuh: the same functions on the emulated machine.
//
// Memory is sequentially consistent here. That an acquire, a release or a fence is missing shows only where races are
// looked for (emulator/races.h).
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace macs::cuda {

using emulator::Where;

inline unsigned char* dynamic_shared() { return emulator::dynamic_shared(); }

inline void start_dependents() { emulator::start_dependents(); }
inline void wait_for_previous(EMULATOR_WHERE) { emulator::wait_for_previous(where); }

// --- Memory order

template <class T>
T polled(const char* what, const T* address, bool acquire, Where where) {
  emulator::spin(what, where);
  emulator::observe_load(address, sizeof(T), acquire);
  return emulator::peek(address);
}
template <class T>
void published(T* address, T value, bool release) {
  emulator::preempt();
  emulator::observe_store(address, sizeof(T), release, false);
  emulator::poke(address, value);
  emulator::changed();
}

inline uint32_t load_relaxed_sys(const uint32_t* address, EMULATOR_WHERE) {
  return polled("load_relaxed_sys", address, false, where);
}
inline uint64_t load_relaxed_sys(const uint64_t* address, EMULATOR_WHERE) {
  return polled("load_relaxed_sys", address, false, where);
}
inline uint64_t load_relaxed_gpu(const uint64_t* address, EMULATOR_WHERE) {
  return polled("load_relaxed_gpu", address, false, where);
}
inline uint32_t load_acquire_gpu(const uint32_t* address, EMULATOR_WHERE) {
  return polled("load_acquire_gpu", address, true, where);
}
inline uint32_t load_acquire_sys(const uint32_t* address, EMULATOR_WHERE) {
  return polled("load_acquire_sys", address, true, where);
}
inline uint64_t load_acquire_sys(const uint64_t* address, EMULATOR_WHERE) {
  return polled("load_acquire_sys", address, true, where);
}

inline void store_relaxed_sys(uint32_t* address, uint32_t value) { published(address, value, false); }
inline void store_relaxed_sys(uint64_t* address, uint64_t value) { published(address, value, false); }
inline void store_relaxed_gpu(uint64_t* address, uint64_t value) { published(address, value, false); }
inline void store_release_gpu(uint32_t* address, uint32_t value) { published(address, value, true); }
inline void store_release_sys(uint32_t* address, uint32_t value) { published(address, value, true); }
inline void store_release_sys(uint64_t* address, uint64_t value) { published(address, value, true); }

inline void red_add_release_gpu(uint32_t* address, uint32_t value, EMULATOR_WHERE) {
  emulator::exchange("red_add_release_gpu", address, [=](uint32_t old) { return old + value; }, where, true);
}
inline void red_add_release_sys(uint32_t* address, uint32_t value, EMULATOR_WHERE) {
  emulator::exchange("red_add_release_sys", address, [=](uint32_t old) { return old + value; }, where, true);
}

inline void fence_acq_rel_gpu() { emulator::fence(); }
inline void fence_acq_rel_sys() { emulator::fence(); }

// --- 16 bytes at a time

inline uint4 load_once(const uint4* address) { return __ldg(address); }
inline uint4 load_streaming(const uint4* address) { return *address; }
inline void store_streaming(uint4* address, const uint4& v) { *address = v; }
inline void prefetch_l2(const void*) {}

// --- Time

inline uint64_t global_timer_ns(EMULATOR_WHERE) {
  emulator::spin("global_timer_ns", where);
  return emulator::now_ns();
}
inline uint64_t clock_cycles(EMULATOR_WHERE) {
  emulator::spin("clock_cycles", where);
  return 2 * emulator::now_ns();
}
inline void nanosleep(uint32_t, EMULATOR_WHERE) { emulator::spin("nanosleep", where); }

// --- Arithmetic

// Denormals count as zero, as with ex2.approx.ftz.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

}  // namespace macs::cuda
