// Reading one assignment: its expert, units, bucket and modality (docs/design/method.md, 3).
#pragma once
#include "macs/level.h"

namespace macs::cpu {

inline int64_t expert_at(const Assignments& a, int64_t i) {
  return a.ids_are_i64 ? static_cast<const int64_t*>(a.topk_ids)[i] : static_cast<const int32_t*>(a.topk_ids)[i];
}

inline bool is_text(const Assignments& a, int64_t token) { return a.segment[token] < 0; }

inline int32_t bucket_at(const Assignments& a, int64_t i, int64_t token) {
  return bucket_of(importance_of(a.policy.importance, a.weight[token], a.topk_weights[i]), a.policy.bucket_bits);
}

inline int32_t units_at(const Assignments& a, int64_t token) { return load_units(a.policy.load, a.weight[token]); }

inline int32_t bound_of(Scope scope, int64_t expert, int32_t experts_per_rank) {
  return static_cast<int32_t>(scope == Scope::kExpert ? expert : expert / experts_per_rank);
}

}  // namespace macs::cpu
