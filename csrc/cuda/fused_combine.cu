// fused_combine: every token's sum of its experts' outputs, pulled from the ranks that hold them.
//
// Problem:     outputs [max_rows, H] bf16 on every rank in, [T, H] bf16 out; bound by reading each output row once.
// Algorithm:   a rank offers its outputs in its region (copied there first, unless the experts wrote them there) and says
//              so; a token's rows are read where dispatch has put them and added up in slot order in f32, weighted.
//              Nothing is written but the result: no receive buffer, no copy of it.
// Grid:        (blocks of a rank, ranks of this launch), all at once (cooperative); a thread has 8 features of a token.
// Determinism: a fixed order of additions.
// Reuse:       a rank overwrites its outputs only after its next dispatch, which waits for every rank's next
//              assignments; those come behind that rank's combine.
#include <cuda_bf16.h>

#include "clip_threshold.cuh"
#include "entropy.cuh"
#include "launch.cuh"
#include "macs/cuda.h"
#include "macs/peer_view.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsInFlight = 8;

struct CombineBlock {
  const FusedCombineParams& p;
  const FusedRank& me;
  const PeerView<DirectNetwork> peers;
  Patience patience;

  __device__ __forceinline__ CombineBlock(const FusedCombineParams& params, const FusedRank& rank)
      : p(params), me(rank), peers(rank.region, nullptr) {
    const uint32_t round = __ldcg(own<uint32_t>(p.layout.round));
    patience = {own<FusedStatus>(p.layout.status), p.timeout_ns, round, p.same_device};
  }
  template <class T>
  __device__ __forceinline__ T* own(int64_t offset) const { return peers.at<T>(me.rank, offset); }
};

// Which expert each of this rank's rows is of: `before` [E_l + 1] rows of the experts before, in shared memory.
__device__ inline void sum_received(const CombineBlock& b, int* before) {
  const int local = b.p.shape.num_experts / b.p.shape.num_ranks, lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp) {
    int sum = 0;
    for (int base = 0; base < local; base += kWarp) {
      const int j = base + lane, rows = j < local ? __ldcg(b.own<int32_t>(b.p.layout.received) + j) : 0;
      const int upto = sum + warp_inclusive_sum(rows);
      if (j < local) before[j + 1] = upto;
      sum = __shfl_sync(kFullMask, upto, kWarp - 1);
    }
    if (lane == 0) before[0] = 0;
  }
  __syncthreads();
}

// The rows that this rank's experts have worked on, into its region; a warp a row.
__device__ inline void copy_outputs(const CombineBlock& b, int* before) {
  const int local = b.p.shape.num_experts / b.p.shape.num_ranks, vectors = b.p.shape.hidden_size / 8;
  const int lane = threadIdx.x % kWarp, num_warps = gridDim.x * kWarps;
  sum_received(b, before);
  int expert = 0;
  for (int i = blockIdx.x * kWarps + threadIdx.x / kWarp; i < before[local]; i += num_warps) {
    while (before[expert + 1] <= i) ++expert;
    const int row = __ldcg(b.own<int32_t>(b.p.layout.starts) + expert) + i - before[expert];
    const uint4* const from = static_cast<const uint4*>(b.me.outputs) + static_cast<int64_t>(row) * vectors;
    uint4* const to = b.own<uint4>(b.p.layout.outputs) + static_cast<int64_t>(row) * vectors;
#pragma unroll 8
    for (int v = lane; v < vectors; v += kWarp) to[v] = load_streaming(from + v);
  }
}

__device__ inline void offer_outputs(const CombineBlock& b) {
  if (b.me.outputs != nullptr) copy_outputs(b, reinterpret_cast<int*>(dynamic_shared()));
  __syncthreads();
  for (int peer = threadIdx.x; peer < b.p.shape.num_ranks; peer += kThreads) {
    const int64_t flag = flag_offset(b.p.shape, b.p.layout, Flags::kOutputs, b.me.rank, blockIdx.x);
    b.peers.signal(peer, flag, b.patience);
  }
}

__device__ inline bool await_outputs(const CombineBlock& b) {
  return await_flags(b.own<char>(0), b.p.shape, b.p.layout, Flags::kOutputs, b.patience, Fault::kOutputs);
}

__device__ __forceinline__ int id_at(const CombineBlock& b, int slot) {
  return b.p.ids_are_i64 ? static_cast<int>(__ldg(static_cast<const int64_t*>(b.me.new_ids) + slot))
                         : __ldg(static_cast<const int32_t*>(b.me.new_ids) + slot);
}

// Eight features of a token.
__device__ __forceinline__ uint4 combined(const CombineBlock& b, int token, int vector) {
  const FusedShape& s = b.p.shape;
  const int per_rank = s.num_experts / s.num_ranks, vectors = s.hidden_size / 8;
  const int32_t* const positions = b.own<int32_t>(b.p.layout.positions);
  float sum[8] = {};
  for (int first = 0; first < s.top_k; first += kRowsInFlight) {
    uint4 rows[kRowsInFlight];
    float gates[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int slot = token * s.top_k + first + i;
      const int position = first + i < s.top_k ? __ldcg(positions + slot) : -1;
      gates[i] = 0.0f, rows[i] = make_uint4(0, 0, 0, 0);
      if (position < 0) continue;
      const uint4* const outputs = b.peers.at<uint4>(id_at(b, slot) / per_rank, b.p.layout.outputs);
      rows[i] = load_streaming(outputs + static_cast<int64_t>(position) * vectors + vector);
      gates[i] = __ldg(b.me.new_weights + slot);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      float x[8];
      Vector<__nv_bfloat16>::unpack(rows[i], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = fmaf(gates[i], x[j], sum[j]);
    }
  }
  uint4 packed;
  __nv_bfloat162* const pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(sum[2 * j], sum[2 * j + 1]);
  return packed;
}

// `ok`: else zeros, so that nothing old passes for a result.
__device__ inline void write_combined(const CombineBlock& b, bool ok) {
  const int vectors = b.p.shape.hidden_size / 8;
  const int64_t all = static_cast<int64_t>(b.me.num_tokens) * vectors;
  uint4* const out = static_cast<uint4*>(b.me.combined);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int token = static_cast<int>(i / vectors), vector = static_cast<int>(i % vectors);
    out[i] = ok ? combined(b, token, vector) : make_uint4(0, 0, 0, 0);
  }
}

__global__ void __launch_bounds__(kThreads, 1) fused_combine_kernel(const __grid_constant__ FusedCombineParams p) {
  const CombineBlock b(p, p.many != nullptr ? p.many[blockIdx.y] : p.one);
  if (p.phase != Phase::kReceive) offer_outputs(b);
  if (p.phase == Phase::kSend) return;
  write_combined(b, await_outputs(b));
}

}  // namespace

cudaError_t launch_fused_combine(const FusedCombineParams& p, cudaStream_t stream) {
  const FusedShape& s = p.shape;
  if (s.num_ranks < 1 || s.num_ranks > kMaxPeers || s.hidden_size % 512 != 0 || s.num_blocks < 1 ||
      s.num_blocks > kMaxFusedBlocks || p.launched < 1 || p.launched > s.num_ranks) {
    return cudaErrorInvalidValue;
  }
  const size_t shared_bytes = (s.num_experts / s.num_ranks + 1) * sizeof(int);
  const Shape shape = {.grid = s.num_blocks,
                       .block = kThreads,
                       .rows = p.launched,
                       .shared_bytes = shared_bytes,
                       .cooperative = true};
  return launch(fused_combine_kernel, shape, p, stream);
}

}  // namespace macs::cuda
