// The operators as torch sees them: checks, schemas, and the CPU, CUDA and Meta implementations under one name each.
// The only C++ file that includes torch. docs/design/method.md defines the operators.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "macs/bounded.h"
#include "macs/cpu.h"
#include "macs/fused.h"
#include "macs/level.h"
#include "macs/peer_all_reduce.h"
#include "macs/replicas.h"

#ifdef MACS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "macs/cuda.h"
#include "macs/peer_memory.h"
#endif

namespace macs {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Checks: what, got, expected -----------------------------------------------------------------------------------

// A CPU and a meta tensor together reach the Meta kernels: the device is the one thing that these must check, too.
void check_device(const char* name, const Tensor& x, const Tensor& beside) {
  TORCH_CHECK_VALUE(x.device() == beside.device(), name, ": got device ", x.device(), ", expected ", beside.device());
}

void check_like(const Tensor& x, const char* name, at::ScalarType dtype, at::IntArrayRef shape, const Tensor& beside) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, ": got dtype ", x.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": got shape ", x.sizes(), ", expected ", shape);
  check_device(name, x, beside);
}

DType float_dtype(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK_VALUE(false, name, ": got dtype ", x.scalar_type(), ", expected bfloat16, float16 or float32");
  }
}

template <class Enum>
Enum checked_enum(int64_t value, const char* name) {
  constexpr int kCount = count_of<Enum>();
  TORCH_CHECK_VALUE(value >= 0 && value < kCount, name, ": got ", value, ", expected 0 to ", kCount - 1);
  return static_cast<Enum>(value);
}

template <class Option>
void set_option(const char* name, double value, Option& option) {
  if constexpr (std::is_floating_point_v<Option>) {
    option = static_cast<Option>(value);
  } else {
    const bool whole = value >= INT32_MIN && value <= INT32_MAX && value == std::floor(value);
    TORCH_CHECK_VALUE(whole, name, ": got ", value, ", expected a whole number of 32 bits");
    if constexpr (std::is_enum_v<Option>) {
      option = checked_enum<Option>(static_cast<int64_t>(value), name);
    } else {
      option = static_cast<Option>(value);
    }
  }
}

void check_ranks(int64_t num_experts, int64_t num_ranks) {
  TORCH_CHECK_VALUE(num_experts > 0 && num_ranks > 0 && num_experts % num_ranks == 0, "num_ranks: got ", num_ranks,
                    " for ", num_experts, " experts, expected a divisor of the number of experts");
}

// From the numbers that Python packed (sglang_macs/ops/policy.py), one an option. num_physical: with replicas, what is
// divided among the ranks in place of the experts.
Policy checked_policy(at::ArrayRef<double> packed, int64_t num_physical = 0) {
  Policy p = {};
  size_t size = 0;
  for_each_option(p, [&](const char*, auto&) { ++size; });
  TORCH_CHECK_VALUE(packed.size() == size, "policy: got ", packed.size(), " numbers, expected ", size);
  size_t i = 0;
  for_each_option(p, [&](const char* name, auto& option) { set_option(name, packed[i++], option); });
  TORCH_CHECK_VALUE(p.num_experts > 0, "num_experts: got ", p.num_experts, ", expected at least 1");
  check_ranks(num_physical > 0 ? num_physical : p.num_experts, p.num_ranks);
  TORCH_CHECK_VALUE(p.bucket_bits >= kMinBucketBits && p.bucket_bits <= kMaxBucketBits, "bucket_bits: got ",
                    p.bucket_bits, ", expected ", kMinBucketBits, " to ", kMaxBucketBits);
  TORCH_CHECK_VALUE(p.gamma > 0.0, "gamma: got ", p.gamma, ", expected a number above 0");
  TORCH_CHECK_VALUE(p.rho >= 0.0 && p.rho < 2.0, "rho: got ", p.rho, ", expected 0 <= rho < 2");
  TORCH_CHECK_VALUE(p.alpha >= 0.0 && p.alpha <= 16.0, "alpha: got ", p.alpha, ", expected 0 <= alpha <= 16");
  TORCH_CHECK_VALUE(p.c_min >= 0.0 && std::isfinite(p.c_min), "c_min: got ", p.c_min,
                    ", expected a finite number >= 0");
  return p;
}

void check_policy(at::ArrayRef<double> packed) { checked_policy(packed); }

int64_t histogram_size(const Policy& p) {
  return static_cast<int64_t>(p.num_experts) * 2 * num_buckets(p.bucket_bits) + kNumSums;
}

// A layer's tables (macs/replicas.h) with the policy that goes with them; none: experts lie linearly. On a GPU only whole
// plans take them.
struct Placed {
  Tensor table;
  Policy policy;
  Places places = {};

  Placed(at::ArrayRef<double> packed, const OptionalTensor& given, const Tensor& beside, bool whole_plan = false) {
    if (!given.has_value()) {
      policy = checked_policy(packed);
      return;
    }
    table = given->contiguous();
    const int64_t size = table.sym_numel().guard_int(__FILE__, __LINE__);
    const int64_t num_physical = (size - Places::size(0)) / 5;
    TORCH_CHECK_VALUE(num_physical > 0 && size == Places::size(num_physical), "places: got ", size,
                      " numbers, expected the tables of a layer");
    TORCH_CHECK_VALUE(table.scalar_type() == at::kInt, "places: got dtype ", table.scalar_type(), ", expected Int");
    check_device("places", table, beside);
    policy = checked_policy(packed, num_physical);
    const bool fits = policy.scope == Scope::kRank && policy.load == Load::kRows && policy.reroute != Reroute::kLocal;
    TORCH_CHECK_VALUE(fits, "policy: got another scope, load or reroute, expected rank, rows, none or global with places");
    TORCH_CHECK_VALUE(num_physical >= policy.num_experts, "places: got ", num_physical, " physical experts, expected at "
                      "least ", policy.num_experts);
    TORCH_CHECK_VALUE(whole_plan || !table.is_cuda(), "places: got device ", table.device(), ", expected cpu: on a GPU "
                      "only whole plans take them");
    places = {table.is_meta() ? nullptr : table.const_data_ptr<int32_t>(), policy.num_experts, static_cast<int32_t>(num_physical), policy.num_ranks};
  }

