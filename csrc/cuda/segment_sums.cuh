// Mean and standard deviation per segment from integer sums, which are the same in any order of addition.
//
// An entropy becomes the integer q = rint(2^32 entropy), exact for an f32 of 2^-9 nats or more. The sums n, sum q and
// sum q^2 (in two parts, because it passes 2^64) are added atomically; n sum q^2 - (sum q)^2 is then exact in 128 bits,
// so that no cancellation enters the variance and the result does not depend on the order of the threads. Deviations
// are taken of q too: a segment of equal entropies gets 0.5 throughout. Holds up to 2^21 tokens a segment.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.cuh"
#include "macs/params.h"

namespace macs::cuda {

constexpr float kEntropyOne = 4294967296.0f;  // 2^32
constexpr float kEntropyUnit = 1.0f / kEntropyOne;
constexpr float kEntropyMost = 32.0f;       // nats; ln H stays far below
constexpr int kCopies = 16;                 // of the sums of few segments, against contention on one address
constexpr int kFewSegments = 64;

__device__ __forceinline__ long long quantized(float entropy) {
  return __float2ll_rn(fminf(fmaxf(entropy, -kEntropyMost), kEntropyMost) * kEntropyOne);
}

struct alignas(32) SegmentSums {
  unsigned long long count, sum, square_low, square_high;

  __device__ __forceinline__ void add(float entropy) {
    const long long q = quantized(entropy);
    const unsigned long long size = static_cast<unsigned long long>(q < 0 ? -q : q), square = size * size;
    count += 1;
    sum += static_cast<unsigned long long>(q);
    square_low += square & 0xffffffffull;
    square_high += (__umul64hi(size, size) << 32) | (square >> 32);
  }

  // A whole warp: the sums of each `kLanes` lanes, in all of them.
  template <int kLanes>
  __device__ __forceinline__ void add_over() {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      count += __shfl_xor_sync(kFullMask, count, offset);
      sum += __shfl_xor_sync(kFullMask, sum, offset);
      square_low += __shfl_xor_sync(kFullMask, square_low, offset);
      square_high += __shfl_xor_sync(kFullMask, square_high, offset);
    }
  }
};

struct SegmentMoments {
  double mean;  // the deviation from it cancels, the rest need not be double
  float inverse_std;
};

// The sums of all segments, `copies` times, `stride` apart.
struct SumsLayout {
  SegmentSums* sums;
  int copies, stride;

  // Copies of few segments lie 256 bytes apart or more: on one line of L2 their additions would queue.
  static SumsLayout of(void* memory, int64_t num_segments) {
    const bool few = num_segments <= kFewSegments;
    const int stride = static_cast<int>(num_segments < 8 ? 8 : num_segments);
    return {static_cast<SegmentSums*>(memory), few ? kCopies : 1, stride};
  }
  int64_t bytes() const { return static_cast<int64_t>(copies) * stride * sizeof(SegmentSums); }
};

// Sums of a run of tokens of one segment, added to a copy in device memory when the segment changes. A kernel short of
// registers keeps it in shared memory, so it has no constructor: `clear` first.
class SegmentAccumulator {
 public:
  __device__ __forceinline__ void clear() {
    local_ = {0, 0, 0, 0};
    segment_ = -1;
  }

  __device__ __forceinline__ void add(int segment, float entropy, const SumsLayout& layout, int copy) {
    if (segment != segment_) flush(layout, copy);
    segment_ = segment;
    local_.add(entropy);
  }

  __device__ __forceinline__ void flush(const SumsLayout& layout, int copy) {
    if (segment_ >= 0) {
      wait_for_previous();  // the kernel before this one zeroes the sums
      SegmentSums* target = layout.sums + static_cast<int64_t>(copy % layout.copies) * layout.stride + segment_;
      atomicAdd(&target->count, local_.count);
      atomicAdd(&target->sum, local_.sum);
      atomicAdd(&target->square_low, local_.square_low);
      atomicAdd(&target->square_high, local_.square_high);
    }
    clear();
  }

  // One warp, for the accumulators of `kNumber` warps: mostly they hold one segment, whose sums are then added up first.
  template <int kNumber>
  static __device__ __forceinline__ void flush_all(const SegmentAccumulator* of_warps, const SumsLayout& layout, int copy) {
    const int lane = threadIdx.x % kWarp;
    SegmentAccumulator mine;
    mine.clear();
    if (lane < kNumber) mine = of_warps[lane];
    const int segment = __shfl_sync(kFullMask, mine.segment_, 0);
    const bool joins = segment >= 0 && mine.segment_ == segment;
    SegmentSums sums = joins ? mine.local_ : SegmentSums{0, 0, 0, 0};
    sums.add_over<kNumber>();
    if (joins && lane == 0) mine.local_ = sums;
    if (joins && lane != 0) mine.clear();
    mine.flush(layout, copy + lane);
  }

 private:
  SegmentSums local_;
  int segment_;
};

__device__ __forceinline__ SegmentMoments moments_of(const SegmentSums& s) {
  if (s.count == 0) return {0.0, 0.0f};
  using Wide = unsigned __int128;
  const double inverse = 1.0 / static_cast<double>(s.count);
  const long long sum = static_cast<long long>(s.sum);
  const unsigned long long magnitude = static_cast<unsigned long long>(sum < 0 ? -sum : sum);
  const Wide squares = (static_cast<Wide>(s.square_high) << 32) + s.square_low;
  const Wide spread = squares * s.count - static_cast<Wide>(magnitude) * magnitude;
  const double wide = static_cast<double>(static_cast<unsigned long long>(spread >> 64)) * 18446744073709551616.0 +
                      static_cast<double>(static_cast<unsigned long long>(spread));
  const float variance = static_cast<float>(wide * inverse * inverse) * kEntropyUnit * kEntropyUnit;
  return {static_cast<double>(sum) * inverse * kEntropyUnit, 1.0f / (sqrtf(variance) + kStdEpsilon)};
}

// One warp: the moments of a segment out of its copies, the same in every lane.
__device__ __forceinline__ SegmentMoments warp_moments(const SumsLayout& layout, int segment) {
  const int lane = threadIdx.x % kWarp;
  SegmentSums total = {};
  if (lane < layout.copies) total = layout.sums[lane * layout.stride + segment];
  total.add_over<kCopies>();
  return moments_of(total);
}

__device__ __forceinline__ float weight_of(float entropy, const SegmentMoments& moments, float delta) {
  const double value = static_cast<double>(quantized(entropy)) * kEntropyUnit;
  const float z = static_cast<float>(value - moments.mean) * moments.inverse_std;
  return __fdiv_rn(1.0f, 1.0f + expf(delta * z));
}

}  // namespace macs::cuda
