// What the operators check of tensors and options: what, got, expected. This folder is all of C++ that includes torch.
#pragma once
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <type_traits>

#include "macs/bounded.h"
#include "macs/cpu.h"
#include "macs/fused.h"
#include "macs/level.h"
#include "macs/replicas.h"

namespace macs {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A CPU and a meta tensor together reach the Meta kernels: the device is the one thing that these must check, too.
inline void check_device(const char* name, const Tensor& x, const Tensor& beside) {
  TORCH_CHECK_VALUE(x.device() == beside.device(), name, ": got device ", x.device(), ", expected ", beside.device());
}

inline void check_like(const Tensor& x, const char* name, at::ScalarType dtype, at::IntArrayRef shape,
                       const Tensor& beside) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, ": got dtype ", x.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": got shape ", x.sizes(), ", expected ", shape);
  check_device(name, x, beside);
}

inline DType float_dtype(const Tensor& x, const char* name) {
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
inline void set_option(const char* name, double value, Option& option) {
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

inline void check_ranks(int64_t num_experts, int64_t num_ranks) {
  TORCH_CHECK_VALUE(num_experts > 0 && num_ranks > 0 && num_experts % num_ranks == 0, "num_ranks: got ", num_ranks,
                    " for ", num_experts, " experts, expected a divisor of the number of experts");
}

// From the numbers that Python packed (sglang_macs/ops/policy.py), one an option. num_physical: with replicas, what is
// divided among the ranks in place of the experts.
inline Policy checked_policy(at::ArrayRef<double> packed, int64_t num_physical = 0) {
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
    places = {table.is_meta() ? nullptr : table.const_data_ptr<int32_t>(), policy.num_experts,
              static_cast<int32_t>(num_physical), policy.num_ranks};
  }

  int64_t num_ids() const { return places.any() ? places.num_physical : policy.num_experts; }
  int64_t exchange_size() const { return histogram_size(policy) + replica_exchange_size(places); }
  int64_t num_counts() const { return places.any() ? kReplicaCounts : 3; }
};

// Without the weight, which a plan has yet to make.
inline Assignments checked_routing(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& segment,
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

inline Assignments checked_assignments(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                                       const Tensor& segment, const Policy& policy) {
  Assignments a = checked_routing(topk_ids, topk_weights, segment, policy);
  check_like(weight, "weight", at::kFloat, {topk_ids.size(0)}, topk_ids);
  a.weight = weight.const_data_ptr<float>();
  return a;
}

// On a GPU these looks would be host synchronisations.
inline void check_ids_in_range(const Tensor& topk_ids, int64_t num_experts) {
  if (!topk_ids.is_cpu() || topk_ids.numel() == 0) return;
  const int64_t greatest = topk_ids.max().item<int64_t>();
  TORCH_CHECK_VALUE(greatest < num_experts, "topk_ids: got expert ", greatest, ", expected ids below ", num_experts);
}

inline void check_segments(const Tensor& segment, int64_t num_segments) {
  TORCH_CHECK_VALUE(num_segments >= 0, "num_segments: got ", num_segments, ", expected at least 0");
  if (!segment.is_cpu() || segment.numel() == 0) return;
  const auto greatest = segment.max().item<int32_t>();
  TORCH_CHECK_VALUE(greatest < num_segments, "num_segments: got ", num_segments, ", expected more than ", greatest,
                    ", the greatest segment");
}

inline void check_hidden(const Tensor& hidden_states) {
  TORCH_CHECK_VALUE(hidden_states.dim() == 2 && hidden_states.size(1) > 0, "hidden_states: got shape ",
                    hidden_states.sizes(), ", expected [T, H] with H > 0");
}

// Logits in any of the types that a router gives: a GPU converts what it reads.
inline Tensor readable_logits(const Tensor& router_logits) {
  const Tensor logits = router_logits.contiguous();
  float_dtype(logits, "router_logits");
  return logits.is_cpu() ? logits.to(at::kFloat) : logits;
}

// The tensor must outlive the launch.
inline const float* checked_selection(const Tensor& selection, int64_t num_tokens, int64_t num_experts,
                                      const Tensor& beside) {
  if (!selection.defined()) return nullptr;
  check_like(selection, "selection", at::kFloat, {num_tokens, num_experts}, beside);
  return selection.const_data_ptr<float>();
}

inline void check_assignment_devices(const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& weight,
                                     const Tensor& segment) {
  check_device("topk_weights", topk_weights, topk_ids);
  check_device("weight", weight, topk_ids);
  check_device("segment", segment, topk_ids);
}

}  // namespace macs
