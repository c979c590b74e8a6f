// The plan in one call, or in two around an all-reduce, on CPU and CUDA: the bits of the operators one by one
// (operators.cpp), in few launches and allocations. What is returned is cut out of slabs.
#include <algorithm>
#include <vector>

#include "launch.h"

namespace macs {
namespace {

// Tensors side by side in one allocation, which lives as long as any of them.
class Slab {
 public:
  Slab(const Tensor& on, int64_t bytes) : memory_(at::empty({bytes}, on.options().dtype(at::kByte))) {}

  static int64_t room(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  Tensor take(at::ScalarType dtype, at::IntArrayRef sizes) {
    const auto type = c10::scalarTypeToTypeMeta(dtype);
    const auto itemsize = static_cast<int64_t>(type.itemsize());
    Tensor part = at::detail::make_tensor<at::TensorImpl>(at::TensorImpl::VIEW, c10::Storage(memory_.storage()),
                                                          memory_.key_set(), type);
    part.unsafeGetTensorImpl()->set_storage_offset(at_ / itemsize);
    part.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    at_ += room(c10::multiply_integers(sizes) * itemsize);
    TORCH_INTERNAL_ASSERT(at_ <= memory_.numel());
    return part;
  }

 private:
  static constexpr int64_t kAlignment = 256;
  Tensor memory_;
  int64_t at_ = 0;
};

// A pass's batch, checked and contiguous; `in` and `logits` point into what it holds.
struct PlanInput {
  Tensor hidden, ids, gates, segment, logits, selection;
  Placed placed;
  Policy policy;
  Assignments in;  // without a weight
  int64_t num_segments;
  bool scored;     // entropies are asked for, and there are visual tokens

  int64_t num_tokens() const { return in.num_tokens; }
  int64_t slots() const { return in.num_tokens * in.top_k; }
  int64_t cells() const { return histogram_size(policy); }
  int64_t exchanged() const { return placed.exchange_size(); }
};

PlanInput plan_input(const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
                     const Tensor& segment, int64_t num_segments, at::ArrayRef<double> packed,
                     const OptionalTensor& places) {
  PlanInput x = {.ids = topk_ids.contiguous(), .gates = topk_weights.contiguous(), .segment = segment.contiguous(),
                 .placed = Placed(packed, places, topk_ids, true), .num_segments = num_segments};
  x.policy = x.placed.policy;
  x.in = checked_routing(x.ids, x.gates, x.segment, x.policy);
  check_ids_in_range(x.ids, x.placed.num_ids());
  x.scored = x.policy.needs_entropy && num_segments > 0;
  if (x.scored) {
    check_hidden(hidden_states);
    TORCH_CHECK_VALUE(hidden_states.size(0) == x.num_tokens(), "hidden_states: got ", hidden_states.size(0),
                      " rows, expected ", x.num_tokens());
    check_device("hidden_states", hidden_states, x.ids);
    check_segments(x.segment, num_segments);
    x.hidden = hidden_states.contiguous();
  }
  return x;
}

void set_logits(PlanInput& x, const OptionalTensor& router_logits, const OptionalTensor& selection) {
  if (!router_logits.has_value() || x.policy.reroute == Reroute::kNone) return;
  x.logits = readable_logits(*router_logits);
  if (selection.has_value()) x.selection = selection->contiguous();
  check_like(x.logits, "router_logits", x.logits.scalar_type(), {x.num_tokens(), x.policy.num_experts}, x.ids);
}

EntropyWeightParams weight_params(const PlanInput& x, const float* entropy, float* weight) {
  return {x.scored ? entropy : nullptr, x.in.segment, weight, x.num_tokens(), x.scored ? x.num_segments : 0,
          x.policy.delta};
}

int64_t plan_workspace_bytes([[maybe_unused]] const PlanInput& x) {
#ifdef MACS_WITH_CUDA
  ClipApplyParams apply = {};
  apply.in = x.in;
  if (x.ids.is_cuda()) return cuda::plan_workspace_bytes(weight_params(x, nullptr, nullptr), apply, x.placed.places);
#endif
  return 0;
}

// Weights and histogram. entropy [T]: scratch; workspace [plan_workspace_bytes].
void count_batch(const PlanInput& x, const Tensor& entropy, const Tensor& weight, const Tensor& own,
                 [[maybe_unused]] const Tensor& workspace) {
  EntropyScoreParams score = {nullptr, x.in.segment, nullptr, x.num_tokens(), 0, DType::kBFloat16};
  if (x.scored) {
    score = {x.hidden.const_data_ptr(), x.in.segment, entropy.mutable_data_ptr<float>(), x.num_tokens(),
             x.hidden.size(1), float_dtype(x.hidden, "hidden_states")};
  }
  const EntropyWeightParams weigh = weight_params(x, score.entropy, weight.mutable_data_ptr<float>());
  LoadHistogramParams histogram = {x.in, own.mutable_data_ptr<int32_t>()};
  histogram.in.weight = weigh.weight;
#ifdef MACS_WITH_CUDA
  if (x.ids.is_cuda()) {
    return check_launch(
        cuda::launch_score_histogram(score, weigh, histogram, workspace.mutable_data_ptr(), stream_of(x.ids),
                                     x.placed.places),
        "score_histogram");
  }
#endif
  if (x.scored) cpu::entropy_score(score, kParallelFor);
  cpu::entropy_weight(weigh);
  cpu::load_histogram(histogram, x.placed.places);
}

// What a plan decides. counts and cut are kept by counters long after the pass.
struct PlanOutput {
  Tensor ids, weights, shift, cut, counts, rank_rows;  // the last only with places: [2, R], as routed and as balanced

