// Where the kept rows of the fused dispatch go, and how they get there.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "fused_decide.cuh"

namespace macs::cuda {

// Rows per expert of this rank as it now stands, and those before this block's tokens.
__device__ inline void count_own(const FusedBlock& b) {
  uint32_t* const own = b.at<uint32_t>(b.args.desk.own_rows);
  const int before = b.first * b.p.shape.top_k;
  for (int i = threadIdx.x; i < b.slots(); i += kFusedThreads) {
    const int expert = b.current()[i];
    if (expert >= 0) atomicAdd(own + expert, 1u + (i < before ? 1u << 16 : 0u));
  }
  __syncthreads();
}

// One thread: what every rank sends to an expert.
__device__ inline bool hear_counts(const FusedBlock& b, int expert) {
  constexpr int kInFlight = 4;
  const int experts = b.p.shape.num_experts, ranks = b.p.shape.num_ranks;
  const int* const tokens = b.at<int>(b.args.desk.tokens);
  const uint64_t* const letters = b.own<uint64_t>(b.p.layout.counts) + expert;
  uint32_t rows = 0;
  for (int base = 0; base < ranks; base += kInFlight) {
    uint64_t held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) held[i] = base + i < ranks ? load_relaxed_sys(letters + (base + i) * experts) : 0;
    for (int i = 0; i < kInFlight && base + i < ranks; ++i) {
      const int source = base + i;
      uint64_t letter = held[i];
      if (!await_letter(letters + source * experts, letter, b.patience, Fault::kCounts, source)) return false;
      const uint32_t count = value_of(letter);
      if (count > static_cast<uint32_t>(tokens[source])) {
        report(b.patience, Fault::kBadCount, source, -1, static_cast<int32_t>(count), tokens[source]);
        return false;
      }
      rows += count + (source < b.me.rank ? count << 16 : 0u);
    }
  }
  b.at<uint32_t>(b.args.desk.group_rows)[expert] = rows;
  return true;
}

// After a cut only a rank itself knows what it sends: it tells all. Behind, `group_rows` are the rows after the plan.
__device__ inline bool exchange_counts(const FusedBlock& b) {
  const int experts = b.p.shape.num_experts, ranks = b.p.shape.num_ranks;
  const uint32_t* const own = b.at<uint32_t>(b.args.desk.own_rows);
  for (int peer = b.block; peer < ranks; peer += b.num_blocks) {
    const int64_t row = b.p.layout.counts + 8LL * b.me.rank * experts;
    for (int j = threadIdx.x; j < experts; j += kFusedThreads) {
      b.peers.send(peer, row + 8 * j, make_letter(own[j] & 0xffffu, b.patience.round));
    }
  }
  bool ok = true;
  for (int j = threadIdx.x; j < experts; j += kFusedThreads) ok &= hear_counts(b, j);
  return __syncthreads_and(ok) != 0;
}

// One warp: the experts of a rank behind one another.
__device__ inline void pack_experts(const FusedBlock& b, int rank) {
  const int per_rank = b.args.per_rank, alignment = b.p.shape.alignment;
  const uint32_t* const rows = b.at<uint32_t>(b.args.desk.group_rows) + rank * per_rank;
  int* const starts = b.at<int>(b.args.desk.starts) + rank * per_rank;
  int next = 0;
  for (int base = 0; base < per_rank; base += kWarp) {
    const int j = base + b.lane, count = j < per_rank ? static_cast<int>(rows[j] & 0xffffu) : 0;
    const int room = (count + alignment - 1) / alignment * alignment, upto = next + warp_inclusive_sum(room);
    if (j < per_rank) starts[j] = upto - room;
    next = __shfl_sync(kFullMask, upto, kWarp - 1);
  }
}

