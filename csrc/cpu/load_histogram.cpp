// Integer load histogram of this rank's assignments (docs/design/method.md, 3).
#include <algorithm>

#include "assignments.h"
#include "macs/cpu.h"

namespace macs::cpu {

void load_histogram(const LoadHistogramParams& p, const Places& places) {
  const Assignments& a = p.in;
  const int32_t buckets = num_buckets(a.policy.bucket_bits);
  const int64_t cells = static_cast<int64_t>(a.policy.num_experts) * 2 * buckets;
  std::fill(p.histogram, p.histogram + cells + kNumSums + replica_exchange_size(places), 0);
  int32_t* sums = p.histogram + cells;
  int32_t* routed = sums + kNumSums;
  int32_t* replicated = places.any() ? routed + a.policy.num_ranks + 2 * places.redundant() * places.own_rank() : nullptr;
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const bool text = is_text(a, t);
    const int32_t units = units_at(a, t);
    int32_t rows = 0;
    for (int64_t i = t * a.top_k; i < (t + 1) * a.top_k; ++i) {
      int64_t expert = expert_at(a, i);
      if (expert < 0) continue;
      if (places.any()) {
        ++routed[places.rank_of(static_cast<int32_t>(expert))];
        expert = places.logical()[expert];
        if (const int32_t row = places.row()[expert]; row >= 0) ++replicated[2 * row + !text];
      }
      p.histogram[(expert * 2 + text) * buckets + bucket_at(a, i, t)] += units;
      ++rows;
    }
    if (rows == 0) continue;  // padding
    const int32_t fixed = fixed_weight(a.weight[t]);
    sums[0] += rows;
    sums[1] += text ? 0 : rows;
    sums[2] += text ? 0 : fixed;
    sums[3] += fixed;
  }
}

}  // namespace macs::cpu
