// Floating-point formats of 8 and 16 bits, exactly: rounding to nearest even, subnormals, signs.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace emulator {

template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
struct Minifloat {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr uint32_t kSign = 1u << (kExponentBits + kMantissaBits);
  static constexpr uint32_t kInfinity = ((1u << kExponentBits) - 1) << kMantissaBits;
  static constexpr uint32_t kNan = kSign - 1;
  static constexpr uint32_t kMost = kHasInfinity ? kInfinity - 1 : kNan - 1;  // the greatest finite

  // `saturate`: the greatest finite instead of infinity (or of NaN, where there is no infinity).
  static uint32_t encode(double x, bool saturate = false) {
    if (std::isnan(x)) return kNan;
    const uint32_t sign = std::signbit(x) ? kSign : 0;
    const double size = std::fabs(x);
    if (size == 0.0) return sign;
    if (std::isinf(x)) return sign | beyond(saturate);
    const int exponent = std::max(std::ilogb(size), 1 - kBias);
    if (exponent > kBias + 1) return sign | beyond(saturate);
    // In units of the last place, hidden bit included; a carry runs over into the exponent by itself.
    const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, kMantissaBits - exponent)));
    const uint32_t code = (static_cast<uint32_t>(exponent + kBias - 1) << kMantissaBits) + units;
    return sign | (code > kMost ? beyond(saturate) : code);
  }

  static float decode(uint32_t code) {
    const float sign = (code & kSign) != 0 ? -1.0f : 1.0f;
    const uint32_t size = code & (kSign - 1);
    if (size > kMost) return kHasInfinity && size == kInfinity ? sign * INFINITY : NAN;
    const int exponent = static_cast<int>(size >> kMantissaBits);
    const uint32_t mantissa = size & ((1u << kMantissaBits) - 1);
    const uint32_t units = exponent == 0 ? mantissa : mantissa + (1u << kMantissaBits);
    return sign * std::ldexp(static_cast<float>(units), std::max(exponent, 1) - kBias - kMantissaBits);
  }

 private:
  static uint32_t beyond(bool saturate) { return saturate ? kMost : (kHasInfinity ? kInfinity : kNan); }
};

using Half = Minifloat<5, 10, true>;
using Bfloat16 = Minifloat<8, 7, true>;
using E5m2 = Minifloat<5, 2, true>;
using E4m3 = Minifloat<4, 3, false>;

// The greater one; of a number and a NaN the number, of two zeros the positive one.
inline float greater(float a, float b) { return a == 0.0f && b == 0.0f && std::signbit(a) ? b : std::fmax(a, b); }

}  // namespace emulator
