// How a staged row gets to where its expert's rank reads it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fused_block.cuh"
#include "fused_scales.cuh"

namespace macs::cuda {

// Into 2^this parts a row is split: as many as there are warps, of 32 vectors or more.
__device__ __forceinline__ int parts_of_a_row(int assignments, int vectors) {
  return max(0, min(__clz(max(assignments - 1, 0)) - __clz(kFusedWarps / 2), __clz(1) - __clz(vectors / kWarp)));
}

// One warp: a part of a token's staged row to row `row` of `peer`, whose expert `local` it is for; with the first part what
// goes with the row.
__device__ __forceinline__ void put_part(const FusedBlock& b, int peer, int local, int row, int token,
                                         const unsigned char* staged, int part, int split) {
  const FusedShape& s = b.p.shape;
  const int vectors = RowBytes(s).features / 16;
  const int from = vectors * part >> split, upto = vectors * (part + 1) >> split;
  const int64_t offset = b.p.layout.rows + (static_cast<int64_t>(row) * vectors + from) * 16;
  const bool sends_scales = part == 0 && scales_with_rows(b);
  if (sends_scales) send_scales(b, peer, row, staged);
  b.peers.put(peer, offset, reinterpret_cast<const uint4*>(staged) + from, upto - from, b.lane);
  if (part != 0) return;
  if (!sends_scales && is_fp8(s.format)) put_scales(b, peer, local, row, staged);
  if (b.p.names_sources && b.lane == 0) b.peers.write(peer, b.p.layout.sources + 4LL * row, b.rank << 16 | token);
}

}  // namespace macs::cuda
