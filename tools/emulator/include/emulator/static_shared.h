// The memory behind `__shared__` variables: the thread-local segment of this library (see language.h).
#pragma once
#include <cstddef>

namespace emulator {

struct StaticShared {
  unsigned char* base;
  size_t bytes;

  bool holds(const void* address) const {
    return address >= base && address < static_cast<const void*>(base + bytes);
  }
  static StaticShared find();
};

}  // namespace emulator
