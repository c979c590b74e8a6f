// Atomic operations: a thread is never interrupted inside one, and others may run before and behind it.
#pragma once
#include "emulator/language.h"
#include "emulator/memory.h"
#include "emulator/scheduler.h"

namespace emulator {

// Puts next(old) in place, relaxed or released, and returns old. A change of nothing counts as spinning: a lock that is
// taken, a poll.
template <class T, class Next>
T exchange(const char* what, T* address, Next next, Where where, bool release = false) {
  preempt();
  const T old = peek(address), fresh = static_cast<T>(next(old));
  poke(address, fresh);
  observe_load(address, sizeof(T), false);
  observe_store(address, sizeof(T), release, true);
  if (std::memcmp(&old, &fresh, sizeof old) == 0) {
    spin(what, where);
  } else {
    changed();
  }
  return old;
}

// The second operand converts, as in CUDA's overloads.
template <class T>
using Same = std::type_identity_t<T>;

}  // namespace emulator

#define EMULATOR_ATOMIC(name, expression)                                                      \
  template <class T>                                                                           \
  T name(T* address, emulator::Same<T> value, EMULATOR_WHERE) {                                \
    return emulator::exchange(#name, address, [value](T old) { return expression; }, where);   \
  }                                                                                            \
  template <class T>                                                                           \
  T name##_block(T* address, emulator::Same<T> value, EMULATOR_WHERE) {                        \
    return name(address, value, where);                                                        \
  }                                                                                            \
  template <class T>                                                                           \
  T name##_system(T* address, emulator::Same<T> value, EMULATOR_WHERE) {                       \
    return name(address, value, where);                                                        \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMax, old > value ? old : value)
EMULATOR_ATOMIC(atomicMin, old < value ? old : value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, ((void)old, value))
#undef EMULATOR_ATOMIC

template <class T>
T atomicCAS(T* address, emulator::Same<T> expected, emulator::Same<T> value, EMULATOR_WHERE) {
  return emulator::exchange("atomicCAS", address, [=](T old) { return old == expected ? value : old; }, where);
}

namespace emulator {
inline void fence() {
  preempt();
  observe_fence();
}
}  // namespace emulator
inline void __threadfence_block() { emulator::fence(); }
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
