// Entropy weights: sigmoid(-delta z) within each segment (docs/design/method.md, 2).
// Sums run in token order in double: T is small beside the hidden states, and the result is independent of threads.
#include <cmath>
#include <vector>

#include "macs/cpu.h"

namespace macs::cpu {

void entropy_weight(const EntropyWeightParams& p) {
  if (p.entropy == nullptr) {
    for (int64_t t = 0; t < p.num_tokens; ++t) p.weight[t] = p.segment[t] < 0 ? 1.0f : 0.5f;
    return;
  }
  std::vector<double> mean(p.num_segments, 0.0), variance(p.num_segments, 0.0);
  std::vector<int64_t> count(p.num_segments, 0);
  for (int64_t t = 0; t < p.num_tokens; ++t)
    if (const int32_t s = p.segment[t]; s >= 0) mean[s] += p.entropy[t], ++count[s];
  for (int64_t s = 0; s < p.num_segments; ++s)
    if (count[s]) mean[s] /= static_cast<double>(count[s]);
  for (int64_t t = 0; t < p.num_tokens; ++t)
    if (const int32_t s = p.segment[t]; s >= 0) {
      const double d = p.entropy[t] - mean[s];
      variance[s] += d * d;
    }
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int32_t s = p.segment[t];
    if (s < 0) {
      p.weight[t] = 1.0f;
      continue;
    }
    const double std = std::sqrt(variance[s] / static_cast<double>(count[s]));
    const double z = (p.entropy[t] - mean[s]) / (std + kStdEpsilon);
    p.weight[t] = static_cast<float>(1.0 / (1.0 + std::exp(p.delta * z)));
  }
}

}  // namespace macs::cpu
