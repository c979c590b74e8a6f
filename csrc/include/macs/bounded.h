// What lies between a dispatch that counts nothing on the host and a grouped GEMM over a row buffer of fixed size:
// parameters of the permutation to experts and back. No torch.
//
// A row is one assignment of a received token to one of this rank's experts. Experts lie one behind the other, each from
// a multiple of `tile` rows on, its rows in the order of their tokens.
#pragma once
#include <cstdint>

#include "macs/level.h"

namespace macs {

constexpr int kMaxBoundedExperts = 1024;  // of a rank
constexpr int kMaxBoundedTopK = 32;
constexpr int kBoundedTokens = 256;       // that a block counts
// In `place`: an empty slot or another rank's expert; and an assignment that should have had a row and got none: there
// is no such expert, the token has another slot for it, or the buffer is full.
constexpr int32_t kNowhere = -1, kLost = -2;

struct BoundedPermuteParams {
  const int64_t* topk_ids;  // [N, K] this rank's experts from 0 on, negative = none; a token with none is skipped
  const void* tokens;       // [N, row_bytes]
  const float* scales;      // [N, num_scales] or nullptr
  int32_t* place;           // [N, K] out: row of each assignment, or one of the above
  int32_t* expert_end;      // [E_l] out: behind the last row of each expert, at most max_rows
  void* rows;               // [max_rows, row_bytes] out; rows that only fill a tile up are not written
  float* row_scales;        // [num_scales, max_rows] out, or nullptr
  int32_t* counts;          // [ceil(N / kBoundedTokens), E_l] scratch
  int32_t* lost;            // [1] lost assignments are added to it
  int64_t num_tokens, max_rows, row_bytes;  // row_bytes % 16 == 0, pointers aligned to 16 bytes
  int32_t top_k, num_experts, num_scales, tile;
};

struct BoundedGatherParams {
  const void* outputs;   // [max_rows, H] bf16
  const int32_t* place;  // [N, K] of the permutation
  const float* weights;  // [N, K]
  void* tokens;          // [N, H] bf16 out: sum of weight * output over a token's rows, in the order of its slots, f32
                         // fused multiply-adds, rounded once; not written for a token without any slot here
  int64_t num_tokens, max_rows, hidden_size;  // hidden_size % 8 == 0
  int32_t top_k;
};

MACS_HOST_DEVICE int64_t bounded_blocks(int64_t num_tokens) { return (num_tokens + kBoundedTokens - 1) / kBoundedTokens; }

inline bool fits(const BoundedPermuteParams& p) {
  const bool sizes = p.num_tokens >= 0 && p.max_rows >= 0 && p.max_rows <= INT32_MAX && p.num_scales >= 0 &&
                     p.row_bytes > 0 && p.row_bytes % 16 == 0 && p.top_k >= 1 && p.top_k <= kMaxBoundedTopK &&
                     p.num_experts >= 1 && p.num_experts <= kMaxBoundedExperts && p.tile >= 1;
  return sizes && p.num_tokens * p.top_k + static_cast<int64_t>(p.num_experts) * p.tile <= INT32_MAX;
}
inline bool fits(const BoundedGatherParams& p) {
  return p.num_tokens >= 0 && p.hidden_size > 0 && p.hidden_size % 8 == 0 && p.top_k >= 1 && p.top_k <= kMaxBoundedTopK;
}

}  // namespace macs
