// Clip, re-route, drop (docs/design/method.md, 5). One pass in (token, slot) order clips; rounds over the few clipped slots
// look for a new home; the rest is dropped. With replicas, ids in and out are physical and `expert` is logical.
#include <algorithm>
#include <cmath>
#include <vector>

#include "assignments.h"
#include "macs/cpu.h"

namespace macs::cpu {
namespace {

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// Of the scores of two experts of a token, from their logits.
double score_ratio(Scoring scoring, double to, double from) {
  switch (scoring) {
    case Scoring::kSoftmax: return std::exp(to - from);
    case Scoring::kSigmoid: return (1.0 + std::exp(-from)) / (1.0 + std::exp(-to));
    default: return std::sqrt(softplus(to) / softplus(from));
  }
}

struct Slot {
  int64_t token;
  int32_t slot, expert;
};

struct Apply {
  const ClipApplyParams& p;
  const Places& places;
  const void* chosen;  // [T, K] with places
  const Assignments& a = p.in;
  const Policy& policy = a.policy;
  const int32_t per_rank = policy.num_experts / policy.num_ranks;
  const int32_t num_bounds = macs::num_bounds(policy);
  std::vector<Slot> unplaced;                  // in (token, slot) order
  std::vector<int64_t> room, proposed, taken;  // [NB] units
  std::vector<int64_t> excluded;               // [E] token that may not use the expert, +1
  std::vector<int32_t> home;                   // [E] with places: the one with most room in this round

  Apply(const ClipApplyParams& params, const Places& of_layer, const void* chosen_ids)
      : p(params), places(of_layer), chosen(chosen_ids), room(num_bounds), proposed(num_bounds), taken(num_bounds),
        excluded(policy.num_experts, 0), home(places.any() ? policy.num_experts : 0) {}

  int64_t id_of(const void* ids, int64_t i) const {
    return a.ids_are_i64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
  }
  int64_t logical(int64_t id) const { return places.any() && id >= 0 ? places.logical()[id] : id; }
  int64_t expert_of(int64_t i) const { return logical(expert_at(a, i)); }

  // Of a candidate; its id then.
  int32_t bound(int64_t expert) const {
    return places.any() ? places.rank()[home[expert]] : bound_of(policy.scope, expert, per_rank);
  }
  int64_t id(int64_t expert) const { return places.any() ? places.physical()[home[expert]] : expert; }
  const int32_t* cut(int32_t n) const { return p.cut + static_cast<int64_t>(n) * 4; }

  void count(int kind, int64_t expert, bool text) { ++p.counts[(kind * policy.num_experts + expert) * 2 + text]; }

  void set(int64_t i, int64_t id, float weight) {
    if (a.ids_are_i64)
      static_cast<int64_t*>(p.new_ids)[i] = id;
    else
      static_cast<int32_t*>(p.new_ids)[i] = static_cast<int32_t>(id);
    p.new_weights[i] = weight;
  }

  void clip() {
    std::vector<int64_t> at_level(num_bounds, 0);  // units met at the cut level so far
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      const bool text = is_text(a, t);
      for (int32_t k = 0; k < a.top_k; ++k) {
        const int64_t i = t * a.top_k + k, routed = expert_at(a, i), sent = places.any() ? id_of(chosen, i) : routed;
        set(i, sent, a.topk_weights[i]);
        if (sent < 0) continue;
        const int64_t expert = logical(sent);
        const int32_t n = places.any() ? places.rank_of(static_cast<int32_t>(sent)) : bound(expert);
        const int32_t threshold = cut(n)[0], level = level_of(bucket_at(a, i, t), p.shift[expert], text, policy);
        const bool keep = level != threshold ? level > threshold : (at_level[n] += units_at(a, t)) <= cut(n)[1];
        count(keep ? 0 : 1, expert, text);
        if (keep && sent != routed) count(3, expert, text);
        if (keep) continue;
        set(i, -1, 0.0f);
        unplaced.push_back({t, k, static_cast<int32_t>(expert)});
      }
    }
  }

