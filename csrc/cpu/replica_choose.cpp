// Which replica each assignment goes to, and where this source cuts on a rank that stays over its bound (docs/design/method.md,
// 3b, 4b).
#include <algorithm>
#include <vector>

#include "assignments.h"
#include "macs/cpu.h"

namespace macs::cpu {
namespace {

struct Choose {
  const ReplicaChooseParams& p;
  const Assignments& a = p.in;
  const Policy& policy = a.policy;
  const Places& places = p.places;
  const int32_t buckets = num_buckets(policy.bucket_bits), levels = 2 * buckets;
  std::vector<int64_t> next[2];          // [E] number of the next visual and text row of this source, of the group's
  std::vector<int64_t> rows;             // [E] of the group
  std::vector<std::vector<int32_t>> on;  // of each exceeded rank, this source's rows by level

  explicit Choose(const ReplicaChooseParams& params) : p(params), rows(policy.num_experts, 0), on(policy.num_ranks) {
    for (auto& of_modality : next) of_modality.assign(policy.num_experts, 0);
    for (int32_t e = 0; e < policy.num_experts; ++e)
      if (places.row()[e] >= 0) number(e);
    for (int32_t r = 0; r < policy.num_ranks; ++r)
      if (p.limits[r].limit != kNotExceeded) on[r].assign(levels, 0);
  }

  // Text before visual, and each in the order of the source ranks.
  void number(int32_t e) {
    const int32_t* of_source = p.exchanged + policy.num_ranks + 2 * places.row()[e];
    for (int32_t s = 0; s < policy.num_ranks; ++s, of_source += 2 * places.redundant()) {
      rows[e] += of_source[0] + of_source[1];
      next[0][e] += of_source[0];  // visual rows come behind the text of all
      if (s >= places.own_rank()) continue;
      next[1][e] += of_source[0];
      next[0][e] += of_source[1];
    }
  }

  void set(int64_t i, int64_t id) {
    if (a.ids_are_i64)
      static_cast<int64_t*>(p.chosen)[i] = id;
    else
      static_cast<int32_t*>(p.chosen)[i] = static_cast<int32_t>(id);
  }

  void choose() {
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      const bool text = is_text(a, t);
      for (int64_t i = t * a.top_k; i < (t + 1) * a.top_k; ++i) {
        const int64_t id = expert_at(a, i);
        set(i, -1);
        if (id < 0) continue;
        const int32_t e = places.logical()[id], first = places.first()[e];
        int32_t place = first;
        if (places.row()[e] >= 0) place += place_of(next[text][e]++, rows[e], p.quota + first, places.num_places(e));
        set(i, places.physical()[place]);
        auto& at = on[places.rank()[place]];
        if (!at.empty()) ++at[level_of(bucket_at(a, i, t), p.shift[e], text, policy)];
      }
    }
  }

  // The best rows up to the limit stay, counted on what is really sent.
  void cut(int32_t r) {
    const RankLimit& limits = p.limits[r];
    int32_t* out = p.cut + 4 * r;
    out[0] = -1, out[1] = 0, out[2] = limits.room, out[3] = limits.bound;
    if (limits.limit == kNotExceeded) return;
    const bool text_stays = policy.protect_text && limits.first == 0;
    int32_t above = 0, level = (text_stays ? buckets : levels) - 1;
    while (level >= limits.first && above + on[r][level] <= limits.limit) above += on[r][level--];
    out[0] = level;
    if (level >= limits.first) out[1] = limits.limit - above;
  }

  void run() {
    choose();
    for (int32_t r = 0; r < policy.num_ranks; ++r) cut(r);
  }
};

}  // namespace

void replica_choose(const ReplicaChooseParams& p) { Choose(p).run(); }

}  // namespace macs::cpu
