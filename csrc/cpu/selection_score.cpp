// How a router ranks a token's experts (docs/design/method.md, 5): score, plus bias, within the best groups.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "macs/cpu.h"

namespace macs::cpu {
namespace {

constexpr float kClosed = -std::numeric_limits<float>::infinity();

float open_or_closed(float x) { return std::isfinite(x) ? x : kClosed; }

// Logits to probabilities; what is not finite stays closed and has no share.
void softmax(float* score, int32_t experts) {
  const float most = *std::max_element(score, score + experts);
  float sum = 0.0f;
  for (int32_t j = 0; j < experts; ++j) {
    if (score[j] == kClosed) continue;
    score[j] = std::exp(score[j] - most);
    sum += score[j];
  }
  for (int32_t j = 0; j < experts; ++j) score[j] /= sum;
}

float activated(Scoring scoring, float x) {
  if (scoring == Scoring::kSigmoid) return 1.0f / (1.0f + std::exp(-x));
  if (scoring == Scoring::kSqrtSoftplus) return std::sqrt(std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x))));
  return x;
}

void score_experts(const SelectionScoreParams& p, const float* logits, float* score) {
  for (int32_t j = 0; j < p.num_experts; ++j) score[j] = open_or_closed(logits[j]);
  if (p.scoring == Scoring::kSoftmax) softmax(score, p.num_experts);
  for (int32_t j = 0; j < p.num_experts; ++j) {
    if (score[j] == kClosed) continue;
    const float bias = p.correction_bias != nullptr ? p.correction_bias[j] : 0.0f;
    score[j] = open_or_closed(activated(p.scoring, score[j]) + bias);
  }
}

// The group's best expert; with a bias the sum of its best two.
float group_score(const float* score, int32_t experts, bool two) {
  float best = kClosed, second = kClosed;
  for (int32_t j = 0; j < experts; ++j) {
    second = std::max(second, std::min(best, score[j]));
    best = std::max(best, score[j]);
  }
  return two ? best + second : best;
}

// Of equal groups the first is better. groups, order: [num_groups] of scratch.
void close_other_groups(const SelectionScoreParams& p, float* score, float* groups, int32_t* order) {
  const int32_t width = p.num_experts / p.num_groups;
  for (int32_t g = 0; g < p.num_groups; ++g) {
    groups[g] = group_score(score + g * width, width, p.correction_bias != nullptr);
    order[g] = g;
  }
  std::stable_sort(order, order + p.num_groups, [&](int32_t a, int32_t b) { return groups[a] > groups[b]; });
  for (int32_t i = p.topk_groups; i < p.num_groups; ++i) {
    std::fill_n(score + order[i] * width, width, kClosed);
  }
}

}  // namespace

void selection_score(const SelectionScoreParams& p, const ParallelFor& parallel_for) {
  const auto* logits = static_cast<const float*>(p.router_logits);
  parallel_for(p.num_tokens, 1 + 8192 / p.num_experts, [&](int64_t begin, int64_t end) {
    std::vector<float> groups(p.num_groups);
    std::vector<int32_t> order(p.num_groups);
    for (int64_t t = begin; t < end; ++t) {
      float* const score = p.selection + t * p.num_experts;
      score_experts(p, logits + t * p.num_experts, score);
      if (p.topk_groups < p.num_groups) close_other_groups(p, score, groups.data(), order.data());
    }
  });
}

}  // namespace macs::cpu
