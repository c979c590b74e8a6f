// Where the kept rows of the fused dispatch go, and how they get there.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "fused_decide.cuh"
#include "fused_put.cuh"
#include "warp.cuh"

namespace macs::cuda {

// One thread: what every rank sends to an expert, `own` this one.
__device__ inline bool receive_counts(const FusedBlock& b, int expert, uint32_t own) {
  constexpr int kInFlight = 4;
  const int experts = b.p.shape.num_experts, ranks = b.p.shape.num_ranks;
  const int* const tokens = b.at<int>(b.args.tables.tokens);
  const uint64_t* const words = b.own<uint64_t>(b.counts_of(0)) + expert;
  uint32_t rows = own;
#pragma unroll 1
  for (int base = 0; base < ranks && ranks > 1; base += kInFlight) {
    uint64_t held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const bool awaited = base + i < ranks && base + i != b.rank;
      held[i] = awaited ? load_relaxed_sys(words + (base + i) * experts) : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int source = base + i;
      if (source >= ranks || source == b.rank) continue;
      uint64_t word = held[i];
      if (!await_word(words + source * experts, word, b.wait, Fault::kCounts, source)) return false;
      const uint32_t count = value_of(word);
      if (count > static_cast<uint32_t>(tokens[source])) {
        report(b.wait, Fault::kBadCount, source, -1, static_cast<int32_t>(count), tokens[source]);
        return false;
      }
      rows += count + (source < b.rank ? count << 16 : 0u);
    }
  }
  b.group_rows()[expert] = rows;
  return true;
}

// After a cut only a rank itself knows what it sends: it sends that to the others. `group_rows` are then the rows after the plan.
__device__ inline bool exchange_counts(const FusedBlock& b) {
  const int experts = b.p.shape.num_experts, ranks = b.p.shape.num_ranks;
  const uint32_t* const own = b.at<uint32_t>(b.args.tables.own_rows);
#pragma unroll 1
  for (int peer = b.block; peer < ranks; peer += b.num_blocks) {
    if (peer == b.rank) continue;
    const int64_t row = b.counts_of(b.rank);
#pragma unroll 1
    for (int j = threadIdx.x; j < experts; j += kFusedThreads) {
      b.peers.send(peer, row + 8 * j, make_ll_word(own[j] & 0xffffu, b.wait.epoch));
    }
  }
  bool ok = true;
#pragma unroll 1
  for (int j = threadIdx.x; j < experts; j += kFusedThreads) ok &= receive_counts(b, j, own[j]);
  return __syncthreads_and(ok) != 0;
}

// One warp: the experts of a rank behind one another. False: one that this lane has placed does not fit.
__device__ inline bool pack_experts(const FusedBlock& b, int rank) {
  const int per_rank = b.args.per_rank, alignment = b.p.shape.alignment;
  const uint32_t* const rows = b.group_rows() + rank * per_rank;
  int* const starts = b.at<int>(b.args.tables.starts) + rank * per_rank;
  bool fits = true;
  int next = 0;
#pragma unroll 1
  for (int base = 0; base < per_rank; base += kWarp) {
    const int j = base + b.lane, count = j < per_rank ? static_cast<int>(rows[j] & 0xffffu) : 0;
    const int room = (count + alignment - 1) / alignment * alignment, upto = next + warp_inclusive_sum(room);
    if (j < per_rank) starts[j] = upto - room, fits &= count <= b.p.shape.max_rows - starts[j];
    next = __shfl_sync(kFullMask, upto, kWarp - 1);
  }
  return fits;
}

// First row of every expert in its rank's buffer. False: one that this thread has placed does not fit.
__device__ inline bool place_experts(const FusedBlock& b) {
  const FusedShape& s = b.p.shape;
  bool fits = true;
  if (s.expert_rows > 0) {
    const uint32_t* const rows = b.group_rows();
#pragma unroll 1
    for (int j = threadIdx.x; j < s.num_experts; j += kFusedThreads) {
      b.at<int>(b.args.tables.starts)[j] = (j - b.args.by_per_rank.divide(j) * b.args.per_rank) * s.expert_rows;
      fits &= static_cast<int>(rows[j] & 0xffffu) <= s.expert_rows;
    }
  } else {
#pragma unroll 1
    for (int rank = b.warp; rank < s.num_ranks; rank += kFusedWarps) fits &= pack_experts(b, rank);
  }
  return fits;
}

// Behind place_experts and a barrier: names an expert that does not fit.
__device__ inline void report_no_room(const FusedBlock& b) {
  const FusedShape& s = b.p.shape;
#pragma unroll 1
  for (int j = threadIdx.x; j < s.num_experts; j += kFusedThreads) {
    const int count = static_cast<int>(b.group_rows()[j] & 0xffffu);
    const int limit = s.expert_rows > 0 ? s.expert_rows : s.max_rows - b.at<int>(b.args.tables.starts)[j];
    if (count > limit) report(b.wait, Fault::kOverflow, j / b.args.per_rank, -1, count, limit);
  }
}

// One warp: the row of this block's assignment `i` at its expert's rank, behind those of its expert that come before. -1:
// none.
__device__ __forceinline__ int row_of(const FusedBlock& b, int i) {
  const int16_t* const current = b.current() + b.first * b.p.shape.top_k;
  const int expert = current[i];
  if (expert < 0) return -1;
  int row = b.at<int>(b.args.tables.starts)[expert] + static_cast<int>(b.group_rows()[expert] >> 16);
#pragma unroll 1
  for (int base = 0; base < i; base += kWarp) {
    const int j = base + b.lane;
    row += __popc(__ballot_sync(kFullMask, j < i && current[j] == expert));
  }
  return row;
}

// The staged rows of tokens [begin, end) to their experts, warps taking a share of an assignment's row each.
__device__ inline void put_rows(const FusedBlock& b, int begin, int end) {
  const FusedShape& s = b.p.shape;
  const int assignments = (end - begin) * s.top_k, vectors = RowBytes(s).features / 16;
  const int split = parts_of_a_row(assignments, vectors);
#pragma unroll 1
  for (int item = b.warp; item < assignments << split; item += kFusedWarps) {
    const int i = item >> split, part = item - (i << split), slot = begin * s.top_k + i;
    const int row = row_of(b, slot - b.first * s.top_k);
    if (part == 0 && b.lane == 0) b.own<int32_t>(b.p.layout.positions)[slot] = row;
    if (row < 0) continue;
    const int expert = b.current()[slot], peer = b.args.by_per_rank.divide(expert), token = b.args.by_top_k.divide(i);
    put_part(b, peer, expert - peer * b.args.per_rank, row, begin + token, b.staged(token), part, split);
  }
}

}  // namespace macs::cuda
