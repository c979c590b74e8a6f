// clip_threshold: from the own and the group's histogram to a cut level, a quota and a share of the room per bound.
//
// Problem:     E * 2 * B cells twice (256 KB at E = B = 128, once without an exchange) into E shifts and NB cuts.
// Algorithm:   scope=expert: a warp per expert scans the cells as levels. scope=rank: a block per rank adds its experts'
//              cells up as levels in shared memory, shifted by each expert's pressure, and a warp scans those. The sums
//              over all bounds go through distributed shared memory.
// Grid:        one cluster of up to 16 blocks of 512 threads; bounds are dealt round robin.
// Determinism: integers, and doubles rounded step by step; no order matters.
#include "clip_threshold.cuh"

#include "launch.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) clip_threshold_kernel(const __grid_constant__ ClipThresholdParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  start_dependents();
  wait_for_previous();
  cluster_clip_threshold(p, shared);
  cg::this_cluster().sync();
}

}  // namespace

cudaError_t launch_clip_threshold(const ClipThresholdParams& p, cudaStream_t stream) {
  static int cached[kMaxDevices] = {};
  const size_t bytes = threshold_shared_bytes(p);
  if (bytes > static_cast<size_t>(max_shared_bytes())) return cudaErrorInvalidValue;
  const int cluster = largest_cluster(clip_threshold_kernel, kThreads, cached);
  return launch(clip_threshold_kernel,
                {.grid = cluster, .block = kThreads, .cluster = cluster, .shared_bytes = bytes, .overlap = true}, p, stream);
}

}  // namespace macs::cuda