// First row of every expert in its rank's buffer. False: the buffer does not hold them.
__device__ inline bool place_experts(const FusedBlock& b) {
  const FusedShape& s = b.p.shape;
  const uint32_t* const rows = b.at<uint32_t>(b.args.desk.group_rows);
  int* const starts = b.at<int>(b.args.desk.starts);
  if (s.expert_rows > 0) {
    for (int j = threadIdx.x; j < s.num_experts; j += kFusedThreads) starts[j] = j % b.args.per_rank * s.expert_rows;
  } else {
    for (int rank = b.warp; rank < s.num_ranks; rank += kFusedWarps) pack_experts(b, rank);
  }
  __syncthreads();
  bool ok = true;
  for (int j = threadIdx.x; j < s.num_experts; j += kFusedThreads) {
    const int count = static_cast<int>(rows[j] & 0xffffu), limit = s.expert_rows > 0 ? s.expert_rows : s.max_rows - starts[j];
    if (count > limit) ok = false, report(b.patience, Fault::kOverflow, j / b.args.per_rank, -1, count, limit);
  }
  return __syncthreads_and(ok) != 0;
}

// The row of every assignment of this block's tokens at its expert's rank.
__device__ inline void find_destinations(const FusedBlock& b) {
  const int first = b.first * b.p.shape.top_k, here = (b.end - b.first) * b.p.shape.top_k;
  const uint32_t* const own = b.at<uint32_t>(b.args.desk.own_rows);
  int32_t* const positions = b.own<int32_t>(b.p.layout.positions);
  for (int i = threadIdx.x; i < here; i += kFusedThreads) {
    const int expert = b.current()[first + i];
    int row = -1;
    if (expert >= 0) {
      const uint32_t lower = b.at<uint32_t>(b.args.desk.group_rows)[expert] >> 16;  // rows of lower sources
      row = b.at<int>(b.args.desk.starts)[expert] + static_cast<int>(lower + (own[expert] >> 16));
      for (int j = 0; j < i; ++j) row += b.current()[first + j] == expert ? 1 : 0;
    }
    b.at<int>(b.args.desk.dest)[i] = row;
    positions[first + i] = row;
  }
  __syncthreads();
}

// The scales of a staged row, to where DeepGEMM looks for them: features apart, rows side by side.
__device__ __forceinline__ void put_scales(const FusedBlock& b, int peer, int local, int row, const unsigned char* staged) {
  const FusedShape& s = b.p.shape;
  const int words = static_cast<int>(scale_words(s));
  const int64_t stride = s.expert_rows > 0 ? s.expert_rows : s.max_rows;
  const int64_t base = s.expert_rows > 0 ? local * (words - 1) * stride : 0;  // row = local * stride + the row within
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(staged + RowBytes(s).features);
  for (int w = b.lane; w < words; w += kWarp) {
    b.peers.write(peer, b.p.layout.scales + 4 * (base + w * stride + row), from[w]);
  }
}

// The staged rows of tokens [begin, end) to their experts, warps taking a share of an assignment's row each.
__device__ inline void put_rows(const FusedBlock& b, int begin, int end) {
  const FusedShape& s = b.p.shape;
  const int assignments = (end - begin) * s.top_k, vectors = RowBytes(s).features / 16;
  const int parts = max(1, min(kFusedWarps / max(assignments, 1), vectors / kWarp));
  for (int item = b.warp; item < assignments * parts; item += kFusedWarps) {
    const int i = item / parts, part = item - i * parts;
    const int slot = begin * s.top_k + i, row = b.at<int>(b.args.desk.dest)[slot - b.first * s.top_k];
    if (row < 0) continue;
    const int expert = b.current()[slot], peer = expert / b.args.per_rank;
    const unsigned char* const staged = b.staged(i / s.top_k);
    const int from = vectors * part / parts, upto = vectors * (part + 1) / parts;
    const int64_t offset = b.p.layout.rows + (static_cast<int64_t>(row) * vectors + from) * 16;
    b.peers.put(peer, offset, reinterpret_cast<const uint4*>(staged) + from, upto - from, b.lane);
    if (part != 0) continue;
    if (is_fp8(s.format)) put_scales(b, peer, expert - peer * b.args.per_rank, row, staged);
    if (b.lane == 0) {
      b.peers.write(peer, b.p.layout.sources + 4LL * row, b.me.rank << 16 | (begin + i / s.top_k));
    }
  }
}