  int64_t num_ids() const { return places.any() ? places.num_physical : policy.num_experts; }
  int64_t exchange_size() const { return histogram_size(policy) + replica_exchange_size(places); }
  int64_t num_counts() const { return places.any() ? kReplicaCounts : 3; }
};

// Without the weight, which a plan has yet to make.
Assignments checked_routing(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& segment,
                            const Policy& policy) {
  TORCH_CHECK_VALUE(topk_ids.dim() == 2, "topk_ids: got shape ", topk_ids.sizes(), ", expected [T, K]");
  const bool i64 = topk_ids.scalar_type() == at::kLong;
  TORCH_CHECK_VALUE(i64 || topk_ids.scalar_type() == at::kInt, "topk_ids: got dtype ", topk_ids.scalar_type(),
                    ", expected int32 or int64");
  check_like(topk_weights, "topk_weights", at::kFloat, topk_ids.sizes(), topk_ids);
  check_like(segment, "segment", at::kInt, {topk_ids.size(0)}, topk_ids);
  Assignments a{};
  a.topk_ids = topk_ids.const_data_ptr();
  a.topk_weights = topk_weights.const_data_ptr<float>();
  a.segment = segment.const_data_ptr<int32_t>();
  a.num_tokens = topk_ids.size(0);
  a.top_k = static_cast<int32_t>(topk_ids.size(1));
  a.ids_are_i64 = i64;
  a.policy = policy;
  return a;
}

Assignments checked_assignments(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                                const Tensor& segment, const Policy& policy) {
  Assignments a = checked_routing(topk_ids, topk_weights, segment, policy);
  check_like(weight, "weight", at::kFloat, {topk_ids.size(0)}, topk_ids);
  a.weight = weight.const_data_ptr<float>();
  return a;
}

// On a GPU these looks would be host synchronisations.
void check_ids_in_range(const Tensor& topk_ids, int64_t num_experts) {
  if (!topk_ids.is_cpu() || topk_ids.numel() == 0) return;
  const int64_t greatest = topk_ids.max().item<int64_t>();
  TORCH_CHECK_VALUE(greatest < num_experts, "topk_ids: got expert ", greatest, ", expected ids below ", num_experts);
}

void check_segments(const Tensor& segment, int64_t num_segments) {
  TORCH_CHECK_VALUE(num_segments >= 0, "num_segments: got ", num_segments, ", expected at least 0");
  if (!segment.is_cpu() || segment.numel() == 0) return;
  const auto greatest = segment.max().item<int32_t>();
  TORCH_CHECK_VALUE(greatest < num_segments, "num_segments: got ", num_segments, ", expected more than ", greatest,
                    ", the greatest segment");
}

void check_hidden(const Tensor& hidden_states) {
  TORCH_CHECK_VALUE(hidden_states.dim() == 2 && hidden_states.size(1) > 0, "hidden_states: got shape ",
                    hidden_states.sizes(), ", expected [T, H] with H > 0");
}

const cpu::ParallelFor kParallelFor{[](int64_t n, int64_t grain, cpu::ParallelFor::Body body, void* context) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

// ---- Launchers by device: `on` decides ------------------------------------------------------------------------------

#ifdef MACS_WITH_CUDA

// Launches go to the current device.
struct DeviceGuard {
  c10::cuda::OptionalCUDAGuard guard;
  explicit DeviceGuard(at::Device device) {
    if (device.is_cuda()) guard.set_device(device);
  }
};

void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, "sglang_macs::", op, ": ", cudaGetErrorString(error));
}

cudaStream_t stream_of(const Tensor& on) { return c10::cuda::getCurrentCUDAStream(on.get_device()); }

Tensor workspace_on(const Tensor& on, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, on.options().dtype(at::kByte));
}

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

void run(const BoundedPermuteParams& p, const Tensor& on) {
  if (!on.is_cuda()) return cpu::bounded_permute(p);
  const c10::cuda::CUDAGuard guard(on.device());
  check_launch(cuda::launch_bounded_permute(p, stream_of(on)), "bounded_permute");
}

void run(const BoundedGatherParams& p, const Tensor& on) {
  if (!on.is_cuda()) return cpu::bounded_gather(p);
  const c10::cuda::CUDAGuard guard(on.device());
  check_launch(cuda::launch_bounded_gather(p, stream_of(on)), "bounded_gather");
}

#else

struct DeviceGuard {
  explicit DeviceGuard(at::Device) {}
};

