// What half and bfloat16 have in common: a scalar and a pair with CUDA's conversions and a few operations.
#pragma once
#include "emulator/language.h"
#include "emulator/minifloat.h"

namespace emulator {

template <class Format>
struct Float16 {
  unsigned short bits;

  Float16() = default;
  Float16(float x) : bits(static_cast<unsigned short>(Format::encode(x))) {}
  operator float() const { return Format::decode(bits); }
  static Float16 from_bits(unsigned short bits) {
    Float16 x;
    x.bits = bits;
    return x;
  }
};

template <class Format>
struct alignas(4) Float16Pair {
  Float16<Format> x, y;
};

template <class Format>
Float16<Format> greater_of(Float16<Format> a, Float16<Format> b) {
  return greater(a, b);
}

}  // namespace emulator

#define EMULATOR_FLOAT16(scalar, pair)                                                        \
  inline scalar __hmax(scalar a, scalar b) { return emulator::greater(a, b); }                \
  inline pair __hmax2(pair a, pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }        \
  inline scalar __habs(scalar a) { return scalar::from_bits(a.bits & 0x7fff); }               \
  inline pair __habs2(pair a) { return {__habs(a.x), __habs(a.y)}; }                          \
  inline float __low2float(pair a) { return a.x; }                                            \
  inline float __high2float(pair a) { return a.y; }
