// The scales of FP8 rows, and how they get to where DeepGEMM looks for them: features apart, rows side by side.
//
// On one device the sender of a row puts each scale there. Over NVLink a store of 4 bytes that lies apart is a packet of its
// own, 56 of them a row at hidden size 7168. There the scales come with the row, in one piece, and the receiver puts them in
// their places as they come, while the rows behind them are still on their way.
//
// No scale is 0 (Fp8Scale, and so no word of four exponents), so that a word says by itself that it has come. Whoever has
// seen it writes 0 in its place, for the epoch after the next: every word that is sent has to be taken. The host clears what a
// fault has left.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"

namespace macs::cuda {

__device__ __forceinline__ bool scales_with_rows(const FusedBlock& b) {
  return b.p.scales_with_rows && is_fp8(b.p.shape.format);
}

// Where the words of a row's scales arrive in this epoch, in a region.
__device__ __forceinline__ int64_t arriving_scales(const FusedBlock& b, int row) {
  const int64_t place = (b.wait.epoch & 1) * static_cast<int64_t>(b.p.shape.max_rows) + row;
  return b.p.layout.row_scales + 4 * place * row_scale_stride(b.p.shape);
}

// Where the scales of a row of a rank's expert belong, in its region: word w at `offset` + w * `apart`.
struct ScalePlace {
  int64_t offset, apart;  // bytes

  __device__ __forceinline__ ScalePlace(const FusedBlock& b, int local, int row) {
    const FusedShape& s = b.p.shape;
    const int64_t column = s.expert_rows > 0 ? s.expert_rows : s.max_rows;
    const int64_t base = s.expert_rows > 0 ? local * (scale_words(s) - 1) * column : 0;  // row = local * column + the row within
    offset = b.p.layout.scales + 4 * (base + row), apart = 4 * column;
  }
};

// One warp: the scales of a staged row to their places.
__device__ __forceinline__ void put_scales(const FusedBlock& b, int peer, int local, int row, const unsigned char* staged) {
  const FusedShape& s = b.p.shape;
  const int words = static_cast<int>(scale_words(s));
  const ScalePlace place(b, local, row);
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(staged + RowBytes(s).features);
#pragma unroll 1
  for (int w = b.lane; w < words; w += kWarp) b.peers.write(peer, place.offset + w * place.apart, from[w]);
}

// One warp: the scales of a staged row in one piece. Before its features, so that they are there long before these.
__device__ __forceinline__ void send_scales(const FusedBlock& b, int peer, int row, const unsigned char* staged) {
  const FusedShape& s = b.p.shape;
  const int words = static_cast<int>(scale_words(s));
  const int64_t offset = arriving_scales(b, row);
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(staged + RowBytes(s).features);
#pragma unroll 1
  for (int w = b.lane; w < words; w += kWarp) b.peers.send(peer, offset + 4 * w, from[w]);
}

// One lane: `count` words, side by side. They lie in one sector and are written by one warp: until the last has come only that
// one is looked at, and with pauses, since thousands of lanes may wait while rows come in through the same L2.
__device__ __forceinline__ bool await_scales(const uint32_t* address, int count, uint32_t (&words)[kClaim],
                                             const WaitContext& wait) {
  constexpr uint32_t kPauseNs = 300;
  for (Poll poll;;) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      words[i] = i < count ? load_relaxed_sys(address + i) : 0;
      all &= i >= count || words[i] != 0;
    }
    if (all) return true;
    do {
      if (!poll.go_on(wait, Fault::kRows, -1, -1, 0, wait.epoch)) return false;
      nanosleep(kPauseNs);
    } while (load_relaxed_sys(address + count - 1) == 0);
  }
}

// One warp, a row a lane: words [first, first + kClaim) of the scales of an expert's row, from where they came to their places.
// inside: this lane has a row. False: they did not come. It waits twice as long as others: who waits for signals is to name
// the rank that is missing.
__device__ __forceinline__ bool place_words(const FusedBlock& b, int local, int row, bool inside, int first) {
  const FusedShape& s = b.p.shape;
  const int count = inside ? min(kClaim, static_cast<int>(scale_words(s)) - first) : 0;
  uint32_t* const address = b.own<uint32_t>(arriving_scales(b, row)) + first;
  WaitContext wait = b.wait;
  wait.timeout_ns *= 2;
  uint32_t words[kClaim];
  const bool ok = await_scales(address, count, words, wait);
  if (!__all_sync(kFullMask, ok)) return false;
  const ScalePlace place(b, local, row);
#pragma unroll
  for (int i = 0; i < kClaim; ++i) {
    if (i >= count) continue;
    *b.own<uint32_t>(place.offset + (first + i) * place.apart) = words[i];
    store_relaxed_sys(address + i, 0u);
  }
  return true;
}

// This block's share of the scales that come to this rank, `sharer` of `sharers` blocks. rows, starts: [E_l] of the rank's
// experts, in shared memory; of `rows` the lower 16 bits count. No barrier of the block; a fault is on record.
__device__ inline void place_scales(const FusedBlock& b, const uint32_t* rows, const int* starts, int sharer, int sharers) {
  const int local = b.args.per_rank, chunks = scale_chunks(b.p.shape);
  int most = 0;
#pragma unroll 1
  for (int j = b.lane; j < local; j += kWarp) most = max(most, static_cast<int>(rows[j] & 0xffffu));
  most = __reduce_max_sync(kFullMask, most);
  // Of every expert the first 32 rows, then of every expert the next.
  const int items = (most + kWarp - 1) / kWarp * chunks * local;
#pragma unroll 1
  for (int item = b.warp * sharers + sharer; item < items; item += kFusedWarps * sharers) {
    const int chunk_of_group = b.args.by_per_rank.divide(item), group = b.args.by_scale_chunks.divide(chunk_of_group);
    const int expert = item - chunk_of_group * local, chunk = chunk_of_group - group * chunks;
    const int i = group * kWarp + b.lane, count = static_cast<int>(rows[expert] & 0xffffu);
    if (group * kWarp >= count) continue;
    if (!place_words(b, expert, starts[expert] + i, i < count, chunk * kClaim)) return;
  }
}

}  // namespace macs::cuda