void run(const EntropyScoreParams& p, const Tensor&) { cpu::entropy_score(p, kParallelFor); }
void run(const EntropyWeightParams& p, const Tensor&) { cpu::entropy_weight(p); }
void run(const LoadHistogramParams& p, const Places& places, const Tensor&) { cpu::load_histogram(p, places); }
void run(const ClipThresholdParams& p, const Tensor&) { cpu::clip_threshold(p); }
void run(const ClipApplyParams& p, const Places& places, const void* chosen, const Tensor&) {
  cpu::clip_apply(p, places, chosen);
}
void run(const SelectionScoreParams& p, const Tensor&) { cpu::selection_score(p, kParallelFor); }
void run(const BoundedPermuteParams& p, const Tensor&) { cpu::bounded_permute(p); }
void run(const BoundedGatherParams& p, const Tensor&) { cpu::bounded_gather(p); }

#endif

// ---- The operators, one by one, CPU and CUDA --------------------------------------------------------------------------------

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

// Logits in any of the types that a router gives: a GPU converts what it reads.
Tensor readable_logits(const Tensor& router_logits) {
  const Tensor logits = router_logits.contiguous();
  float_dtype(logits, "router_logits");
  return logits.is_cpu() ? logits.to(at::kFloat) : logits;
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

// The tensor must outlive the launch.
const float* checked_selection(const Tensor& selection, int64_t num_tokens, int64_t num_experts, const Tensor& beside) {
  if (!selection.defined()) return nullptr;
  check_like(selection, "selection", at::kFloat, {num_tokens, num_experts}, beside);
  return selection.const_data_ptr<float>();
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

// ---- The plan in one call, or in two around an all-reduce, CPU and CUDA ----------------------------------------------
//
// The same bits as the five operators, in few launches and allocations: what is returned is cut out of slabs.

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

void sum_over_peers(const Tensor& region, at::IntArrayRef peers, int64_t rank, const Tensor& values, const Tensor& sum,
                    int64_t timeout_ns);

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

// ---- Bounded, CPU and CUDA: between a dispatch and a grouped GEMM (macs/bounded.h) --------------------------------------

// Kernels write it as it lies: an output cannot be made contiguous.
void check_output(const Tensor& x, const char* name, at::ScalarType dtype, at::IntArrayRef shape, const Tensor& beside) {
  check_like(x, name, dtype, shape, beside);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": got strides ", x.strides(), ", expected a contiguous tensor");
}

template <class Params>
void check_fits(const Params& p, const char* op) {
  TORCH_CHECK_VALUE(fits(p), op, ": got ", p.num_tokens, " tokens, top-", p.top_k, " and ", p.max_rows,
                    " rows, expected the sizes of macs/bounded.h");
}

int64_t bounded_workspace_size(int64_t num_tokens, int64_t num_experts) { return bounded_blocks(num_tokens) * num_experts; }

void bounded_permute(const Tensor& topk_ids, const Tensor& tokens, const OptionalTensor& scales, int64_t num_experts,
                     int64_t tile, const Tensor& place, const Tensor& expert_end, const Tensor& rows,
                     const OptionalTensor& row_scales, const Tensor& workspace, const Tensor& lost) {
  TORCH_CHECK_VALUE(topk_ids.dim() == 2, "topk_ids: got shape ", topk_ids.sizes(), ", expected [N, K]");
  TORCH_CHECK_VALUE(tokens.dim() == 2 && rows.dim() == 2, "tokens, rows: got shapes ", tokens.sizes(), ", ", rows.sizes(),
                    ", expected [N, H], [M, H]");
  TORCH_CHECK_VALUE(scales.has_value() == row_scales.has_value(), "row_scales: expected with scales, and only then");
  const int64_t num_tokens = topk_ids.size(0), max_rows = rows.size(0);
  const Tensor ids = topk_ids.contiguous(), from = tokens.contiguous();
  check_like(ids, "topk_ids", at::kLong, ids.sizes(), ids);
  check_like(from, "tokens", rows.scalar_type(), {num_tokens, rows.size(1)}, ids);
  check_output(rows, "rows", rows.scalar_type(), rows.sizes(), ids);
  check_output(place, "place", at::kInt, ids.sizes(), ids);
  check_output(expert_end, "expert_end", at::kInt, {num_experts}, ids);
  check_output(workspace, "workspace", at::kInt, {bounded_workspace_size(num_tokens, num_experts)}, ids);
  check_output(lost, "lost", at::kInt, {1}, ids);
  BoundedPermuteParams p = {};
  Tensor from_scales;
  if (scales.has_value()) {
    TORCH_CHECK_VALUE(scales->dim() == 2, "scales: got shape ", scales->sizes(), ", expected [N, S]");
    from_scales = scales->contiguous();
    check_like(from_scales, "scales", at::kFloat, {num_tokens, scales->size(1)}, ids);
    check_output(*row_scales, "row_scales", at::kFloat, {scales->size(1), max_rows}, ids);
    p.scales = from_scales.const_data_ptr<float>();
    p.row_scales = row_scales->mutable_data_ptr<float>();
    p.num_scales = static_cast<int32_t>(scales->size(1));
  }
  p.topk_ids = ids.const_data_ptr<int64_t>();
  p.tokens = from.const_data_ptr();
  p.place = place.mutable_data_ptr<int32_t>();
  p.expert_end = expert_end.mutable_data_ptr<int32_t>();
  p.rows = rows.mutable_data_ptr();
  p.counts = workspace.mutable_data_ptr<int32_t>();
  p.lost = lost.mutable_data_ptr<int32_t>();
  p.num_tokens = num_tokens, p.max_rows = max_rows, p.row_bytes = rows.size(1) * rows.element_size();
  p.top_k = static_cast<int32_t>(ids.size(1)), p.num_experts = static_cast<int32_t>(num_experts);
  p.tile = static_cast<int32_t>(tile);
  check_fits(p, "bounded_permute");
  run(p, ids);
}

void bounded_gather(const Tensor& outputs, const Tensor& place, const Tensor& weights, const Tensor& tokens) {
  TORCH_CHECK_VALUE(outputs.dim() == 2 && place.dim() == 2, "outputs, place: got shapes ", outputs.sizes(), ", ",
                    place.sizes(), ", expected [M, H], [N, K]");
  const Tensor rows = outputs.contiguous(), at_rows = place.contiguous(), gates = weights.contiguous();
  check_like(rows, "outputs", at::kBFloat16, rows.sizes(), place);
  check_like(at_rows, "place", at::kInt, place.sizes(), place);
  check_like(gates, "weights", at::kFloat, place.sizes(), place);
  check_output(tokens, "tokens", at::kBFloat16, {place.size(0), rows.size(1)}, place);
  BoundedGatherParams p = {};
  p.outputs = rows.const_data_ptr();
  p.place = at_rows.const_data_ptr<int32_t>();
  p.weights = gates.const_data_ptr<float>();
  p.tokens = tokens.mutable_data_ptr();
  p.num_tokens = place.size(0), p.max_rows = rows.size(0), p.hidden_size = rows.size(1);
  p.top_k = static_cast<int32_t>(place.size(1));
  check_fits(p, "bounded_gather");
  run(p, place);
}

// ---- The fused dispatch and combine (macs/fused.h) ------------------------------------------------------------------

// The fields of FusedShape in order: what a region looks like.
FusedShape checked_shape(at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(shape.size() == 10, "shape: got ", shape.size(), " numbers, expected the 10 of FusedShape");
  const auto at = [&](size_t i) { return static_cast<int32_t>(shape[i]); };
  const FusedShape s = {at(0), at(1), at(2), at(3), at(4), at(5), checked_enum<RowFormat>(shape[6], "format"),
                        at(7), at(8), at(9)};
  check_ranks(s.num_experts, s.num_ranks);
  TORCH_CHECK_VALUE(s.num_ranks <= kMaxPeers, "num_ranks: got ", s.num_ranks, ", expected at most ", kMaxPeers);
  return s;
}

// Offsets in the order of FusedLayout, the last one the bytes of the whole.
std::vector<int64_t> fused_layout_of(at::IntArrayRef shape) {
  const FusedLayout layout = fused_layout(checked_shape(shape));
  const int64_t* const first = &layout.flags;
  static_assert(sizeof(FusedLayout) % sizeof(int64_t) == 0);
  return {first, first + sizeof(FusedLayout) / sizeof(int64_t)};
}

void check_peers(int64_t num_ranks) {
  TORCH_CHECK_VALUE(num_ranks >= 1 && num_ranks <= kMaxPeers, "num_ranks: got ", num_ranks, ", expected 1 to ", kMaxPeers);
}

// Offsets in the order of PeerReduceLayout, the last one the bytes of the whole.
std::vector<int64_t> peer_reduce_layout_of(int64_t num_ranks, int64_t size) {
  check_peers(num_ranks);
  const PeerReduceLayout layout = peer_reduce_layout(num_ranks, size);
  return {layout.status, layout.epochs, layout.inbox, layout.bytes};
}

#ifdef MACS_WITH_CUDA

// Zero-filled memory of the current device that other processes can map, and the handle [64] u8 (host) that they open.
std::tuple<Tensor, Tensor> allocate_shared(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes > 0, "bytes: got ", bytes, ", expected more than 0");
  void* memory = nullptr;
  Tensor handle = at::empty({static_cast<int64_t>(cuda::kShareHandleBytes)}, at::kByte);
  check_launch(cuda::allocate_shared(bytes, &memory, handle.mutable_data_ptr()), "allocate_shared");
  const auto device = at::Device(at::kCUDA, c10::cuda::current_device());
  const auto release = [](void* of) { cuda::free_shared(of); };
  return {at::from_blob(memory, {bytes}, release, at::TensorOptions().dtype(at::kByte).device(device)), handle};
}