  static int64_t routing_room(const PlanInput& x) {
    return Slab::room(x.slots() * x.ids.element_size()) + Slab::room(x.slots() * 4);
  }
  static int64_t kept_room(const PlanInput& x) {
    const int64_t experts = x.policy.num_experts;
    const int64_t of_places = x.placed.places.any() ? Slab::room(x.policy.num_ranks * 8) : 0;
    return Slab::room(experts * 4) + Slab::room(num_bounds(x.policy) * 16) +
           Slab::room(x.placed.num_counts() * experts * 8) + of_places;
  }
  static PlanOutput of(const PlanInput& x, Slab& routing, Slab& kept) {
    const int64_t experts = x.policy.num_experts;
    return {routing.take(x.ids.scalar_type(), x.ids.sizes()), routing.take(at::kFloat, x.ids.sizes()),
            kept.take(at::kInt, {experts}), kept.take(at::kInt, {num_bounds(x.policy), 4}),
            kept.take(at::kInt, {x.placed.num_counts(), experts, 2}),
            x.placed.places.any() ? kept.take(at::kInt, {2, x.policy.num_ranks}) : Tensor()};
  }
};

// Replicas, what is left over a bound, and what follows: on a CPU.
void balance_batch(const PlanInput& x, const ClipThresholdParams& cuts, const ClipApplyParams& apply,
                   const PlanOutput& out) {
  const Places& places = x.placed.places;
  const int32_t* exchanged = cuts.group + x.cells();
  auto* rank_rows = out.rank_rows.mutable_data_ptr<int32_t>();
  std::copy_n(exchanged, places.num_ranks, rank_rows);
  std::vector<int32_t> quota(places.num_physical);
  std::vector<RankLimit> limits(places.num_ranks);
  const Tensor chosen = at::empty_like(x.ids);
  cpu::replica_balance({cuts.own, cuts.group, cuts.modality, cuts.shift, quota.data(), rank_rows + places.num_ranks,
                        limits.data(), x.policy, places});
  cpu::replica_choose({apply.in, exchanged, cuts.shift, quota.data(), limits.data(), chosen.mutable_data_ptr(),
                       cuts.cut, places});
  cpu::clip_apply(apply, places, chosen.const_data_ptr());
}

// Cuts, and what follows from them.
void cut_batch(const PlanInput& x, const Tensor& own, const Tensor& group, const Tensor& modality, const Tensor& weight,
               [[maybe_unused]] const Tensor& workspace, const PlanOutput& out) {
  check_like(modality, "modality", at::kChar, {x.policy.num_experts}, x.ids);
  TORCH_CHECK_VALUE(modality.is_contiguous(), "modality: got strides ", modality.strides(), ", expected contiguous");
  const ClipThresholdParams threshold = {own.const_data_ptr<int32_t>(), group.const_data_ptr<int32_t>(),
                                         modality.const_data_ptr<int8_t>(), out.shift.mutable_data_ptr<int32_t>(),
                                         out.cut.mutable_data_ptr<int32_t>(), x.policy};
  ClipApplyParams apply = {};
  apply.in = x.in;
  apply.in.weight = weight.const_data_ptr<float>();
  if (x.logits.defined()) {
    apply.router_logits = x.logits.const_data_ptr();
    apply.logits_dtype = float_dtype(x.logits, "router_logits");
  }
  apply.selection = checked_selection(x.selection, x.num_tokens(), x.policy.num_experts, x.ids);
  apply.shift = threshold.shift, apply.cut = threshold.cut;
  apply.new_ids = out.ids.mutable_data_ptr();
  apply.new_weights = out.weights.mutable_data_ptr<float>();
  apply.counts = out.counts.mutable_data_ptr<int32_t>();
#ifdef MACS_WITH_CUDA
  if (x.ids.is_cuda()) {
    int32_t* const rank_rows = x.placed.places.any() ? out.rank_rows.mutable_data_ptr<int32_t>() : nullptr;
    return check_launch(cuda::launch_threshold_apply(threshold, apply, workspace.mutable_data_ptr(), stream_of(x.ids),
                                                     x.placed.places, rank_rows),
                        "threshold_apply");
  }
#endif
  if (x.placed.places.any()) return balance_batch(x, threshold, apply, out);
  cpu::clip_threshold(threshold);
  cpu::clip_apply(apply);
}

// As of `plan` before its exchange. group: a copy of own to be summed over the ranks, or own itself.
std::tuple<Tensor, Tensor, Tensor, Tensor> score_histogram(const Tensor& hidden_states, const Tensor& topk_ids,
                                                           const Tensor& topk_weights, const Tensor& segment,
                                                           int64_t num_segments, at::ArrayRef<double> policy,
                                                           bool exchanged, const OptionalTensor& places) {
  const PlanInput x = plan_input(hidden_states, topk_ids, topk_weights, segment, num_segments, policy, places);
  const DeviceGuard guard(x.ids.device());
  const int64_t tokens = Slab::room(x.num_tokens() * 4), cells = Slab::room(x.exchanged() * 4);
  const int64_t workspace_bytes = plan_workspace_bytes(x);
  Slab made(x.ids, tokens + cells), scratch(x.ids, tokens + Slab::room(workspace_bytes));
  const Tensor weight = made.take(at::kFloat, {x.num_tokens()}), own = made.take(at::kInt, {x.exchanged()});
  const Tensor workspace = scratch.take(at::kByte, {workspace_bytes});
  count_batch(x, scratch.take(at::kFloat, {x.num_tokens()}), weight, own, workspace);
  return {weight, own, exchanged ? own.clone() : own, workspace};
}

// As of `plan` behind its exchange.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> threshold_apply(
    const Tensor& own, const Tensor& group, const Tensor& modality, const Tensor& topk_ids, const Tensor& topk_weights,
    const Tensor& weight, const Tensor& segment, const OptionalTensor& router_logits, const Tensor& workspace,
    at::ArrayRef<double> policy, const OptionalTensor& places, const OptionalTensor& selection) {
  PlanInput x = plan_input({}, topk_ids, topk_weights, segment, 0, policy, places);
  set_logits(x, router_logits, selection);
  const DeviceGuard guard(x.ids.device());
  const Tensor o = own.contiguous(), g = group.contiguous(), w = weight.contiguous();
  check_like(o, "own", at::kInt, {x.exchanged()}, x.ids);
  check_like(g, "group", at::kInt, {x.exchanged()}, x.ids);
  check_like(w, "weight", at::kFloat, {x.num_tokens()}, x.ids);
  check_device("workspace", workspace, x.ids);
  TORCH_CHECK_VALUE(static_cast<int64_t>(workspace.nbytes()) >= plan_workspace_bytes(x), "workspace: got ",
                    workspace.nbytes(), " bytes, expected that of score_histogram for the same batch");
  Slab routing(x.ids, PlanOutput::routing_room(x)), kept(x.ids, PlanOutput::kept_room(x));
  const PlanOutput out = PlanOutput::of(x, routing, kept);
  cut_batch(x, o, g, modality, w, workspace, out);
  return {out.ids, out.weights, out.cut, out.counts, out.rank_rows};
}

// The whole plan. region: this rank's of the exchange over peers' memory, or none where this rank is the group.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plan(
    const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
    const OptionalTensor& router_logits, const Tensor& segment, int64_t num_segments, const Tensor& modality,
    at::ArrayRef<double> policy, const OptionalTensor& region, at::IntArrayRef peers, int64_t rank,
    int64_t timeout_ns, const OptionalTensor& places, const OptionalTensor& selection) {
  PlanInput x = plan_input(hidden_states, topk_ids, topk_weights, segment, num_segments, policy, places);
  set_logits(x, router_logits, selection);
  const DeviceGuard guard(x.ids.device());
  const int64_t tokens = Slab::room(x.num_tokens() * 4), cells = Slab::room(x.exchanged() * 4);
  const int64_t workspace_bytes = plan_workspace_bytes(x);
  // Counters keep what lies in `kept`, one slab for each of many dispatches.
  Slab routing(x.ids, PlanOutput::routing_room(x) + tokens + (region.has_value() ? cells : 0));
  Slab kept(x.ids, PlanOutput::kept_room(x) + cells), scratch(x.ids, tokens + Slab::room(workspace_bytes));
  const PlanOutput out = PlanOutput::of(x, routing, kept);
  const Tensor weight = routing.take(at::kFloat, {x.num_tokens()}), group = kept.take(at::kInt, {x.exchanged()});
  const Tensor own = region.has_value() ? routing.take(at::kInt, {x.exchanged()}) : group;
  const Tensor workspace = scratch.take(at::kByte, {workspace_bytes});
  count_batch(x, scratch.take(at::kFloat, {x.num_tokens()}), weight, own, workspace);
  if (region.has_value()) sum_over_peers(*region, peers, rank, own, group, timeout_ns);
  cut_batch(x, own, group, modality, weight, workspace, out);
  return {out.ids, out.weights, weight, own, group, out.cut, out.counts, out.rank_rows};
}

}  // namespace
}  // namespace macs

TORCH_LIBRARY_FRAGMENT(sglang_macs, m) {
  m.def(
      "score_histogram(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor segment, int num_segments, "
      "float[] policy, bool exchanged, Tensor? places=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "threshold_apply(Tensor own, Tensor group, Tensor modality, Tensor topk_ids, Tensor topk_weights, Tensor weight, "
      "Tensor segment, Tensor? router_logits, Tensor(a!) workspace, float[] policy, Tensor? places=None, "
      "Tensor? selection=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "plan(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor? router_logits, Tensor segment, "
      "int num_segments, Tensor modality, float[] policy, Tensor(a!)? region, int[] peers, int rank, int timeout_ns, "
      "Tensor? places=None, Tensor? selection=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sglang_macs, CPU, m) {
  m.impl("score_histogram", &macs::score_histogram);
  m.impl("threshold_apply", &macs::threshold_apply);
  m.impl("plan", &macs::plan);
}

#ifdef MACS_WITH_CUDA
TORCH_LIBRARY_IMPL(sglang_macs, CUDA, m) {
  m.impl("score_histogram", &macs::score_histogram);
  m.impl("threshold_apply", &macs::threshold_apply);
  m.impl("plan", &macs::plan);
}
#endif
