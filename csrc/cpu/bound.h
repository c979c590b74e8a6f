// What bounds and capacities come from (docs/design/method.md, 4): IEEE double, in the order written.
#pragma once
#include <algorithm>
#include <cmath>

#include "macs/params.h"

namespace macs::cpu {

constexpr double kMaxBound = 2147483647.0;

// Also for inf * 0: no bound.
inline int32_t to_bound(double units) {
  return static_cast<int32_t>(units < kMaxBound ? std::floor(units) : kMaxBound);
}

// An expert's capacity in rows, from `base` by the batch's mix. sums: the last kNumSums of the group's histogram.
inline double scaled_capacity(const Policy& p, double base, int8_t modality, const int32_t* sums) {
  const double visual_share = sums[3] > 0 ? static_cast<double>(sums[2]) / sums[3] : 0.5;
  return std::max(p.c_min, base * (1.0 + p.rho * modality * (visual_share - 0.5)));
}

}  // namespace macs::cpu
