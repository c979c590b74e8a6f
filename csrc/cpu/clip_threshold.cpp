// From the group's histogram to the level at which each bound cuts (docs/design/method.md, 4).
// Every rank runs this on the same numbers and gets the same levels; only quota and room are its own share.
#include <algorithm>
#include <vector>

#include "assignments.h"
#include "bound.h"
#include "macs/cpu.h"

namespace macs::cpu {
namespace {

struct Threshold {
  const ClipThresholdParams& p;
  const int32_t buckets = num_buckets(p.policy.bucket_bits), levels = 2 * buckets;
  const int32_t per_rank = p.policy.num_experts / p.policy.num_ranks;
  const int32_t num_bounds = macs::num_bounds(p.policy);
  const int32_t* sums = p.group + static_cast<int64_t>(p.policy.num_experts) * levels;
  const double unit = units_per_row(p.policy.load);
  std::vector<int64_t> group_level, own_level;          // [levels], reused for every bound
  std::vector<int64_t> group_room, group_over, own_over;  // [NB], [R], [R]

  explicit Threshold(const ClipThresholdParams& params)
      : p(params), group_level(levels), own_level(levels), group_room(num_bounds), group_over(p.policy.num_ranks),
        own_over(p.policy.num_ranks) {}

  double capacity(int32_t expert) const {
    if (std::isinf(p.policy.gamma)) return p.policy.gamma;
    return scaled_capacity(p.policy, p.policy.gamma * sums[0] / p.policy.num_experts, p.modality[expert], sums);
  }

  int32_t bound(int32_t n) const {
    const bool by_expert = p.policy.scope == Scope::kExpert;
    return to_bound(by_expert ? capacity(n) * unit : p.policy.gamma * sums[0] / p.policy.num_ranks * unit);
  }

  int32_t shift(int32_t expert) const {
    if (p.policy.scope != Scope::kRank || !(p.policy.alpha > 0.0)) return 0;
    const int32_t* cells = p.group + static_cast<int64_t>(expert) * levels;
    int64_t units = 0;
    for (int32_t l = 0; l < levels; ++l) units += cells[l];
    return pressure_shift(static_cast<double>(units) / unit, capacity(expert), p.policy.alpha, p.policy.bucket_bits);
  }

  void add_expert(int32_t expert) {
    const int64_t base = static_cast<int64_t>(expert) * levels;
    for (int32_t text = 0; text < 2; ++text)
      for (int32_t b = 0; b < buckets; ++b) {
        const int64_t cell = base + text * buckets + b;
        const int32_t level = level_of(b, p.shift[expert], text, p.policy);
        group_level[level] += p.group[cell];
        own_level[level] += p.own[cell];
      }
  }

  void cut(int32_t n) {
    std::fill(group_level.begin(), group_level.end(), 0);
    std::fill(own_level.begin(), own_level.end(), 0);
    const int32_t first = p.policy.scope == Scope::kExpert ? n : n * per_rank;
    const int32_t last = p.policy.scope == Scope::kExpert ? n + 1 : first + per_rank;
    for (int32_t e = first; e < last; ++e) add_expert(e);

    int32_t* out = p.cut + static_cast<int64_t>(n) * 4;
    out[3] = bound(n);
    int64_t above = 0;
    int32_t level = levels - 1;
    while (level >= 0 && above + group_level[level] <= out[3]) above += group_level[level--];
    out[0] = level, out[1] = 0, out[2] = 0;
    group_room[n] = level < 0 ? out[3] - above : 0;
    if (level < 0) return;
    out[1] = static_cast<int32_t>((out[3] - above) * own_level[level] / group_level[level]);
    const int32_t rank = first / per_rank;
    for (int32_t l = 0; l <= level; ++l) group_over[rank] += group_level[l], own_over[rank] += own_level[l];
  }

  // This rank's share of the free room: the shares of all ranks never add up to more than the room.
  void share_room() {
    if (p.policy.reroute == Reroute::kNone) return;
    int64_t all_group = 0, all_own = 0;
    for (int32_t r = 0; r < p.policy.num_ranks; ++r) all_group += group_over[r], all_own += own_over[r];
    for (int32_t n = 0; n < num_bounds; ++n) {
      const int32_t rank = p.policy.scope == Scope::kExpert ? n / per_rank : n;
      const int64_t over = p.policy.reroute == Reroute::kLocal ? group_over[rank] : all_group;
      const int64_t mine = p.policy.reroute == Reroute::kLocal ? own_over[rank] : all_own;
      p.cut[n * 4 + 2] = over > 0 ? static_cast<int32_t>(group_room[n] * mine / over) : 0;
    }
  }
};

}  // namespace

void clip_threshold(const ClipThresholdParams& p) {
  Threshold threshold(p);
  for (int32_t e = 0; e < p.policy.num_experts; ++e) p.shift[e] = threshold.shift(e);
  for (int32_t n = 0; n < threshold.num_bounds; ++n) threshold.cut(n);
  threshold.share_room();
}

}  // namespace macs::cpu
