// CPU launchers. They run on the caller's threads through `ParallelFor`, so that the binding decides whose pool that is.
#pragma once
#include "macs/bounded.h"
#include "macs/params.h"
#include "macs/replicas.h"

namespace macs::cpu {

// parallel_for(n, grain, body): body(begin, end) over disjoint ranges that cover [0, n).
struct ParallelFor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t n, int64_t grain, Body body, void* context);

  template <class F>
  void operator()(int64_t n, int64_t grain, F&& f) const {
    run(n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &f);
  }
};

void entropy_score(const EntropyScoreParams& p, const ParallelFor& parallel_for);
void entropy_weight(const EntropyWeightParams& p);
void load_histogram(const LoadHistogramParams& p, const Places& places = {});
void clip_threshold(const ClipThresholdParams& p);
void replica_balance(const ReplicaBalanceParams& p);
void replica_choose(const ReplicaChooseParams& p);
// chosen [T, K]: with places, what replica_choose gave; counts are then [kReplicaCounts, E, 2].
void clip_apply(const ClipApplyParams& p, const Places& places = {}, const void* chosen = nullptr);

void selection_score(const SelectionScoreParams& p, const ParallelFor& parallel_for);

void bounded_permute(const BoundedPermuteParams& p);
void bounded_gather(const BoundedGatherParams& p);

}  // namespace macs::cpu
