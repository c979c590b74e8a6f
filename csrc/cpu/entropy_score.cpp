// Entropy of softmax over each visual token's features (docs/design/method.md, 1).
// Two passes over a row that lies in L1: the maximum, then Z = sum e^d and sum e^d d in 16 fixed lanes, so that the sums
// are the same on every instruction set and for every number of threads.
#include <cmath>
#include <cstring>
#include <limits>

#include "macs/cpu.h"

// One binary for all x86-64 machines: the loader picks the widest version the processor has.
#if defined(__x86_64__) && defined(__GNUC__)
#define MACS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MACS_CLONES
#endif
#define MACS_INLINE inline __attribute__((always_inline))

namespace macs::cpu {
namespace {

constexpr int kLanes = 16;
typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

MACS_INLINE float to_float(float x) { return x; }
MACS_INLINE float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
MACS_INLINE float to_float(F16 x) {
  // Shift the half's fields into a float's place; the multiplication rebiases the exponent, subnormals included.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  float f;
  std::memcpy(&f, &magnitude, sizeof f);
  f *= 0x1p112f;
  if ((x.bits & 0x7c00u) == 0x7c00u) f = (x.bits & 0x3ffu) ? std::numeric_limits<float>::quiet_NaN() : INFINITY;
  return sign ? -f : f;
}

MACS_INLINE void load(const float* x, F32* out) { std::memcpy(out, x, sizeof *out); }
MACS_INLINE void load(const Bf16* x, F32* out) {
  U16 half;
  std::memcpy(&half, x, sizeof half);
  const I32 bits = __builtin_convertvector(half, I32) << 16;
  std::memcpy(out, &bits, sizeof bits);
}
MACS_INLINE void load(const F16* x, F32* out) {
  for (int i = 0; i < kLanes; ++i) (*out)[i] = to_float(x[i]);
}

// e^d for d <= 0: Cody-Waite reduction and a degree-6 polynomial, relative error below 2e-7.
MACS_INLINE void exp_nonpositive(const F32& d, F32* out) {
  const F32 magic = F32{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const F32 floor_d = F32{} - 87.0f;
  const F32 x = d > floor_d ? d : floor_d;
  const F32 shifted = x * 1.44269504088896341f + magic;
  const F32 n = shifted - magic;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I32 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const I32 exponent = (bits - 0x4B400000 + 127) << 23;
  F32 scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  *out = p * scale;
}

template <class T>
MACS_INLINE float row_max(const T* x, int64_t n) {
  F32 best = F32{} - INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F32 v;
    load(x + i, &v);
    best = v > best ? v : best;
  }
  float result = best[0];
  for (int lane = 1; lane < kLanes; ++lane) result = best[lane] > result ? best[lane] : result;
  for (; i < n; ++i) result = to_float(x[i]) > result ? to_float(x[i]) : result;
  return result;
}

template <class T>
MACS_INLINE float row_entropy(const T* x, int64_t n) {
  const F32 max = F32{} + row_max(x, n);
  F32 sum = F32{}, weighted = F32{};
  for (int64_t i = 0; i < n; i += kLanes) {
    F32 v;
    if (i + kLanes <= n) {
      load(x + i, &v);
    } else {  // the tail: absent features weigh nothing
      v = F32{} - INFINITY;
      for (int64_t j = i; j < n; ++j) v[j - i] = to_float(x[j]);
    }
    const F32 d = v - max;
    F32 e;
    exp_nonpositive(d, &e);
    e = d > F32{} - 87.0f ? e : F32{};
    sum += e;
    weighted += e * (d > F32{} - 87.0f ? d : F32{});
  }
  double z = 0.0, zd = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) z += sum[lane], zd += weighted[lane];
  return static_cast<float>(std::log(z) - zd / z);
}

#define MACS_ROWS(NAME, T)                                                                            \
  MACS_CLONES void NAME(const EntropyScoreParams& p, int64_t begin, int64_t end) {                    \
    const T* x = static_cast<const T*>(p.hidden_states);                                              \
    for (int64_t t = begin; t < end; ++t)                                                             \
      p.entropy[t] = p.segment[t] < 0 ? 0.0f : row_entropy(x + t * p.hidden_size, p.hidden_size);     \
  }
MACS_ROWS(rows_f32, float)
MACS_ROWS(rows_f16, F16)
MACS_ROWS(rows_bf16, Bf16)
#undef MACS_ROWS

}  // namespace

void entropy_score(const EntropyScoreParams& p, const ParallelFor& parallel_for) {
  const auto rows = p.dtype == DType::kFloat32 ? rows_f32 : (p.dtype == DType::kFloat16 ? rows_f16 : rows_bf16);
  const int64_t grain = 1 + 65536 / (p.hidden_size + 1);  // about 64 Ki features a task
  parallel_for(p.num_tokens, grain, [&](int64_t begin, int64_t end) { rows(p, begin, end); });
}

}  // namespace macs::cpu
