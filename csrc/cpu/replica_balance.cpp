// From the group's histogram to how many rows each replica gets, and what each source may keep on a rank that is over
// its bound all the same (docs/design/method.md, 3b, 4b). Every rank runs this on the same numbers and gets the same quotas.
#include <algorithm>
#include <cmath>
#include <vector>

#include "bound.h"
#include "macs/cpu.h"

namespace macs::cpu {
namespace {

// Rows onto places of these loads, as water finds its level; the rest, one row each, to the first places at the level.
void pour(int64_t rows, const std::vector<int64_t>& loads, std::vector<int64_t>& poured) {
  std::vector<int64_t> ascending(loads);
  std::sort(ascending.begin(), ascending.end());
  int64_t below = 0, level = 0;
  for (size_t k = 1; k <= ascending.size(); ++k) {
    below += ascending[k - 1];
    level = (rows + below) / static_cast<int64_t>(k);
    if (k == ascending.size() || level <= ascending[k]) break;
  }
  int64_t rest = rows;
  for (size_t i = 0; i < loads.size(); ++i) rest -= poured[i] = std::max<int64_t>(0, level - loads[i]);
  for (size_t i = 0; i < loads.size() && rest > 0; ++i)
    if (loads[i] <= level) ++poured[i], --rest;
}

struct Balance {
  const ReplicaBalanceParams& p;
  const Places& places = p.places;
  const int32_t buckets = num_buckets(p.policy.bucket_bits), levels = 2 * buckets;
  const int32_t* sums = p.group + static_cast<int64_t>(p.policy.num_experts) * levels;
  std::vector<int64_t> rows, text;  // [E] of the group

  explicit Balance(const ReplicaBalanceParams& params) : p(params), rows(p.policy.num_experts), text(rows.size()) {
    for (int32_t e = 0; e < p.policy.num_experts; ++e) {
      const int32_t* cells = p.group + static_cast<int64_t>(e) * levels;
      for (int32_t b = 0; b < buckets; ++b) text[e] += cells[buckets + b], rows[e] += cells[b] + cells[buckets + b];
    }
  }

  void split_evenly() {
    std::fill(p.quota, p.quota + places.num_physical, 0);
    std::fill(p.load, p.load + p.policy.num_ranks, 0);
    for (int32_t e = 0; e < p.policy.num_experts; ++e) {
      const int32_t first = places.first()[e], count = places.num_places(e);
      for (int32_t i = 0; i < count; ++i) {
        const int64_t part = rows[e] * (i + 1) / count - rows[e] * i / count;
        p.quota[first + i] = static_cast<int32_t>(part);
        p.load[places.rank()[first + i]] += static_cast<int32_t>(part);
      }
    }
  }

  bool pour_expert(int32_t e) {
    const int32_t first = places.first()[e], count = places.num_places(e);
    std::vector<int64_t> loads(count), poured(count);
    for (int32_t i = 0; i < count; ++i) loads[i] = p.load[places.rank()[first + i]] - p.quota[first + i];
    pour(rows[e], loads, poured);
    bool changed = false;
    for (int32_t i = 0; i < count; ++i) {
      changed |= poured[i] != p.quota[first + i];
      p.quota[first + i] = static_cast<int32_t>(poured[i]);
      p.load[places.rank()[first + i]] = static_cast<int32_t>(loads[i] + poured[i]);
    }
    return changed;
  }

  void pour_all() {
    for (int32_t sweep = 0; sweep < kBalanceSweeps; ++sweep) {
      bool changed = false;
      for (int32_t i = 0; i < places.num_replicated(); ++i) changed |= pour_expert(places.step_order()[i]);
      if (!changed) return;
    }
  }

  // An expert's capacity grows with its places.
  int32_t shift(int32_t e) const {
    if (!(p.policy.alpha > 0.0) || std::isinf(p.policy.gamma)) return 0;
    const double base = p.policy.gamma * sums[0] / places.first()[p.policy.num_experts] * places.num_places(e);
    return pressure_shift(static_cast<double>(rows[e]), scaled_capacity(p.policy, base, p.modality[e], sums),
                          p.policy.alpha, p.policy.bucket_bits);
  }

