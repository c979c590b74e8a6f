// Loads and stores of intrinsics, which the sanitizer's instrumentation is not to take for plain ones.
#pragma once
#include <cstdint>

#include "emulator/races.h"

namespace emulator {

#define EMULATOR_UNINSTRUMENTED __attribute__((no_sanitize("thread"), noinline))

template <class T>
EMULATOR_UNINSTRUMENTED T peek(const T* address) {
  return *address;
}
template <class T>
EMULATOR_UNINSTRUMENTED void poke(T* address, T value) {
  *address = value;
}

}  // namespace emulator

// Through the path for constants.
template <class T>
T __ldg(const T* address) {
  emulator::observe(address, sizeof(T), emulator::Access::kConstantRead);
  return emulator::peek(address);
}
// Through one cache or another.
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcv(const T* address) {
  return *address;
}
template <class T, class V>
void __stcg(T* address, const V& value) {
  *address = value;
}
template <class T, class V>
void __stcs(T* address, const V& value) {
  *address = value;
}
template <class T, class V>
void __stwt(T* address, const V& value) {
  *address = value;
}
template <class T>
size_t __cvta_generic_to_shared(const T* address) {
  return reinterpret_cast<size_t>(address);
}
