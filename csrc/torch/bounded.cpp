// Between a dispatch and a grouped GEMM, on CPU and CUDA (macs/bounded.h).
#include "launch.h"

namespace macs {
namespace {

#ifdef MACS_WITH_CUDA

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

void run(const BoundedPermuteParams& p, const Tensor&) { cpu::bounded_permute(p); }
void run(const BoundedGatherParams& p, const Tensor&) { cpu::bounded_gather(p); }

#endif

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

// Shapes and dtypes only, so that the operators trace.

void bounded_permute_meta(const Tensor& topk_ids, const Tensor& tokens, const OptionalTensor&, int64_t, int64_t,
                          const Tensor& place, const Tensor& expert_end, const Tensor& rows,
                          const OptionalTensor&, const Tensor& workspace, const Tensor& lost) {
  for (const Tensor& x : {tokens, place, expert_end, rows, workspace, lost}) {
    check_device("bounded_permute", x, topk_ids);
  }
}

void bounded_gather_meta(const Tensor& outputs, const Tensor& place, const Tensor& weights, const Tensor& tokens) {
  for (const Tensor& x : {outputs, weights, tokens}) check_device("bounded_gather", x, place);
}

}  // namespace
}  // namespace macs

TORCH_LIBRARY_FRAGMENT(sglang_macs, m) {
  m.def("bounded_workspace_size(int num_tokens, int num_experts) -> int", &macs::bounded_workspace_size);
  m.def(
      "bounded_permute(Tensor topk_ids, Tensor tokens, Tensor? scales, int num_experts, int tile, Tensor(a!) place, "
      "Tensor(b!) expert_end, Tensor(c!) rows, Tensor(d!)? row_scales, Tensor(e!) workspace, Tensor(f!) lost) -> ()");
  m.def("bounded_gather(Tensor outputs, Tensor place, Tensor weights, Tensor(a!) tokens) -> ()");
}

TORCH_LIBRARY_IMPL(sglang_macs, CPU, m) {
  m.impl("bounded_permute", &macs::bounded_permute);
  m.impl("bounded_gather", &macs::bounded_gather);
}

#ifdef MACS_WITH_CUDA
TORCH_LIBRARY_IMPL(sglang_macs, CUDA, m) {
  m.impl("bounded_permute", &macs::bounded_permute);
  m.impl("bounded_gather", &macs::bounded_gather);
}
#endif

TORCH_LIBRARY_IMPL(sglang_macs, Meta, m) {
  m.impl("bounded_permute", &macs::bounded_permute_meta);
  m.impl("bounded_gather", &macs::bounded_gather_meta);
}