  // Levels of the experts with a place on the rank, in 256ths of a row, each by the share that it has there.
  void add_levels(int32_t rank, std::vector<int64_t>& group, std::vector<int64_t>& own) const {
    for (int32_t e = 0; e < p.policy.num_experts; ++e) {
      int64_t until = 0, share_until = 0;
      for (int32_t i = places.first()[e]; i < places.first()[e + 1]; ++i) {
        until += p.quota[i];
        const int64_t end = rows[e] > 0 ? kShareOne * until / rows[e] : kShareOne;
        const int64_t share = end - share_until;
        share_until = end;
        if (places.rank()[i] != rank || share == 0) continue;
        for (int32_t cell = 0; cell < levels; ++cell) {
          const int32_t level = level_of(cell % buckets, p.shift[e], cell >= buckets, p.policy);
          group[level] += share * p.group[static_cast<int64_t>(e) * levels + cell];
          own[level] += share * p.own[static_cast<int64_t>(e) * levels + cell];
        }
      }
    }
  }

  int64_t text_rows(int32_t rank) const {
    int64_t total = 0;
    for (int32_t e = 0; e < p.policy.num_experts; ++e) {
      const int32_t first = places.first()[e], count = places.num_places(e);
      for (int32_t i = 0; i < count; ++i)
        if (places.rank()[first + i] == rank) total += rows_before(text[e], rows[e], p.quota + first, count, i);
    }
    return total;
  }

  // This source's limit on an exceeded rank; adds what is at stake there.
  void limit(int32_t rank, int32_t bound, int64_t& group_stake, int64_t& own_stake) {
    std::vector<int64_t> group(levels, 0), own(levels, 0);
    add_levels(rank, group, own);
    int32_t first = 0, end = levels;
    int64_t room = bound;
    if (p.policy.protect_text) {
      const int64_t of_text = text_rows(rank);
      if (of_text <= bound) {
        end = buckets, room = bound - of_text;  // all text stays, visual rows share what it leaves
      } else {
        first = buckets;  // no visual row stays
      }
    }
    const int64_t top = room * kShareOne;
    int64_t total = 0, own_total = 0;
    for (int32_t l = first; l < end; ++l) total += group[l], own_total += own[l];
    int32_t level = first - 1;
    int64_t kept = total > 0 ? top * own_total / total : 0;
    if (total > top) {
      int64_t above = 0;
      kept = 0;
      for (level = end - 1; above + group[level] <= top; --level) above += group[level], kept += own[level];
      kept += (top - above) * own[level] / group[level];
    }
    for (int32_t l = 0; l <= level; ++l) group_stake += group[l], own_stake += own[l];
    p.limits[rank] = {static_cast<int32_t>(kept / kShareOne), first, 0, bound};
  }

  void run() {
    split_evenly();
    pour_all();
    for (int32_t e = 0; e < p.policy.num_experts; ++e) p.shift[e] = shift(e);
    const int32_t bound = to_bound(p.policy.gamma * sums[0] / p.policy.num_ranks);
    int64_t group_stake = 0, own_stake = 0;
    for (int32_t r = 0; r < p.policy.num_ranks; ++r) {
      if (p.load[r] > bound) {
        limit(r, bound, group_stake, own_stake);
      } else {
        p.limits[r] = {kNotExceeded, 0, bound - p.load[r], bound};
      }
    }
    const bool reroutes = p.policy.reroute != Reroute::kNone && group_stake > 0;
    for (int32_t r = 0; r < p.policy.num_ranks; ++r) {
      int32_t& room = p.limits[r].room;
      room = reroutes ? static_cast<int32_t>(room * own_stake / group_stake) : 0;
    }
  }
};

}  // namespace

void replica_balance(const ReplicaBalanceParams& p) { Balance(p).run(); }

}  // namespace macs::cpu
