// fused_combine: every token's sum of its experts' outputs, pulled from the ranks that hold them.
//
// Problem:     outputs [max_rows, H] bf16 on every rank in, [T, H] bf16 out; bound by reading each output row once.
// Algorithm:   a rank offers its outputs in its region (copied there first, unless the experts wrote them there) and says
//              so; a token's rows are read where dispatch has put them and added up in slot order in f32, weighted. Where
//              they are is looked up while the others finish. Nothing is written but the result: no receive buffer, no
//              copy of it.
// Grid:        (blocks of a rank, ranks of this launch), all at once (cooperative); a thread has 8 features of a token.
// Determinism: a fixed order of additions.
// Reuse:       a rank overwrites its outputs only after its next dispatch, which waits for every rank's next
//              assignments; those come behind that rank's combine.
#include <cuda_bf16.h>

#include "divisor.cuh"
#include "entropy.cuh"
#include "fused_rank.cuh"
#include "launch.cuh"
#include "macs/cuda.h"
#include "macs/peer_view.cuh"
#include "warp.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsInFlight = 8;

struct CombineArgs {
  FusedCombineParams p;
  Divisor by_vectors, by_per_rank;  // 16 bytes of a row; experts of a rank
};

struct CombineBlock {
  const CombineArgs& args;
  const FusedCombineParams& p;
  const FusedRank& me;
  char* const home;
  const PeerView peers;
  const int vectors;
  WaitContext wait;

  __device__ __forceinline__ CombineBlock(const CombineArgs& a, const FusedRank& described)
      : args(a), p(a.p), me(described), home(me.region[me.rank]), peers(me.region), vectors(p.shape.hidden_size / 8) {
    wait = {own<FusedStatus>(p.layout.status), p.timeout_ns, *own<uint32_t>(p.layout.epoch), p.same_device,
                p.layer};
  }
  template <class T>
  __device__ __forceinline__ T* own(int64_t offset) const { return reinterpret_cast<T*>(home + offset); }
  // Whether this launch puts the rank's outputs into its region. Else the kernels before have.
  __device__ __forceinline__ bool copies() const { return me.outputs != nullptr; }
};

// Which expert each of this rank's rows is of: `before` [E_l + 1] rows of the experts before, in shared memory.
__device__ inline void sum_received(const CombineBlock& b, int* before) {
  const int local = b.p.shape.num_experts / b.p.shape.num_ranks, lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp) {
    int sum = 0;
#pragma unroll 1
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
  const int local = b.p.shape.num_experts / b.p.shape.num_ranks, vectors = b.vectors;
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
  if (b.copies()) copy_outputs(b, reinterpret_cast<int*>(dynamic_shared()));
  __syncthreads();
#pragma unroll 1
  for (int peer = threadIdx.x; peer < b.p.shape.num_ranks; peer += kThreads) {
    if (peer == b.me.rank && !b.copies()) continue;
    const int64_t flag = flag_offset(b.p.shape, b.p.layout, Flags::kOutputs, b.me.rank, blockIdx.x);
    b.peers.signal(peer, flag, b.wait);
  }
}

__device__ inline bool await_outputs(const CombineBlock& b) {
  const int there = b.copies() ? -1 : b.me.rank;
  return await_flags(b.own<char>(0), b.p.shape, b.p.layout, Flags::kOutputs, b.wait, Fault::kOutputs, there);
}

__device__ __forceinline__ int id_at(const CombineBlock& b, int slot) {
  return b.p.ids_are_i64 ? static_cast<int>(__ldg(static_cast<const int64_t*>(b.me.new_ids) + slot))
                         : __ldg(static_cast<const int32_t*>(b.me.new_ids) + slot);
}

// Where eight features of a token come from: kRowsInFlight of its slots.
struct Sources {
  const uint4* rows[kRowsInFlight];  // nullptr: none
  float gates[kRowsInFlight];

  __device__ __forceinline__ Sources(const CombineBlock& b, int item, int first) {
    const int token = b.args.by_vectors.divide(item), vector = item - token * b.vectors, top_k = b.p.shape.top_k;
    const int32_t* const positions = b.own<int32_t>(b.p.layout.positions);
    int position[kRowsInFlight], id[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int slot = token * top_k + first + i;
      const bool inside = first + i < top_k;
      position[i] = inside ? __ldcg(positions + slot) : -1;
      id[i] = inside ? id_at(b, slot) : -1;
      gates[i] = inside ? __ldg(b.me.new_weights + slot) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      rows[i] = nullptr;
      if (position[i] < 0 || id[i] < 0) {
        gates[i] = 0.0f;
        continue;
      }
      const uint4* const outputs = b.peers.at<uint4>(b.args.by_per_rank.divide(id[i]), b.p.layout.outputs);
      rows[i] = outputs + static_cast<int64_t>(position[i]) * b.vectors + vector;
    }
  }

  // Adds them, in order, each under its gate.
  __device__ __forceinline__ void add_to(float (&sum)[8]) const {
    uint4 loaded[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      loaded[i] = rows[i] != nullptr ? load_streaming(rows[i]) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      float x[8];
      Vector<__nv_bfloat16>::unpack(loaded[i], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = fmaf(gates[i], x[j], sum[j]);
    }
  }
};

// A thread has eight features of a token at a time. Zeros if the outputs do not come, so that nothing old passes for a result.
__device__ inline void write_combined(const CombineBlock& b) {
  const int all = b.me.num_tokens * b.vectors, step = gridDim.x * kThreads, top_k = b.p.shape.top_k;
  int item = blockIdx.x * kThreads + threadIdx.x, first = 0;
  Sources sources(b, item, item < all ? first : top_k);
  const bool ok = await_outputs(b);
  uint4* const out = static_cast<uint4*>(b.me.combined);
  float sum[8] = {};
#pragma unroll 1
  while (item < all) {
    if (ok) sources.add_to(sum);
    first += kRowsInFlight;
    if (first >= top_k) {
      out[item] = Vector<__nv_bfloat16>::pack(sum);
      item += step, first = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = 0.0f;
    }
    sources = Sources(b, item, item < all ? first : top_k);
  }
}

__global__ void __launch_bounds__(kThreads, 1) fused_combine_kernel(const __grid_constant__ CombineArgs args) {
  __shared__ FusedRank described;
  const CombineBlock b(args, describe_rank(args.p, described));
  if (args.p.phase != Phase::kReceive) offer_outputs(b);
  if (args.p.phase != Phase::kSend) write_combined(b);
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
  const CombineArgs args = {p, Divisor::of(s.hidden_size / 8), Divisor::of(s.num_experts / s.num_ranks)};
  return launch(fused_combine_kernel, shape, args, stream);
}

}  // namespace macs::cuda