// Address of another process's memory as the current device sees it.
int64_t open_shared(const Tensor& handle) {
  check_like(handle, "handle", at::kByte, {static_cast<int64_t>(cuda::kShareHandleBytes)}, handle);
  TORCH_CHECK_VALUE(handle.is_cpu(), "handle: got one on ", handle.device(), ", expected it on the host");
  void* memory = nullptr;
  check_launch(cuda::open_shared(handle.const_data_ptr(), &memory), "open_shared");
  return reinterpret_cast<int64_t>(memory);
}

void close_shared(int64_t address) {
  check_launch(cuda::close_shared(reinterpret_cast<void*>(address)), "close_shared");
}

// Every rank has a device of its own, as far as is known here: a rank may share one under MPS, where this costs little.
bool ranks_are_apart(const FusedShape& shape) { return shape.num_ranks > 1; }

// Every rank's region as this device sees it: the own one is the tensor.
void set_regions(char* (&regions)[kMaxPeers], const Tensor& region, at::IntArrayRef peers, int64_t rank) {
  const auto num_ranks = static_cast<int64_t>(peers.size());
  TORCH_CHECK_VALUE(rank >= 0 && rank < num_ranks, "rank: got ", rank, ", expected below ", num_ranks);
  for (int64_t peer = 0; peer < num_ranks; ++peer) regions[peer] = reinterpret_cast<char*>(peers[peer]);
  regions[rank] = static_cast<char*>(region.mutable_data_ptr());
}

