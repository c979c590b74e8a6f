// The permutation to experts and back (macs/bounded.h), readable.
#include "macs/bounded.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "macs/cpu.h"

namespace macs::cpu {
namespace {

// The slot's expert; kNowhere; or kLost: no such expert, or the token's second slot for it.
int32_t expert_of(const BoundedPermuteParams& p, int64_t token, int32_t slot) {
  const int64_t* ids = p.topk_ids + token * p.top_k;
  if (ids[slot] < 0) return kNowhere;
  const bool again = std::find(ids, ids + slot, ids[slot]) != ids + slot;
  return ids[slot] >= p.num_experts || again ? kLost : static_cast<int32_t>(ids[slot]);
}

void copy_token(const BoundedPermuteParams& p, int64_t token, int64_t row) {
  std::memcpy(static_cast<char*>(p.rows) + row * p.row_bytes,
              static_cast<const char*>(p.tokens) + token * p.row_bytes, p.row_bytes);
  for (int32_t s = 0; s < p.num_scales; ++s) p.row_scales[s * p.max_rows + row] = p.scales[token * p.num_scales + s];
}

float float_of(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint16_t bf16_of(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void bounded_permute(const BoundedPermuteParams& p) {
  std::vector<int64_t> next(p.num_experts, 0);  // first each expert's rows, then where its next row goes
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int32_t k = 0; k < p.top_k; ++k) {
      if (const int32_t expert = expert_of(p, t, k); expert >= 0) ++next[expert];
    }
  }
  int64_t start = 0;
  for (int32_t e = 0; e < p.num_experts; ++e) {
    const int64_t rows = next[e];
    p.expert_end[e] = static_cast<int32_t>(std::min(start + rows, p.max_rows));
    next[e] = start;
    start += (rows + p.tile - 1) / p.tile * p.tile;
  }
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int32_t k = 0; k < p.top_k; ++k) {
      int32_t& place = p.place[t * p.top_k + k];
      place = expert_of(p, t, k);
      if (place >= 0) {
        const int64_t row = next[place]++;
        place = row < p.max_rows ? static_cast<int32_t>(row) : kLost;
      }
      if (place >= 0) copy_token(p, t, place);
      *p.lost += place == kLost;
    }
  }
}

void bounded_gather(const BoundedGatherParams& p) {
  const auto* outputs = static_cast<const uint16_t*>(p.outputs);
  auto* tokens = static_cast<uint16_t*>(p.tokens);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int32_t* place = p.place + t * p.top_k;
    if (std::all_of(place, place + p.top_k, [](int32_t row) { return row == kNowhere; })) continue;
    for (int64_t h = 0; h < p.hidden_size; ++h) {
      float sum = 0.0f;
      for (int32_t k = 0; k < p.top_k; ++k) {
        if (place[k] >= 0) sum = std::fma(float_of(outputs[place[k] * p.hidden_size + h]), p.weights[t * p.top_k + k], sum);
      }
      tokens[t * p.hidden_size + h] = bf16_of(sum);
    }
  }
}

}  // namespace macs::cpu
