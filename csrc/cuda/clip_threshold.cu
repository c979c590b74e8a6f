// clip_threshold: from the own and the group's histogram to a cut level, a quota and a share of the headroom per bound.
//
// Problem:     E * 2 * B cells twice (256 KB at E = B = 128, once without an exchange) into E shifts and NB cuts.
// Algorithm:   scope=expert: a warp per expert scans the cells as levels. scope=rank: a block per rank adds its
//              experts' cells up as levels in shared memory, shifted by each expert's pressure, and a warp scans those.
//              What the cut bounds keep is summed through distributed shared memory, and the headroom shared out by it.
// Grid:        one cluster of up to 16 blocks of 512 threads; bounds are dealt round robin.
// Determinism: integers, and doubles rounded step by step; no order matters.
#include <cooperative_groups.h>

#include "launch.cuh"
#include "macs/cuda.h"
#include "plan/headroom.cuh"
#include "plan/threshold.cuh"

namespace macs::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

struct StoreCuts {
  const ClipThresholdParams& p;
  Kept* kept;

  __device__ __forceinline__ void shift(int expert, int shift) const {
    if (threadIdx.x % kWarp == 0) p.shift[expert] = shift;
  }
  __device__ __forceinline__ void cut(int n, const Cut& cut, int bound) const {
    if (threadIdx.x % kWarp != 0) return;
    const int4 stored = make_int4(cut.level, cut.quota, static_cast<int>(cut.group_headroom), bound);
    reinterpret_cast<int4*>(p.cut)[n] = stored;
    if (cut.level < 0) return;
    atomicAdd(&kept[pool_of(p.policy, n)].group, cut.kept.group);
    atomicAdd(&kept[pool_of(p.policy, n)].own, cut.kept.own);
  }
};

__global__ void __launch_bounds__(kThreads) clip_threshold_kernel(const __grid_constant__ ClipThresholdParams p) {
  unsigned char* const shared = dynamic_shared();
  start_dependents();
  const cg::cluster_group cluster = cg::this_cluster();
  const int num_blocks = cluster.num_blocks(), pools = num_pools(p.policy);
  int* const levels = reinterpret_cast<int*>(shared);
  Kept* const kept = reinterpret_cast<Kept*>(shared + threshold_shared_bytes(p, kWarps));
  Kept* const kept_by_all = kept + pools;
  int4* const cuts = reinterpret_cast<int4*>(p.cut);
  for (int pool = threadIdx.x; pool < pools; pool += kThreads) kept[pool] = {0, 0};
  clear_levels(p, levels);
  __syncthreads();
  wait_for_previous();
  find_cuts(p, p.policy.num_experts / p.policy.num_ranks, levels, cluster.block_rank(), num_blocks, StoreCuts{p, kept});
  cluster.sync();
  for (int pool = threadIdx.x; pool < pools; pool += kThreads) {
    Kept sum = {0, 0};
#pragma unroll 8
    for (int block = 0; block < num_blocks; ++block) {
      const Kept other = *cluster.map_shared_rank(kept + pool, block);
      sum.group += other.group, sum.own += other.own;
    }
    kept_by_all[pool] = sum;
  }
  __syncthreads();
  const int bounds = num_bounds(p.policy);
  for (int n = cluster.block_rank() * kThreads + threadIdx.x; n < bounds; n += num_blocks * kThreads) {
    cuts[n].z = own_headroom(p.policy, cuts[n].z, kept_by_all[pool_of(p.policy, n)]);
  }
  cluster.sync();  // nobody leaves while its shared memory is being read
}

}  // namespace

cudaError_t launch_clip_threshold(const ClipThresholdParams& p, cudaStream_t stream) {
  static int cached[kMaxDevices] = {};
  const size_t bytes = threshold_shared_bytes(p, kWarps) + 2 * sizeof(Kept) * p.policy.num_ranks;
  if (bytes > static_cast<size_t>(max_shared_bytes())) return cudaErrorInvalidValue;
  const int cluster = largest_cluster(clip_threshold_kernel, kThreads, cached);
  const Shape shape = {
      .grid = cluster, .block = kThreads, .cluster = cluster, .shared_bytes = bytes, .overlap = true};
  return launch(clip_threshold_kernel, shape, p, stream);
}

}  // namespace macs::cuda