// A rank's part, as far as dispatch and combine have it in common.
FusedRank fused_rank(const Tensor& region, at::IntArrayRef peers, int64_t rank, const FusedShape& shape) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(peers.size()) == shape.num_ranks, "peers: got ", peers.size(),
                    " addresses, expected ", shape.num_ranks);
  TORCH_CHECK_VALUE(region.is_cuda() && region.nbytes() >= static_cast<size_t>(fused_layout(shape).bytes), "region: got ",
                    region.nbytes(), " bytes on ", region.device(), ", expected at least ", fused_layout(shape).bytes,
                    " on a GPU");
  FusedRank me = {};
  set_regions(me.region, region, peers, rank);
  me.rank = static_cast<int32_t>(rank);
  return me;
}

void check_ids(const Tensor& ids, const FusedShape& shape) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(1) == shape.top_k && ids.size(0) <= shape.max_tokens, "topk_ids: got shape ",
                    ids.sizes(), ", expected at most [", shape.max_tokens, ", ", shape.top_k, "]");
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, "topk_ids: got dtype ",
                    ids.scalar_type(), ", expected int32 or int64");
}

void check_topk(const Tensor& ids, const Tensor& weights, const FusedShape& shape) {
  check_ids(ids, shape);
  check_like(weights, "topk_weights", at::kFloat, ids.sizes(), ids);
}

