// The plan's operators, one by one: schemas, and what each is on a CPU, on CUDA and on meta tensors.
// docs/design/method.md defines them; plan.cpp has all of a plan in one call.
#include <string>

#include "definitions.h"
#include "launch.h"

namespace macs {
namespace {

// By device: `on` decides.

#ifdef MACS_WITH_CUDA

void run(const EntropyScoreParams& p, const Tensor& on) {
  if (!on.is_cuda()) return cpu::entropy_score(p, kParallelFor);
  const c10::cuda::CUDAGuard guard(on.device());
  check_launch(cuda::launch_entropy_score(p, stream_of(on)), "entropy_score");
}

void run(const EntropyWeightParams& p, const Tensor& on) {
  if (!on.is_cuda()) return cpu::entropy_weight(p);
  const c10::cuda::CUDAGuard guard(on.device());
  const Tensor workspace = workspace_on(on, cuda::entropy_weight_workspace_bytes(p));
  check_launch(cuda::launch_entropy_weight(p, workspace.data_ptr(), stream_of(on)), "entropy_weight");
}

void run(const LoadHistogramParams& p, const Places& places, const Tensor& on) {
  if (!on.is_cuda()) return cpu::load_histogram(p, places);
  const c10::cuda::CUDAGuard guard(on.device());
  check_launch(cuda::launch_load_histogram(p, stream_of(on)), "load_histogram");
}

void run(const ClipThresholdParams& p, const Tensor& on) {
  if (!on.is_cuda()) return cpu::clip_threshold(p);
  const c10::cuda::CUDAGuard guard(on.device());
  check_launch(cuda::launch_clip_threshold(p, stream_of(on)), "clip_threshold");
}

void run(const ClipApplyParams& p, const Places& places, const void* chosen, const Tensor& on) {
  if (!on.is_cuda()) return cpu::clip_apply(p, places, chosen);
  const c10::cuda::CUDAGuard guard(on.device());
  const Tensor workspace = workspace_on(on, cuda::clip_apply_workspace_bytes(p));
  check_launch(cuda::launch_clip_apply(p, workspace.data_ptr(), stream_of(on)), "clip_apply");
}

void run(const SelectionScoreParams& p, const Tensor& on) {
  if (!on.is_cuda()) return cpu::selection_score(p, kParallelFor);
  const c10::cuda::CUDAGuard guard(on.device());
  check_launch(cuda::launch_selection_score(p, stream_of(on)), "selection_score");
}

#else

void run(const EntropyScoreParams& p, const Tensor&) { cpu::entropy_score(p, kParallelFor); }
void run(const EntropyWeightParams& p, const Tensor&) { cpu::entropy_weight(p); }
void run(const LoadHistogramParams& p, const Places& places, const Tensor&) { cpu::load_histogram(p, places); }
void run(const ClipThresholdParams& p, const Tensor&) { cpu::clip_threshold(p); }
void run(const ClipApplyParams& p, const Places& places, const void* chosen, const Tensor&) {
  cpu::clip_apply(p, places, chosen);
}
void run(const SelectionScoreParams& p, const Tensor&) { cpu::selection_score(p, kParallelFor); }

#endif

void check_policy(at::ArrayRef<double> packed, int64_t num_physical) { checked_policy(packed, num_physical); }

Tensor entropy_score(const Tensor& hidden_states, const Tensor& segment) {
  check_hidden(hidden_states);
  check_like(segment, "segment", at::kInt, {hidden_states.size(0)}, hidden_states);
  const Tensor x = hidden_states.contiguous(), s = segment.contiguous();
  Tensor entropy = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  run(EntropyScoreParams{x.const_data_ptr(), s.const_data_ptr<int32_t>(), entropy.mutable_data_ptr<float>(), x.size(0),
                         x.size(1), float_dtype(x, "hidden_states")},
      x);
  return entropy;
}

Tensor entropy_weight(const Tensor& entropy, const Tensor& segment, int64_t num_segments, double delta) {
  TORCH_CHECK_VALUE(entropy.dim() == 1, "entropy: got shape ", entropy.sizes(), ", expected [T]");
  check_like(entropy, "entropy", at::kFloat, entropy.sizes(), entropy);
  check_like(segment, "segment", at::kInt, entropy.sizes(), entropy);
  const Tensor e = entropy.contiguous(), s = segment.contiguous();
  check_segments(s, num_segments);
  Tensor weight = at::empty_like(e);
  run(EntropyWeightParams{e.const_data_ptr<float>(), s.const_data_ptr<int32_t>(), weight.mutable_data_ptr<float>(),
                          e.size(0), num_segments, static_cast<float>(delta)},
      e);
  return weight;
}

Tensor load_histogram(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight, const Tensor& segment,
                      at::ArrayRef<double> packed, const OptionalTensor& places) {
  const Tensor ids = topk_ids.contiguous(), gates = topk_weights.contiguous(), w = weight.contiguous(),
               s = segment.contiguous();
  const Placed placed(packed, places, ids);
  LoadHistogramParams p{checked_assignments(ids, gates, w, s, placed.policy), nullptr};
  check_ids_in_range(ids, placed.num_ids());
  Tensor histogram = at::empty({placed.exchange_size()}, ids.options().dtype(at::kInt));
  p.histogram = histogram.mutable_data_ptr<int32_t>();
  run(p, placed.places, ids);
  return histogram;
}

std::tuple<Tensor, Tensor> clip_threshold(const Tensor& own, const Tensor& group, const Tensor& modality,
                                          at::ArrayRef<double> packed) {
  const Policy policy = checked_policy(packed);
  check_like(own, "own", at::kInt, {histogram_size(policy)}, own);
  check_like(group, "group", at::kInt, own.sizes(), own);
  check_like(modality, "modality", at::kChar, {policy.num_experts}, own);
  const Tensor o = own.contiguous(), g = group.contiguous(), m = modality.contiguous();
  Tensor shift = at::empty({policy.num_experts}, o.options());
  Tensor cut = at::empty({num_bounds(policy), 4}, o.options());
  run(ClipThresholdParams{o.const_data_ptr<int32_t>(), g.const_data_ptr<int32_t>(), m.const_data_ptr<int8_t>(),
                          shift.mutable_data_ptr<int32_t>(), cut.mutable_data_ptr<int32_t>(), policy},
      o);
  return {shift, cut};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> replica_balance(const Tensor& own, const Tensor& group,
                                                           const Tensor& modality, at::ArrayRef<double> packed,
                                                           const Tensor& places) {
  const Placed placed(packed, places, own);
  check_like(own, "own", at::kInt, {placed.exchange_size()}, own);
  check_like(group, "group", at::kInt, own.sizes(), own);
  check_like(modality, "modality", at::kChar, {placed.policy.num_experts}, own);
  const Tensor o = own.contiguous(), g = group.contiguous(), m = modality.contiguous();
  const int64_t num_ranks = placed.policy.num_ranks;
  Tensor shift = at::empty({placed.policy.num_experts}, o.options()), quota = at::empty({placed.num_ids()}, o.options());
  Tensor load = at::empty({num_ranks}, o.options()), limits = at::empty({num_ranks, 4}, o.options());
  cpu::replica_balance({o.const_data_ptr<int32_t>(), g.const_data_ptr<int32_t>(), m.const_data_ptr<int8_t>(),
                        shift.mutable_data_ptr<int32_t>(), quota.mutable_data_ptr<int32_t>(),
                        load.mutable_data_ptr<int32_t>(),
                        reinterpret_cast<RankLimit*>(limits.mutable_data_ptr<int32_t>()), placed.policy, placed.places});
  return {shift, quota, load, limits};
}

std::tuple<Tensor, Tensor> replica_choose(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                                          const Tensor& segment, const Tensor& group, const Tensor& shift,
                                          const Tensor& quota, const Tensor& limits, at::ArrayRef<double> packed,
                                          const Tensor& places) {
  const Tensor ids = topk_ids.contiguous(), gates = topk_weights.contiguous(), w = weight.contiguous(),
               seg = segment.contiguous(), g = group.contiguous(), sh = shift.contiguous(), q = quota.contiguous(),
               l = limits.contiguous();
  const Placed placed(packed, places, ids);
  const Policy& policy = placed.policy;
  check_ids_in_range(ids, placed.num_ids());
  check_like(g, "group", at::kInt, {placed.exchange_size()}, ids);
  check_like(sh, "shift", at::kInt, {policy.num_experts}, ids);
  check_like(q, "quota", at::kInt, {placed.num_ids()}, ids);
  check_like(l, "limits", at::kInt, {policy.num_ranks, 4}, ids);
  Tensor chosen = at::empty_like(ids), cut = at::empty({policy.num_ranks, 4}, g.options());
  cpu::replica_choose({checked_assignments(ids, gates, w, seg, policy),
                       g.const_data_ptr<int32_t>() + histogram_size(policy), sh.const_data_ptr<int32_t>(),
                       q.const_data_ptr<int32_t>(), reinterpret_cast<const RankLimit*>(l.const_data_ptr<int32_t>()),
                       chosen.mutable_data_ptr(), cut.mutable_data_ptr<int32_t>(), placed.places});
  return {chosen, cut};
}

void check_groups(int64_t num_experts, int64_t num_groups, int64_t topk_groups, bool biased) {
  TORCH_CHECK_VALUE(num_groups > 0 && num_experts % num_groups == 0, "num_groups: got ", num_groups, " of ", num_experts,
                    " experts, expected a divisor of the number of experts");
  TORCH_CHECK_VALUE(topk_groups > 0 && topk_groups <= num_groups, "topk_groups: got ", topk_groups, ", expected 1 to ",
                    num_groups);
  TORCH_CHECK_VALUE(!biased || topk_groups == num_groups || num_experts >= 2 * num_groups, "num_groups: got ", num_groups,
                    " of ", num_experts, " experts, expected two experts each where they are ranked with a bias");
}

Tensor selection_score(const Tensor& router_logits, const OptionalTensor& correction_bias, int64_t scoring,
                       int64_t num_groups, int64_t topk_groups) {
  TORCH_CHECK_VALUE(router_logits.dim() == 2 && router_logits.size(1) > 0, "router_logits: got shape ",
                    router_logits.sizes(), ", expected [T, E] with E > 0");
  const Tensor logits = readable_logits(router_logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  check_groups(num_experts, num_groups, topk_groups, correction_bias.has_value());
  Tensor bias;
  if (correction_bias.has_value()) {
    bias = correction_bias->contiguous();
    check_like(bias, "correction_bias", at::kFloat, {num_experts}, logits);
  }
  Tensor selection = at::empty(logits.sizes(), logits.options().dtype(at::kFloat));
  run(SelectionScoreParams{logits.const_data_ptr(), bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                           selection.mutable_data_ptr<float>(), num_tokens, static_cast<int32_t>(num_experts),
                           static_cast<int32_t>(num_groups), static_cast<int32_t>(topk_groups),
                           checked_enum<Scoring>(scoring, "scoring"), float_dtype(logits, "router_logits")},
      logits);
  return selection;
}

std::tuple<Tensor, Tensor, Tensor> clip_apply(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                                              const Tensor& segment, const OptionalTensor& router_logits,
                                              const Tensor& shift, const Tensor& cut, at::ArrayRef<double> packed,
                                              const OptionalTensor& places, const OptionalTensor& chosen,
                                              const OptionalTensor& selection) {
  const Tensor ids = topk_ids.contiguous(), gates = topk_weights.contiguous(), w = weight.contiguous(),
               seg = segment.contiguous(), sh = shift.contiguous(), c = cut.contiguous();
  const Placed placed(packed, places, ids);
  const Policy& policy = placed.policy;
  ClipApplyParams p{};
  p.in = checked_assignments(ids, gates, w, seg, policy);
  check_ids_in_range(ids, placed.num_ids());
  TORCH_CHECK_VALUE(places.has_value() == chosen.has_value(), "chosen: expected with places, and only then");
  const Tensor sent = chosen.has_value() ? chosen->contiguous() : ids;
  check_like(sent, "chosen", ids.scalar_type(), ids.sizes(), ids);
  check_ids_in_range(sent, placed.num_ids());
  check_like(sh, "shift", at::kInt, {policy.num_experts}, ids);
  check_like(c, "cut", at::kInt, {num_bounds(policy), 4}, ids);
  Tensor logits;
  if (router_logits.has_value()) {
    logits = router_logits->contiguous();
    check_like(logits, "router_logits", at::kFloat, {ids.size(0), policy.num_experts}, ids);
    p.router_logits = logits.const_data_ptr();
  }
  const Tensor order = selection.has_value() ? selection->contiguous() : Tensor();
  p.selection = checked_selection(order, ids.size(0), policy.num_experts, ids);
  Tensor new_ids = at::empty_like(ids), new_weights = at::empty_like(gates);
  Tensor counts = at::empty({placed.num_counts(), policy.num_experts, 2}, sh.options());
  p.shift = sh.const_data_ptr<int32_t>();
  p.cut = c.const_data_ptr<int32_t>();
  p.new_ids = new_ids.mutable_data_ptr();
  p.new_weights = new_weights.mutable_data_ptr<float>();
  p.counts = counts.mutable_data_ptr<int32_t>();
  run(p, placed.places, sent.const_data_ptr(), ids);
  return {new_ids, new_weights, counts};
}

// Shapes and dtypes only, so that the operators trace.

Tensor entropy_score_meta(const Tensor& hidden_states, const Tensor& segment) {
  check_device("segment", segment, hidden_states);
  return at::empty_symint({hidden_states.sym_size(0)}, hidden_states.options().dtype(at::kFloat));
}

Tensor entropy_weight_meta(const Tensor& entropy, const Tensor& segment, int64_t, double) {
  check_device("segment", segment, entropy);
  return at::empty_like(entropy);
}

Tensor load_histogram_meta(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                           const Tensor& segment, at::ArrayRef<double> policy, const OptionalTensor& places) {
  check_assignment_devices(topk_ids, topk_weights, weight, segment);
  return at::empty({Placed(policy, places, topk_ids).exchange_size()}, topk_ids.options().dtype(at::kInt));
}

std::tuple<Tensor, Tensor> clip_threshold_meta(const Tensor& own, const Tensor& group, const Tensor& modality,
                                               at::ArrayRef<double> packed) {
  check_device("group", group, own);
  check_device("modality", modality, own);
  const Policy policy = checked_policy(packed);
  return {at::empty({policy.num_experts}, own.options()), at::empty({num_bounds(policy), 4}, own.options())};
}

std::tuple<Tensor, Tensor, Tensor> clip_apply_meta(const Tensor& topk_ids, const Tensor& topk_weights,
                                                   const Tensor& weight, const Tensor& segment,
                                                   const OptionalTensor& router_logits, const Tensor& shift,
                                                   const Tensor& cut, at::ArrayRef<double> policy,
                                                   const OptionalTensor& places, const OptionalTensor& chosen,
                                                   const OptionalTensor& selection) {
  check_assignment_devices(topk_ids, topk_weights, weight, segment);
  if (selection.has_value()) check_device("selection", *selection, topk_ids);
  if (router_logits.has_value()) check_device("router_logits", *router_logits, topk_ids);
  if (chosen.has_value()) check_device("chosen", *chosen, topk_ids);
  check_device("shift", shift, topk_ids);
  check_device("cut", cut, topk_ids);
  const Placed placed(policy, places, topk_ids);
  return {at::empty_like(topk_ids), at::empty_like(topk_weights),
          at::empty({placed.num_counts(), placed.policy.num_experts, 2}, shift.options())};
}

Tensor selection_score_meta(const Tensor& router_logits, const OptionalTensor& correction_bias, int64_t, int64_t,
                            int64_t) {
  if (correction_bias.has_value()) check_device("correction_bias", *correction_bias, router_logits);
  return at::empty_symint(router_logits.sym_sizes(), router_logits.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> replica_balance_meta(const Tensor& own, const Tensor& group,
                                                                const Tensor& modality, at::ArrayRef<double> policy,
                                                                const Tensor& places) {
  check_device("group", group, own);
  check_device("modality", modality, own);
  const Placed placed(policy, places, own);
  const int64_t num_ranks = placed.policy.num_ranks;
  return {at::empty({placed.policy.num_experts}, own.options()), at::empty({placed.num_ids()}, own.options()),
          at::empty({num_ranks}, own.options()), at::empty({num_ranks, 4}, own.options())};
}

std::tuple<Tensor, Tensor> replica_choose_meta(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                                               const Tensor& segment, const Tensor& group, const Tensor& shift,
                                               const Tensor& quota, const Tensor& limits, at::ArrayRef<double> policy,
                                               const Tensor& places) {
  check_assignment_devices(topk_ids, topk_weights, weight, segment);
  for (const Tensor& x : {group, shift, quota, limits}) check_device("replica_choose", x, topk_ids);
  const Placed placed(policy, places, topk_ids);
  return {at::empty_like(topk_ids), at::empty({placed.policy.num_ranks, 4}, group.options())};
}

}  // namespace
}  // namespace macs

TORCH_LIBRARY_FRAGMENT(sglang_macs, m) {
  m.def("definitions() -> str", &macs::definitions);
  m.def("check_policy(float[] policy, int num_physical=0) -> ()", &macs::check_policy);
  m.def("entropy_score(Tensor hidden_states, Tensor segment) -> Tensor");
  m.def("entropy_weight(Tensor entropy, Tensor segment, int num_segments, float delta) -> Tensor");
  m.def(
      "load_histogram(Tensor topk_ids, Tensor topk_weights, Tensor weight, Tensor segment, float[] policy, "
      "Tensor? places=None) -> Tensor");
  m.def("clip_threshold(Tensor own, Tensor group, Tensor modality, float[] policy) -> (Tensor, Tensor)");
  m.def(
      "clip_apply(Tensor topk_ids, Tensor topk_weights, Tensor weight, Tensor segment, Tensor? router_logits, "
      "Tensor shift, Tensor cut, float[] policy, Tensor? places=None, Tensor? chosen=None, Tensor? selection=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "selection_score(Tensor router_logits, Tensor? correction_bias, int scoring, int num_groups, int topk_groups) "
      "-> Tensor");
  m.def(
      "replica_balance(Tensor own, Tensor group, Tensor modality, float[] policy, Tensor places) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "replica_choose(Tensor topk_ids, Tensor topk_weights, Tensor weight, Tensor segment, Tensor group, Tensor shift, "
      "Tensor quota, Tensor limits, float[] policy, Tensor places) -> (Tensor, Tensor)");
}

// Those that look at their tensors' device themselves.
static void implement_on_every_device(torch::Library& m) {
  m.impl("entropy_score", &macs::entropy_score);
  m.impl("entropy_weight", &macs::entropy_weight);
  m.impl("load_histogram", &macs::load_histogram);
  m.impl("clip_threshold", &macs::clip_threshold);
  m.impl("clip_apply", &macs::clip_apply);
  m.impl("selection_score", &macs::selection_score);
}

TORCH_LIBRARY_IMPL(sglang_macs, CPU, m) {
  implement_on_every_device(m);
  m.impl("replica_balance", &macs::replica_balance);
  m.impl("replica_choose", &macs::replica_choose);
}

#ifdef MACS_WITH_CUDA
TORCH_LIBRARY_IMPL(sglang_macs, CUDA, m) { implement_on_every_device(m); }
#endif

TORCH_LIBRARY_IMPL(sglang_macs, Meta, m) {
  m.impl("replica_balance", &macs::replica_balance_meta);
  m.impl("replica_choose", &macs::replica_choose_meta);
  m.impl("entropy_score", &macs::entropy_score_meta);
  m.impl("entropy_weight", &macs::entropy_weight_meta);
  m.impl("load_histogram", &macs::load_histogram_meta);
  m.impl("clip_threshold", &macs::clip_threshold_meta);
  m.impl("clip_apply", &macs::clip_apply_meta);
  m.impl("selection_score", &macs::selection_score_meta);
}
