// The fused dispatch and combine (macs/fused.h), the memory that ranks share, and sums over it (macs/peer_all_reduce.h).
#include <vector>

#include "launch.h"
#include "macs/peer_all_reduce.h"

#ifdef MACS_WITH_CUDA
#include "macs/peer_memory.h"
#endif

namespace macs {
namespace {

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

}  // namespace

void sum_over_peers(const Tensor& region, at::IntArrayRef peers, int64_t rank, const Tensor& values, const Tensor& sum,
                    int64_t timeout_ns, int64_t hops) {
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
  p.hops = static_cast<int32_t>(hops);
  p.timeout_ns = static_cast<uint64_t>(timeout_ns);
  check_launch(cuda::launch_peer_all_reduce(p, stream_of(region)), "peer_all_reduce");
}

namespace {

// Sums in place.
void peer_all_reduce(const Tensor& region, at::IntArrayRef peers, int64_t rank, const Tensor& values, int64_t timeout_ns,
                     int64_t hops) {
  const DeviceGuard guard(region.device());
  sum_over_peers(region, peers, rank, values, values, timeout_ns, hops);
}

#else

}  // namespace

void sum_over_peers(const Tensor& region, at::IntArrayRef, int64_t, const Tensor&, const Tensor&, int64_t, int64_t) {
  TORCH_CHECK_VALUE(false, "region: got one on ", region.device(), ", expected none: this build has no CUDA kernels");
}

namespace {

#endif

// Shapes and dtypes only, so that the operators trace.

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

void peer_all_reduce_meta(const Tensor& region, at::IntArrayRef, int64_t, const Tensor& values, int64_t, int64_t) {
  check_device("values", values, region);
}

}  // namespace
}  // namespace macs

TORCH_LIBRARY_FRAGMENT(sglang_macs, m) {
  m.def("fused_layout(int[] shape) -> int[]", &macs::fused_layout_of);
  m.def("peer_reduce_layout(int num_ranks, int size) -> int[]", &macs::peer_reduce_layout_of);
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
  m.def("peer_all_reduce(Tensor(a!) region, int[] peers, int rank, Tensor(b!) values, int timeout_ns, int hops=0) -> ()");
#ifdef MACS_WITH_CUDA
  m.def("allocate_shared(int bytes) -> (Tensor, Tensor)", &macs::allocate_shared);
  m.def("open_shared(Tensor handle) -> int", &macs::open_shared);
  m.def("close_shared(int address) -> ()", &macs::close_shared);
#endif
}

#ifdef MACS_WITH_CUDA
TORCH_LIBRARY_IMPL(sglang_macs, CUDA, m) {
  m.impl("fused_dispatch", &macs::fused_dispatch);
  m.impl("fused_carry", &macs::fused_carry);
  m.impl("fused_receive", &macs::fused_receive);
  m.impl("fused_combine", &macs::fused_combine);
  m.impl("peer_all_reduce", &macs::peer_all_reduce);
}
#endif

TORCH_LIBRARY_IMPL(sglang_macs, Meta, m) {
  m.impl("fused_dispatch", &macs::fused_dispatch_meta);
  m.impl("fused_carry", &macs::fused_carry_meta);
  m.impl("fused_receive", &macs::fused_receive_meta);
  m.impl("fused_combine", &macs::fused_combine_meta);
  m.impl("peer_all_reduce", &macs::peer_all_reduce_meta);
}
