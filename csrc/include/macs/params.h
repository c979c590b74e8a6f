// Parameter structures of the operators (but for those of replicas: replicas.h): raw pointers and sizes, shared by the CPU and the CUDA launchers.
// docs/design/method.md defines what each operator computes; the names here are the names there. No torch.
#pragma once
#include <cstdint>

#include "macs/policy.h"

namespace macs {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kWeightOne = 256;         // fixed-point 1.0 of an entropy weight
constexpr int kOctaves = 16;            // importance octaves below 1.0 that the buckets cover
constexpr int kMinBucketBits = 1, kMaxBucketBits = 4;
constexpr int kNumSums = 4;             // N, N_visual, W_visual, W behind the [E, 2, B] cells
constexpr float kStdEpsilon = 1e-6f;    // nats, against a segment whose entropies are all equal

struct EntropyScoreParams {
  const void* hidden_states;  // [T, H] dtype, row-major
  const int32_t* segment;     // [T]
  float* entropy;             // [T] out
  int64_t num_tokens, hidden_size;
  DType dtype;
};

struct EntropyWeightParams {
  const float* entropy;    // [T]; nullptr where nothing depends on entropies: visual tokens weigh 0.5
  const int32_t* segment;  // [T]
  float* weight;           // [T] out
  int64_t num_tokens, num_segments;
  float delta;
};

// What an assignment counts and where it stands in the order of giving up; common to histogram and apply.
struct Assignments {
  const void* topk_ids;       // [T, K] i32 or i64
  const float* topk_weights;  // [T, K]
  const float* weight;        // [T]
  const int32_t* segment;     // [T]
  int64_t num_tokens;
  int32_t top_k;
  bool ids_are_i64;
  Policy policy;
};

struct LoadHistogramParams {
  Assignments in;
  int32_t* histogram;  // [E * 2 * B + kNumSums] out
};

struct ClipThresholdParams {
  const int32_t* own;      // [E * 2 * B + kNumSums]
  const int32_t* group;    // the same, summed over the EP group
  const int8_t* modality;  // [E] in {-1, 0, +1}
  int32_t* shift;          // [E] out
  int32_t* cut;            // [NB, 4] out: level, quota, room, bound
  Policy policy;
};

struct ClipApplyParams {
  Assignments in;
  const void* router_logits;  // [T, E] or nullptr; only clipped tokens' are read
  const int32_t* shift;       // [E]
  const int32_t* cut;         // [NB, 4]
  void* new_ids;              // [T, K] out, dtype of topk_ids
  float* new_weights;         // [T, K] out
  int32_t* counts;            // [3, E, 2] out: kept, clipped, re-routed in; by (expert, text)
  DType logits_dtype;         // on a CPU: f32
  const float* selection;     // [T, E] of selection_score, or nullptr: candidates are ordered by their logits
};

// How the router ranks a token's experts, where that is not the order of their logits.
struct SelectionScoreParams {
  const void* router_logits;     // [T, E]
  const float* correction_bias;  // [E] or nullptr
  float* selection;              // [T, E] out; -infinity: no candidate
  int64_t num_tokens;
  int32_t num_experts;
  int32_t num_groups, topk_groups;  // E % num_groups == 0; topk_groups = num_groups: experts of any group
  Scoring scoring;
  DType logits_dtype;  // on a CPU: f32
};

}  // namespace macs