// What every launch of a dispatch is told; the caller adds the phase and the batch.
FusedDispatchParams dispatch_params(const Tensor& region, at::IntArrayRef peers, int64_t rank, at::IntArrayRef shape,
                                    int64_t timeout_ns, int64_t layer) {
  FusedDispatchParams p = {};
  p.shape = checked_shape(shape);
  p.layout = fused_layout(p.shape);
  p.one = fused_rank(region, peers, rank, p.shape);
  p.scales_with_rows = ranks_are_apart(p.shape);
  p.timeout_ns = static_cast<uint64_t>(timeout_ns);
  p.layer = static_cast<int32_t>(layer);
  p.launched = 1;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_dispatch(
    const Tensor& region, at::IntArrayRef peers, int64_t rank, at::IntArrayRef shape, const Tensor& hidden_states,
    const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& segment, const OptionalTensor& router_logits,
    const Tensor& modality, at::ArrayRef<double> policy, int64_t num_segments, int64_t phase, int64_t timeout_ns,
    int64_t layer) {
  FusedDispatchParams p = dispatch_params(region, peers, rank, shape, timeout_ns, layer);
  const Tensor x = hidden_states.contiguous(), ids = topk_ids.contiguous(), gates = topk_weights.contiguous(),
               seg = segment.contiguous(), m = modality.contiguous();
  check_topk(ids, gates, p.shape);
  check_like(x, "hidden_states", at::kBFloat16, {ids.size(0), p.shape.hidden_size}, region);
  check_like(seg, "segment", at::kInt, {ids.size(0)}, region);
  check_like(m, "modality", at::kChar, {p.shape.num_experts}, region);
  check_device("topk_ids", ids, region);
  Tensor logits;
  if (router_logits.has_value()) {
    logits = router_logits->contiguous();
    check_like(logits, "router_logits", at::kFloat, {ids.size(0), p.shape.num_experts}, region);
    p.one.router_logits = logits.const_data_ptr<float>();
  }
  p.policy = checked_policy(policy);
  p.phase = checked_enum<Phase>(phase, "phase");
  p.num_segments = static_cast<int32_t>(num_segments);
  p.ids_are_i64 = ids.scalar_type() == at::kLong;
  p.same_device = !ranks_are_apart(p.shape);
  const auto i32 = region.options().dtype(at::kInt);
  Tensor new_ids = at::empty_like(ids), new_weights = at::empty_like(gates);
  Tensor weight = at::empty({ids.size(0)}, gates.options());
  Tensor cut = at::empty({num_bounds(p.policy), 4}, i32);
  Tensor counts = at::empty({3, p.shape.num_experts, 2}, i32), sums = at::empty({kNumSums}, i32);
  p.modality = m.const_data_ptr<int8_t>();
  p.one.hidden_states = x.const_data_ptr();
  p.one.topk_ids = ids.const_data_ptr();
  p.one.topk_weights = gates.const_data_ptr<float>();
  p.one.segment = seg.const_data_ptr<int32_t>();
  p.one.new_ids = new_ids.mutable_data_ptr();
  p.one.new_weights = new_weights.mutable_data_ptr<float>();
  p.one.weight = weight.mutable_data_ptr<float>();
  p.one.counts = counts.mutable_data_ptr<int32_t>();
  p.one.cut = cut.mutable_data_ptr<int32_t>();
  p.one.sums = sums.mutable_data_ptr<int32_t>();
  p.one.num_tokens = static_cast<int32_t>(ids.size(0));
  const c10::cuda::CUDAGuard guard(region.device());
  check_launch(cuda::launch_fused_dispatch(p, stream_of(region)), "fused_dispatch");
  return {new_ids, new_weights, weight, cut, counts, sums};
}

// Every row as it is routed.
void fused_carry(const Tensor& region, at::IntArrayRef peers, int64_t rank, at::IntArrayRef shape,
                 const Tensor& hidden_states, const Tensor& topk_ids, int64_t phase, int64_t timeout_ns, int64_t layer) {
  FusedDispatchParams p = dispatch_params(region, peers, rank, shape, timeout_ns, layer);
  const Tensor x = hidden_states.contiguous(), ids = topk_ids.contiguous();
  check_ids(ids, p.shape);
  check_like(x, "hidden_states", at::kBFloat16, {ids.size(0), p.shape.hidden_size}, region);
  check_device("topk_ids", ids, region);
  p.phase = checked_enum<Phase>(phase, "phase");
  p.ids_are_i64 = ids.scalar_type() == at::kLong;
  p.same_device = !ranks_are_apart(p.shape);
  p.one.hidden_states = x.const_data_ptr();
  p.one.topk_ids = ids.const_data_ptr();
  p.one.num_tokens = static_cast<int32_t>(ids.size(0));
  const c10::cuda::CUDAGuard guard(region.device());
  check_launch(cuda::launch_fused_carry(p, stream_of(region)), "fused_carry");
}

// The rest of a dispatch that was only sent: behind it every rank's rows are there.
void fused_receive(const Tensor& region, at::IntArrayRef peers, int64_t rank, at::IntArrayRef shape,
                   int64_t timeout_ns, int64_t layer) {
  FusedDispatchParams p = dispatch_params(region, peers, rank, shape, timeout_ns, layer);
  p.phase = Phase::kReceive;
  p.policy.bucket_bits = kMaxBucketBits;  // of no meaning here
  const c10::cuda::CUDAGuard guard(region.device());
  check_launch(cuda::launch_fused_dispatch(p, stream_of(region)), "fused_receive");
}

Tensor fused_combine(const Tensor& region, at::IntArrayRef peers, int64_t rank, at::IntArrayRef shape,
                     const Tensor& topk_ids, const Tensor& topk_weights, const OptionalTensor& outputs, int64_t phase,
                     int64_t timeout_ns, int64_t layer) {
  FusedCombineParams p = {};
  p.shape = checked_shape(shape);
  p.layout = fused_layout(p.shape);
  p.one = fused_rank(region, peers, rank, p.shape);
  const Tensor ids = topk_ids.contiguous(), gates = topk_weights.contiguous();
  check_topk(ids, gates, p.shape);
  check_device("topk_ids", ids, region);
  Tensor rows;
  if (outputs.has_value()) {
    rows = outputs->contiguous().view({-1, p.shape.hidden_size});
    check_like(rows, "outputs", at::kBFloat16, {p.shape.max_rows, p.shape.hidden_size}, region);
    p.one.outputs = rows.const_data_ptr();
  }
  Tensor combined = at::empty({ids.size(0), p.shape.hidden_size}, region.options().dtype(at::kBFloat16));
  p.one.new_ids = const_cast<void*>(ids.const_data_ptr());  // read here, written by dispatch
  p.one.new_weights = const_cast<float*>(gates.const_data_ptr<float>());
  p.one.combined = combined.mutable_data_ptr();
  p.one.num_tokens = static_cast<int32_t>(ids.size(0));
  p.ids_are_i64 = ids.scalar_type() == at::kLong;
  p.same_device = !ranks_are_apart(p.shape);
  p.phase = checked_enum<Phase>(phase, "phase");
  p.timeout_ns = static_cast<uint64_t>(timeout_ns);
  p.layer = static_cast<int32_t>(layer);
  p.launched = 1;
  const c10::cuda::CUDAGuard guard(region.device());
  check_launch(cuda::launch_fused_combine(p, stream_of(region)), "fused_combine");
  return combined;
}

void sum_over_peers(const Tensor& region, at::IntArrayRef peers, int64_t rank, const Tensor& values, const Tensor& sum,
                    int64_t timeout_ns) {
  const auto num_ranks = static_cast<int64_t>(peers.size());
  check_peers(num_ranks);
  check_like(values, "values", at::kInt, {values.numel()}, region);
  PeerReduceParams p = {};
  p.layout = peer_reduce_layout(num_ranks, values.numel());
  TORCH_CHECK_VALUE(region.is_cuda() && static_cast<int64_t>(region.nbytes()) == p.layout.bytes, "region: got ",
                    region.nbytes(), " bytes on ", region.device(), ", expected ", p.layout.bytes, " for sums of ",
                    values.numel(), " on a GPU");
  set_regions(p.region, region, peers, rank);
  p.values = values.const_data_ptr<int32_t>();
  p.sum = sum.mutable_data_ptr<int32_t>();
  p.size = values.numel();
  p.num_ranks = static_cast<int32_t>(num_ranks), p.rank = static_cast<int32_t>(rank);
  p.timeout_ns = static_cast<uint64_t>(timeout_ns);
  check_launch(cuda::launch_peer_all_reduce(p, stream_of(region)), "peer_all_reduce");
}

// Sums in place.
void peer_all_reduce(const Tensor& region, at::IntArrayRef peers, int64_t rank, const Tensor& values, int64_t timeout_ns) {
  const DeviceGuard guard(region.device());
  sum_over_peers(region, peers, rank, values, values, timeout_ns);
}

#else

void sum_over_peers(const Tensor& region, at::IntArrayRef, int64_t, const Tensor&, const Tensor&, int64_t) {
  TORCH_CHECK_VALUE(false, "region: got one on ", region.device(), ", expected none: this build has no CUDA kernels");
}

#endif

// ---- What Python would else repeat ----------------------------------------------------------------------------------

std::string quoted(std::string_view word) { return '"' + std::string(word) + '"'; }

// A list of JSON from words with commas between them.
std::string list_of(std::string_view words) {
  std::string list = "[";
  for (size_t end; (end = words.find(',')) != std::string_view::npos; words.remove_prefix(end + 1)) {
    list += quoted(words.substr(0, end)) + ",";
  }
  return list + quoted(words) + "]";
}

template <class Option>
const char* kind_of() {
  if (std::is_enum_v<Option>) return "choice";
  if (std::is_same_v<Option, bool>) return "bool";
  return std::is_integral_v<Option> ? "int" : "float";
}

// JSON: the options of a policy and their kinds, in the order in which they are packed; names of choices; limits.
std::string definitions() {
  std::string out = "{\"policy\":{";
  const char* separator = "";
  const Policy policy = {};
  for_each_option(policy, [&](const char* name, const auto& option) {
    out += separator + quoted(name) + ":" + quoted(kind_of<std::remove_cvref_t<decltype(option)>>());
    separator = ",";
  });
  out += "},\"names\":{";
  for_each_option(policy, [&](const char* name, const auto& option) {
    using Option = std::remove_cvref_t<decltype(option)>;
    if constexpr (std::is_enum_v<Option>) out += quoted(name) + ":" + list_of(kNames<Option>) + ",";
  });
  out += "\"format\":" + list_of(kNames<RowFormat>) + ",\"phase\":" + list_of(kNames<Phase>) +
         ",\"fault\":" + list_of(kNames<Fault>) + "},\"limits\":{";
  const std::pair<const char*, int64_t> limits[] = {
      {"weight_one", kWeightOne},
      {"num_sums", kNumSums},
      {"min_buckets", num_buckets(kMinBucketBits)},
      {"max_buckets", num_buckets(kMaxBucketBits)},
      {"peers", kMaxPeers},
      {"fused_experts", kMaxFusedExperts},
      {"fused_top_k", kMaxFusedTopK},
      {"fused_tokens", kMaxFusedTokens},
      {"fused_slots", kMaxFusedSlots},
      {"fused_reroute_rounds", kMaxFusedRerouteRounds},
      {"fused_min_hidden", kMinFusedHidden},
      {"fused_max_hidden", kMaxFusedHidden},
      {"fused_hidden_step", kFusedHiddenStep},
  };
  separator = "";
  for (const auto& [name, value] : limits) {
    out += separator + quoted(name) + ":" + std::to_string(value);
    separator = ",";
  }
  return out + "}}";
}

// ---- Meta: shapes and dtypes only, so that the operators trace ------------------------------------------------------

Tensor entropy_score_meta(const Tensor& hidden_states, const Tensor& segment) {
  check_device("segment", segment, hidden_states);
  return at::empty_symint({hidden_states.sym_size(0)}, hidden_states.options().dtype(at::kFloat));
}

Tensor entropy_weight_meta(const Tensor& entropy, const Tensor& segment, int64_t, double) {
  check_device("segment", segment, entropy);
  return at::empty_like(entropy);
}

void check_assignment_devices(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                              const Tensor& segment) {
  check_device("topk_weights", topk_weights, topk_ids);
  check_device("weight", weight, topk_ids);
  check_device("segment", segment, topk_ids);
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

Tensor selection_score_meta(const Tensor& router_logits, const OptionalTensor& correction_bias, int64_t, int64_t,
                            int64_t) {
  if (correction_bias.has_value()) check_device("correction_bias", *correction_bias, router_logits);
  return at::empty_symint(router_logits.sym_sizes(), router_logits.options().dtype(at::kFloat));
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_dispatch_meta(
    const Tensor& region, at::IntArrayRef, int64_t, at::IntArrayRef, const Tensor& hidden_states,
    const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& segment, const OptionalTensor& router_logits,
    const Tensor&, at::ArrayRef<double> packed, int64_t, int64_t, int64_t, int64_t) {
  check_device("hidden_states", hidden_states, region);
  check_assignment_devices(topk_ids, topk_weights, topk_weights, segment);
  if (router_logits.has_value()) check_device("router_logits", *router_logits, topk_ids);
  const Policy policy = checked_policy(packed);
  const auto i32 = region.options().dtype(at::kInt);
  return {at::empty_like(topk_ids),
          at::empty_like(topk_weights),
          at::empty_symint({topk_ids.sym_size(0)}, topk_weights.options()),
          at::empty({num_bounds(policy), 4}, i32),
          at::empty({3, policy.num_experts, 2}, i32),
          at::empty({kNumSums}, i32)};
}

void fused_carry_meta(const Tensor& region, at::IntArrayRef, int64_t, at::IntArrayRef, const Tensor& hidden_states,
                      const Tensor& topk_ids, int64_t, int64_t, int64_t) {
  check_device("hidden_states", hidden_states, region);
  check_device("topk_ids", topk_ids, region);
}

void fused_receive_meta(const Tensor&, at::IntArrayRef, int64_t, at::IntArrayRef, int64_t, int64_t) {}

Tensor fused_combine_meta(const Tensor& region, at::IntArrayRef, int64_t, at::IntArrayRef shape, const Tensor& topk_ids,
                          const Tensor&, const OptionalTensor&, int64_t, int64_t, int64_t) {
  return at::empty_symint({topk_ids.sym_size(0), c10::SymInt(checked_shape(shape).hidden_size)},
                          region.options().dtype(at::kBFloat16));
}

void peer_all_reduce_meta(const Tensor& region, at::IntArrayRef, int64_t, const Tensor& values, int64_t) {
  check_device("values", values, region);
}

void bounded_permute_meta(const Tensor& topk_ids, const Tensor& tokens, const OptionalTensor&, int64_t, int64_t,
                          const Tensor& place, const Tensor& expert_end, const Tensor& rows, const OptionalTensor&, const Tensor& workspace, const Tensor& lost) {
  for (const Tensor& x : {tokens, place, expert_end, rows, workspace, lost}) {
    check_device("bounded_permute", x, topk_ids);
  }
}

void bounded_gather_meta(const Tensor& outputs, const Tensor& place, const Tensor& weights, const Tensor& tokens) {
  for (const Tensor& x : {outputs, weights, tokens}) check_device("bounded_gather", x, place);
}

}  // namespace
}  // namespace macs

TORCH_LIBRARY(sglang_macs, m) {
  m.def("definitions() -> str", &macs::definitions);
  m.def("check_policy(float[] policy) -> ()", &macs::check_policy);
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
  m.def("fused_layout(int[] shape) -> int[]", &macs::fused_layout_of);
  m.def(
      "fused_dispatch(Tensor(a!) region, int[] peers, int rank, int[] shape, Tensor hidden_states, Tensor topk_ids, "
      "Tensor topk_weights, Tensor segment, Tensor? router_logits, Tensor modality, float[] policy, "
      "int num_segments, int phase, int timeout_ns, int layer) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "fused_carry(Tensor(a!) region, int[] peers, int rank, int[] shape, Tensor hidden_states, Tensor topk_ids, "
      "int phase, int timeout_ns, int layer) -> ()");
  m.def("fused_receive(Tensor(a!) region, int[] peers, int rank, int[] shape, int timeout_ns, int layer) -> ()");
  m.def(
      "fused_combine(Tensor(a!) region, int[] peers, int rank, int[] shape, Tensor topk_ids, Tensor topk_weights, "
      "Tensor? outputs, int phase, int timeout_ns, int layer) -> Tensor");
  m.def("peer_reduce_layout(int num_ranks, int size) -> int[]", &macs::peer_reduce_layout_of);
  m.def("peer_all_reduce(Tensor(a!) region, int[] peers, int rank, Tensor(b!) values, int timeout_ns) -> ()");
  m.def("bounded_workspace_size(int num_tokens, int num_experts) -> int", &macs::bounded_workspace_size);
  m.def(
      "bounded_permute(Tensor topk_ids, Tensor tokens, Tensor? scales, int num_experts, int tile, Tensor(a!) place, "
      "Tensor(b!) expert_end, Tensor(c!) rows, Tensor(d!)? row_scales, Tensor(e!) workspace, Tensor(f!) lost) -> ()");
  m.def("bounded_gather(Tensor outputs, Tensor place, Tensor weights, Tensor(a!) tokens) -> ()");
#ifdef MACS_WITH_CUDA
  m.def("allocate_shared(int bytes) -> (Tensor, Tensor)", &macs::allocate_shared);
  m.def("open_shared(Tensor handle) -> int", &macs::open_shared);
  m.def("close_shared(int address) -> ()", &macs::close_shared);
#endif
}

TORCH_LIBRARY_IMPL(sglang_macs, CPU, m) {
  m.impl("replica_balance", &macs::replica_balance);
  m.impl("replica_choose", &macs::replica_choose);
  m.impl("entropy_score", &macs::entropy_score);
  m.impl("entropy_weight", &macs::entropy_weight);
  m.impl("load_histogram", &macs::load_histogram);
  m.impl("clip_threshold", &macs::clip_threshold);
  m.impl("clip_apply", &macs::clip_apply);
  m.impl("selection_score", &macs::selection_score);
  m.impl("score_histogram", &macs::score_histogram);
  m.impl("threshold_apply", &macs::threshold_apply);
  m.impl("plan", &macs::plan);
  m.impl("bounded_permute", &macs::bounded_permute);
  m.impl("bounded_gather", &macs::bounded_gather);
}

#ifdef MACS_WITH_CUDA
TORCH_LIBRARY_IMPL(sglang_macs, CUDA, m) {
  m.impl("entropy_score", &macs::entropy_score);
  m.impl("entropy_weight", &macs::entropy_weight);
  m.impl("load_histogram", &macs::load_histogram);
  m.impl("clip_threshold", &macs::clip_threshold);
  m.impl("clip_apply", &macs::clip_apply);
  m.impl("selection_score", &macs::selection_score);
  m.impl("score_histogram", &macs::score_histogram);
  m.impl("threshold_apply", &macs::threshold_apply);
  m.impl("plan", &macs::plan);
  m.impl("bounded_permute", &macs::bounded_permute);
  m.impl("bounded_gather", &macs::bounded_gather);
  m.impl("fused_dispatch", &macs::fused_dispatch);
  m.impl("fused_carry", &macs::fused_carry);
  m.impl("fused_receive", &macs::fused_receive);
  m.impl("fused_combine", &macs::fused_combine);
  m.impl("peer_all_reduce", &macs::peer_all_reduce);
}
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
  m.impl("bounded_permute", &macs::bounded_permute_meta);
  m.impl("bounded_gather", &macs::bounded_gather_meta);
  m.impl("fused_dispatch", &macs::fused_dispatch_meta);
  m.impl("fused_carry", &macs::fused_carry_meta);
  m.impl("fused_receive", &macs::fused_receive_meta);
  m.impl("fused_combine", &macs::fused_combine_meta);
  m.impl("peer_all_reduce", &macs::peer_all_reduce_meta);
}