  // The token's experts, old and new, are closed to its clipped slots.
  void exclude(int64_t token) {
    for (int64_t i = token * a.top_k; i < (token + 1) * a.top_k; ++i) {
      if (const int64_t e = expert_of(i); e >= 0) excluded[e] = token + 1;
      if (const int64_t now = logical(id_of(p.new_ids, i)); now >= 0) excluded[now] = token + 1;
    }
  }

  // What the token's candidates are ordered by.
  const float* order(int64_t token) const {
    const auto* rows = p.selection != nullptr ? p.selection : static_cast<const float*>(p.router_logits);
    return rows + token * policy.num_experts;
  }

  // Best open expert for a slot; closed to the token's later slots of this round once it is taken.
  int64_t candidate(const Slot& s) {
    const float* score = order(s.token);
    const bool local = policy.reroute == Reroute::kLocal;
    const int64_t first = local ? s.expert / per_rank * per_rank : 0;
    const int64_t last = local ? first + per_rank : policy.num_experts;
    const int32_t units = units_at(a, s.token);
    int64_t best = -1;
    for (int64_t e = first; e < last; ++e)
      if (excluded[e] != s.token + 1 && std::isfinite(score[e]) && room[bound(e)] >= units &&
          (best < 0 || score[e] > score[best]))
        best = e;
    if (best >= 0) excluded[best] = s.token + 1;
    return best;
  }

  float rerouted_weight(int64_t token, int64_t expert) const {
    const float* logits = static_cast<const float*>(p.router_logits) + token * policy.num_experts;
    int64_t ref = -1;
    for (int64_t i = token * a.top_k; i < (token + 1) * a.top_k; ++i)
      if (expert_at(a, i) >= 0 && (ref < 0 || a.topk_weights[i] > a.topk_weights[ref])) ref = i;
    const float gate = a.topk_weights[ref];
    if (gate == 0.0f) return gate;  // what the router has rounded to nothing
    return static_cast<float>(gate * score_ratio(policy.scoring, logits[expert], logits[expert_of(ref)]));
  }

  // The lowest rank among equals.
  void find_homes() {
    for (size_t e = 0; e < home.size(); ++e) {
      home[e] = places.first()[e];
      for (int32_t i = home[e] + 1; i < places.first()[e + 1]; ++i)
        if (room[places.rank()[i]] > room[places.rank()[home[e]]]) home[e] = i;
    }
  }

  // All proposals see the room as it was when the round began; they are accepted in (token, slot) order.
  void reroute_round() {
    std::fill(proposed.begin(), proposed.end(), 0);
    std::fill(taken.begin(), taken.end(), 0);
    std::fill(excluded.begin(), excluded.end(), 0);
    find_homes();
    std::vector<Slot> still;
    int64_t token = -1;
    for (const Slot& s : unplaced) {
      if (s.token != token) exclude(token = s.token);
      const int64_t expert = candidate(s);
      const int32_t units = units_at(a, s.token);
      const int32_t n = expert < 0 ? 0 : bound(expert);
      if (expert < 0 || (proposed[n] += units) > room[n]) {
        still.push_back(s);
        continue;
      }
      taken[n] += units;
      set(s.token * a.top_k + s.slot, id(expert), rerouted_weight(s.token, expert));
      count(2, expert, is_text(a, s.token));
    }
    for (int32_t n = 0; n < num_bounds; ++n) room[n] -= taken[n];
    unplaced.swap(still);
  }

  void run() {
    const int64_t kinds = places.any() ? kReplicaCounts : 3;
    std::fill(p.counts, p.counts + kinds * 2 * policy.num_experts, 0);
    clip();
    if (policy.reroute == Reroute::kNone || p.router_logits == nullptr) return;
    for (int32_t n = 0; n < num_bounds; ++n) room[n] = cut(n)[2];
    for (int32_t round = 0; round < policy.reroute_rounds && !unplaced.empty(); ++round) reroute_round();
  }
};

}  // namespace

void clip_apply(const ClipApplyParams& p, const Places& places, const void* chosen) {
  Apply(p, places, chosen).run();
}

}  // namespace macs::cpu
