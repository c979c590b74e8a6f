// What the fused dispatch leaves for others: the tokens' ids and gates, the rows that have come, and what the counters count.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "fused_decide.cuh"
#include "fused_weight.cuh"

namespace macs::cuda {

// Ids, gates and weights of this block's tokens where they are not those that came, a token a warp. The gate of a re-routed
// expert follows the token's best one.
__device__ inline void write_tokens(const FusedBlock& b) {
  const int top_k = b.p.shape.top_k, experts = b.p.shape.num_experts;
#pragma unroll 1
  for (int token = b.first + b.warp; token < b.end; token += kFusedWarps) {
    const int slot = token * top_k + b.lane;
    const bool inside = b.lane < top_k;
    const Entry entry = inside ? b.own_entry(slot) : Entry::nobody();
    const int original = entry.present() ? entry.expert() : -1, current = inside ? b.current()[slot] : kEmptySlot;
    const int here = slot - b.first * top_k;
    const float gate = inside ? b.at<float>(b.args.tables.gates)[here] : 0.0f;
    const Reference reference = reference_of(original, gate, 0, top_k);
    if (b.lane == 0 && b.p.policy.needs_entropy) b.me.weight[token] = b.at<float>(b.args.tables.weight)[token];
    if (!inside) continue;
    int id = current;
    float weight = gate;
    if (current == kEmptySlot) {
      id = b.at<int>(b.args.tables.ids)[here];
    } else if (current < 0) {
      weight = 0.0f;
    } else if (current != original) {
      const float* const logits = b.me.router_logits + static_cast<int64_t>(token) * experts;
      const float to = __ldg(logits + current), from = __ldg(logits + reference.expert);
      weight = rerouted_weight(b.p.policy.scoring, reference.gate, to, from);
    }
    b.write_slot(slot, id, weight);
  }
}

// A rank that gave up sends nothing and says so.
__device__ inline void drop_tokens(const FusedBlock& b) {
  const int end = b.end * b.p.shape.top_k;
#pragma unroll 1
  for (int slot = b.first * b.p.shape.top_k + threadIdx.x; slot < end; slot += kFusedThreads) {
    b.own<int32_t>(b.p.layout.positions)[slot] = -1;
    b.write_slot(slot, -1, 0.0f);
  }
}

// What became of the assignments, by one of the rank's blocks, once its rows are on their way.
__device__ inline void write_counts(const FusedBlock& b, bool cut) {
  const int experts = b.p.shape.num_experts;
  int* const counts = b.at<int>(b.args.tables.counts);
#pragma unroll 1
  for (int i = threadIdx.x; i < 6 * experts; i += kFusedThreads) counts[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < b.slots(); i += kFusedThreads) {
    const Entry entry = b.own_entry(i);
    if (!entry.present()) continue;
    const int original = entry.expert(), current = cut ? b.current()[i] : original, text = entry.text() ? 1 : 0;
    atomicAdd(counts + ((current == original ? 0 : experts) + original) * 2 + text, 1);
    if (current != original && current >= 0) atomicAdd(counts + (2 * experts + current) * 2 + text, 1);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < 6 * experts; i += kFusedThreads) b.me.counts[i] = counts[i];
}

// The group's sums, which are complete, and the cuts.
__device__ inline void write_cuts(const FusedBlock& b, bool cut) {
  const bool by_rank = b.p.policy.scope == Scope::kRank;
  const Capacity capacity = capacity_of(b, !by_rank);
#pragma unroll 1
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) {
    const int bound = by_rank ? capacity.of_rank(b.args.threshold) : bound_of_expert(b, capacity, n);
    const int4 uncut = make_int4(-1, 0, 0, bound);  // nobody needs room
    int4 found = cut ? raw_cut(b, n).cut : uncut;
    if (b.p.policy.reroute == Reroute::kNone) found.z = 0;
    reinterpret_cast<int4*>(b.me.cut)[n] = found;
  }
  if (threadIdx.x < kNumSums) b.me.sums[threadIdx.x] = b.scalars().sums[threadIdx.x];
}

// What this rank's experts get, by one of its blocks, while others may be looking. `ok`: else they get nothing.
__device__ inline void write_received(const FusedBlock& b, bool ok) {
  const FusedShape& s = b.p.shape;
  const int local = b.args.per_rank, base = b.rank * local;
  uint32_t* const received = b.own<uint32_t>(b.p.layout.received);
  uint32_t* const starts = b.own<uint32_t>(b.p.layout.starts);
#pragma unroll 1
  for (int j = threadIdx.x; j < local; j += kFusedThreads) {
    store_relaxed_sys(received + j, ok ? b.group_rows()[base + j] & 0xffffu : 0u);
    store_relaxed_sys(starts + j, ok ? static_cast<uint32_t>(b.at<int>(b.args.tables.starts)[base + j]) : 0u);
  }
  if (b.me.row_experts == nullptr) return;
#pragma unroll 1
  for (int row = threadIdx.x; row < s.max_rows; row += kFusedThreads) b.me.row_experts[row] = -1;
  __syncthreads();
#pragma unroll 1
  for (int j = b.warp; ok && j < local; j += kFusedWarps) {
    const int start = b.at<int>(b.args.tables.starts)[base + j];
    const int rows = static_cast<int>(b.group_rows()[base + j] & 0xffffu);
#pragma unroll 1
    for (int i = b.lane; i < rows; i += kWarp) b.me.row_experts[start + i] = j;
  }
}

}  // namespace macs::cuda
