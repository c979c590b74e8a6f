// What the kernels of a plan with replicas hand to each other (docs/design/method.md, 3b and 4b).
//
// Before the exchange: who has how many rows of each replicated expert (load_histogram.cu).
// Behind it: quotas and limits (replica_balance.cu), then clip_apply.cu with a place for every assignment (replica_choose.cuh).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "assignments.cuh"
#include "launch.cuh"
#include "macs/carver.h"
#include "macs/replicas.h"
#include "plan/threshold.cuh"

namespace macs::cuda {

// Behind the workspace of a plan without replicas; the first from one side of the exchange to the other.
struct ReplicaScratch {
  int32_t* block_counts;  // [blocks, X, 2] own (text, visual) rows of each replicated expert
  int32_t* quota;         // [P]
  RankLimit* limits;      // [R]; room: of the group
  Kept* stakes;           // [R] what is at stake on a rank that is exceeded, else 0
  int32_t* levels;        // [R, 2 * B] own rows that the limit of an exceeded rank speaks of

  static size_t bytes(const Assignments& in, const Places& places) { return ReplicaScratch(in, places, nullptr).bytes_; }
  ReplicaScratch(const Assignments& in, const Places& places, void* memory) {
    Carver<size_t> carver(256);
    const size_t ranks = places.num_ranks;
    const auto take = [&](size_t bytes) { return static_cast<char*>(memory) + carver.take(bytes); };
    block_counts = reinterpret_cast<int32_t*>(take(8ull * num_sms() * places.redundant()));
    quota = reinterpret_cast<int32_t*>(take(4ull * places.num_physical));
    limits = reinterpret_cast<RankLimit*>(take(sizeof(RankLimit) * ranks));
    stakes = reinterpret_cast<Kept*>(take(sizeof(Kept) * ranks));
    levels = reinterpret_cast<int32_t*>(take(8ull * num_buckets(in.policy.bucket_bits) * ranks));
    bytes_ = carver.bytes();
  }

 private:
  size_t bytes_;
};

// A block's own copy of the tables, in Places::size ints of shared memory: chains of lookups are ten times as fast there.
// They are older than the chain of kernels, so nothing is waited for. A barrier has to follow.
__device__ __forceinline__ Places copied(const Places& places, int32_t* shared) {
  const int size = static_cast<int>(Places::size(places.num_physical));
  for (int i = threadIdx.x; i < size; i += blockDim.x) shared[i] = places.table[i];
  return {shared, places.num_experts, places.num_physical, places.num_ranks};
}

// Of a rank's own rows of a replicated expert, as the exchange has them: text first.
__device__ __forceinline__ int replica_key(int row, bool text) { return 2 * row + (text ? 0 : 1); }

struct ReplicaBalanceArgs {
  ClipThresholdParams p;  // cut is not written
  Places places;
  int32_t* rank_rows;  // [2, R] out: as routed, as balanced
  int32_t* counts;     // [kReplicaCounts, E, 2] out: zeros, for clip_apply
  ReplicaScratch scratch;
};
cudaError_t enqueue_replica_balance(const ReplicaBalanceArgs& args, cudaStream_t stream);

}  // namespace macs::cuda