// Ids and gates of this block's tokens, a token a warp. The gate of a re-routed expert follows the token's best one.
__device__ inline void write_tokens(const FusedBlock& b) {
  const int top_k = b.p.shape.top_k, experts = b.p.shape.num_experts;
  for (int token = b.first + b.warp; token < b.end; token += kFusedWarps) {
    const int slot = token * top_k + b.lane;
    const bool inside = b.lane < top_k;
    const Entry entry = inside ? b.own_entry(slot) : Entry{0};
    const int original = entry.present() ? entry.expert() : -1, current = inside ? b.current()[slot] : kEmptySlot;
    const int here = slot - b.first * top_k;
    const float gate = inside ? b.at<float>(b.args.desk.gates)[here] : 0.0f;
    const Reference reference = reference_of(original, gate, 0, top_k);
    if (b.lane == 0) b.me.weight[token] = b.at<float>(b.args.desk.weight)[token - b.first];
    if (!inside) continue;
    int id = current;
    float weight = gate;
    if (current == kEmptySlot) {
      id = b.at<int>(b.args.desk.ids)[here];
    } else if (current < 0) {
      weight = 0.0f;
    } else if (current != original) {
      const float* const logits = b.me.router_logits + static_cast<int64_t>(token) * experts;
      weight = rerouted_weight(b.p.scoring, reference.gate, __ldg(logits + current), __ldg(logits + reference.expert));
    }
    b.me.new_weights[slot] = weight;
    if (b.p.ids_are_i64) {
      static_cast<int64_t*>(b.me.new_ids)[slot] = id;
    } else {
      static_cast<int32_t*>(b.me.new_ids)[slot] = id;
    }
  }
}

// What the counters want to know, by one of the rank's blocks, once its rows are on their way.
__device__ inline void write_counts(const FusedBlock& b) {
  const int experts = b.p.shape.num_experts;
  int* const counts = b.at<int>(b.args.desk.levels);  // no longer needed as levels
  for (int i = threadIdx.x; i < 6 * experts; i += kFusedThreads) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < b.slots(); i += kFusedThreads) {
    const Entry entry = b.own_entry(i);
    if (!entry.present()) continue;
    const int original = entry.expert(), current = b.current()[i], text = entry.text() ? 1 : 0;
    atomicAdd(counts + ((current == original ? 0 : experts) + original) * 2 + text, 1);
    if (current != original && current >= 0) atomicAdd(counts + (2 * experts + current) * 2 + text, 1);
  }
  const RawCut* const raw = b.at<RawCut>(b.args.desk.raw);
  for (int n = threadIdx.x; n < b.args.bounds; n += kFusedThreads) {
    int4 cut = raw[n].cut;
    if (!b.scalars().any_over) cut.z = 0;  // nobody needs room
    reinterpret_cast<int4*>(b.me.cut)[n] = cut;
  }
  if (threadIdx.x < kNumSums) b.me.sums[threadIdx.x] = b.scalars().sums[threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.x; i < 6 * experts; i += kFusedThreads) b.me.counts[i] = counts[i];
}

// What this rank's experts get, by its first block. `ok`: else they get nothing.
__device__ inline void write_received(const FusedBlock& b, bool ok) {
  const FusedShape& s = b.p.shape;
  const int local = b.args.per_rank, base = b.me.rank * local;
  int32_t* const received = b.own<int32_t>(b.p.layout.received);
  int32_t* const starts = b.own<int32_t>(b.p.layout.starts);
  for (int j = threadIdx.x; j < local; j += kFusedThreads) {
    received[j] = ok ? static_cast<int32_t>(b.at<uint32_t>(b.args.desk.group_rows)[base + j] & 0xffffu) : 0;
    starts[j] = ok ? b.at<int>(b.args.desk.starts)[base + j] : 0;
  }
  if (b.me.row_experts == nullptr) return;
  for (int row = threadIdx.x; row < s.max_rows; row += kFusedThreads) b.me.row_experts[row] = -1;
  __syncthreads();
  for (int j = b.warp; ok && j < local; j += kFusedWarps) {
    const int start = b.at<int>(b.args.desk.starts)[base + j];
    const int rows = static_cast<int>(b.at<uint32_t>(b.args.desk.group_rows)[base + j] & 0xffffu);
    for (int i = b.lane; i < rows; i += kWarp) b.me.row_experts[start + i] = j;
  }
}

}  // namespace macs::cuda
