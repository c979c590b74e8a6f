// The fused low-latency dispatch and combine: parameters, and the layout of the memory that the ranks share.
//
// One dispatch reads every hidden vector once, scores it, casts it, exchanges the group's assignments, derives the cuts,
// clips and re-routes, and writes the kept rows straight into the buffers of the ranks that hold their experts.
// docs/design/fused_dispatch.md has the protocol; docs/design/method.md what is computed. No torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "macs/carver.h"
#include "macs/level.h"
#include "macs/params.h"

namespace macs {

constexpr int kMaxPeers = 16;          // ranks of one NVLink domain that a kernel's parameters name
constexpr int kMaxFusedTokens = 1023;  // of a rank
constexpr int kMaxFusedTopK = 16;
constexpr int kMaxFusedSlots = 16352;  // assignments of a rank: what a thread may see of 16 ranks fits into 13 bits
constexpr int kMaxFusedExperts = 256;
constexpr int kMaxFusedBlocks = 256;   // of a rank
constexpr int kMaxFusedRerouteRounds = 60;
constexpr int kMinFusedHidden = 2048, kMaxFusedHidden = 8192, kFusedHiddenStep = 512;
constexpr int kStamps = 24;
constexpr int kScaleFeatures = 128;    // features that share an FP8 scale

// What a row looks like on its way. kFp8: e4m3 with an f32 scale per 128 features; kFp8PowerOfTwo: scales rounded up to
// powers of two; kFp8Ue8m0: those as their exponents, four in a word, as DeepGEMM takes them.
enum class RowFormat : int32_t { kBFloat16 = 0, kFp8 = 1, kFp8PowerOfTwo = 2, kFp8Ue8m0 = 3 };

// Which half of the dispatch a launch does. SGLang sends before and receives behind what it overlaps with.
enum class Phase : int32_t { kBoth = 0, kSend = 1, kReceive = 2 };

// Where a wait gave up, or what was found wrong.
enum class Fault : int32_t {
  kNone = 0,
  kEntropies,    // a block of this rank never scored its tokens, or a peer never sent what its tokens weigh
  kAssignments,  // a peer never sent its assignments
  kCuts,         // a block of this rank never sent its cuts
  kProposals,    // a block of this rank never proposed
  kCounts,       // a peer never sent its rows per expert
  kRows,         // a peer never finished its rows
  kOutputs,      // a peer never offered its experts' outputs
  kBadTokens,    // a peer claims more tokens than there may be
  kBadExpert,    // a peer names an expert that does not exist
  kBadCount,     // a peer claims more rows for an expert than it has tokens
  kOverflow,     // more rows than the buffer holds
  kValues,       // a peer never sent its part of a sum (peer_all_reduce.h)
};

template <>
constexpr std::string_view kNames<RowFormat>{"bf16,fp8,fp8_power_of_two,fp8_ue8m0"};
template <>
constexpr std::string_view kNames<Phase>{"both,send,receive"};
template <>
constexpr std::string_view kNames<Fault>{
    "none,entropies,assignments,cuts,proposals,counts,rows,outputs,bad tokens,bad expert,bad count,overflow,values"};
static_assert(count_of<Fault>() == static_cast<int>(Fault::kValues) + 1);

// One record a rank. `fault` is set last, once; the host clears it.
struct FusedStatus {
  int32_t fault;     // Fault
  int32_t peer;      // the rank that was waited for
  int32_t block;     // of that rank, -1: any
  int32_t layer;     // of the launch that waited, as its caller names it: a graph repeats epochs that no host counts
  uint32_t epoch;    // the dispatch it happened in
  uint32_t limit_ms; // how long the wait was to go on
  int64_t seen, expected;
};

// What the sizes of a rank's region depend on; the same on every rank.
struct FusedShape {
  int32_t num_ranks, num_experts, top_k, max_tokens;  // max_tokens: of a rank
  int32_t hidden_size;
  int32_t num_blocks;   // of a rank's dispatch and combine
  RowFormat format;
  int32_t expert_rows;  // rows that each expert has room for; 0: experts packed behind one another
  int32_t max_rows;     // rows of the whole buffer
  int32_t alignment;    // packed: an expert starts at a multiple of it
};

// Byte offsets into a rank's region; every rank has the same. Zero-filled before the first launch.
// An LL word is 64 bits: a 32-bit value, and above it the epoch that it is of (ll_word.cuh).
// Peers write: flags, tokens, entries, weighed, weights, counts, rows, row_scales, sources, and scales where these do not come
// with the rows. Peers read: outputs. The rest is the rank's own.
struct FusedLayout {
  int64_t flags;      // [2, R, blocks] u32 epochs: rows, outputs
  int64_t tokens;     // [R] LL words: tokens of each source
  int64_t entries;    // [R, max_tokens * K] LL words: packed assignments (csrc/cuda/fused_entry.cuh)
  int64_t weighed;    // the same with what follows from the entropies, where that decides
  int64_t weights;    // [2, R] LL words by the epoch's parity: the weight of each source's visual tokens, where only sums ask
  int64_t counts;     // [2, R, E] LL words by the epoch's parity: rows that each source sends to each expert
  int64_t rows;       // [max_rows, H] bf16 or e4m3
  int64_t row_scales; // [2, max_rows, row_scale_stride] u32 by the epoch's parity: the words of a row's scales, where these come
                      // with the rows; else 0
  int64_t scales;     // [H / 128, max_rows] f32, or [H / 512, max_rows] i32; per expert where expert_rows > 0
  int64_t outputs;    // [max_rows, H] bf16, what combine reads
  int64_t sources;    // [max_rows] i32 (source rank << 16 | token), where that is asked for
  int64_t barrier;    // [blocks] u32
  int64_t entropy;    // [max_tokens] LL words: f32
  int64_t cuts;       // [E, 4] LL words: the cuts of many bounds, found by a block each (csrc/cuda/fused_cut.cuh)
  int64_t wanted;     // [2, max_tokens * K] i32 proposals, by round
  int64_t positions;  // [max_tokens, K] i32 row of each kept assignment at its expert's rank, -1: none
  int64_t received;   // [E_l] i32 rows of each local expert
  int64_t starts;     // [E_l] i32 first row of each local expert
  int64_t epoch;      // u32
  int64_t stamps;     // [blocks, kStamps] u64 cycles at the stages, where the kernels were built with MACS_STAMPS
  int64_t status;     // FusedStatus
  int64_t bytes;      // of the whole region, a multiple of 256
};

MACS_HOST_DEVICE bool is_fp8(RowFormat format) { return format != RowFormat::kBFloat16; }
MACS_HOST_DEVICE int64_t scale_words(const FusedShape& s) {
  if (!is_fp8(s.format)) return 0;
  const int64_t scales = s.hidden_size / kScaleFeatures;
  return s.format == RowFormat::kFp8Ue8m0 ? (scales + 3) / 4 : scales;
}
// Words between the scales of two rows: whole sectors of 32 bytes.
MACS_HOST_DEVICE int64_t row_scale_stride(const FusedShape& s) { return (scale_words(s) + 7) / 8 * 8; }

// Whether the kernels take these sizes.
inline bool is_supported(const FusedShape& s) {
  const bool sizes = s.num_ranks >= 1 && s.num_ranks <= kMaxPeers && s.num_experts >= 1 &&
                     s.num_experts <= kMaxFusedExperts && s.num_experts % s.num_ranks == 0 && s.top_k >= 1 &&
                     s.top_k <= kMaxFusedTopK && s.max_tokens >= 1 && s.max_tokens <= kMaxFusedTokens &&
                     s.max_tokens * s.top_k <= kMaxFusedSlots && s.num_blocks >= 1 && s.num_blocks <= kMaxFusedBlocks;
  const bool rows = s.hidden_size >= kMinFusedHidden && s.hidden_size <= kMaxFusedHidden &&
                    s.hidden_size % kFusedHiddenStep == 0 && s.alignment >= 1 && s.expert_rows >= 0 && s.max_rows >= 1 &&
                    static_cast<int64_t>(s.expert_rows) * (s.num_experts / s.num_ranks) <= s.max_rows;
  return sizes && rows;
}

inline FusedLayout fused_layout(const FusedShape& s) {
  FusedLayout layout = {};
  Carver<int64_t> region(256);
  const int64_t slots = static_cast<int64_t>(s.max_tokens) * s.top_k, rows = s.max_rows;
  const int64_t local = s.num_experts / s.num_ranks;
  layout.flags = region.take(2 * 4LL * s.num_ranks * s.num_blocks);
  layout.tokens = region.take(8LL * s.num_ranks);
  layout.entries = region.take(8LL * s.num_ranks * slots);
  layout.weighed = region.take(8LL * s.num_ranks * slots);
  layout.weights = region.take(2 * 8LL * s.num_ranks);
  layout.counts = region.take(2 * 8LL * s.num_ranks * s.num_experts);
  layout.rows = region.take(rows * s.hidden_size * (is_fp8(s.format) ? 1 : 2));
  layout.row_scales = region.take(2 * 4LL * rows * row_scale_stride(s));
  layout.scales = region.take(rows * scale_words(s) * 4);
  layout.outputs = region.take(rows * s.hidden_size * 2);
  layout.sources = region.take(rows * 4);
  layout.barrier = region.take(4LL * s.num_blocks);
  layout.entropy = region.take(8LL * s.max_tokens);
  layout.cuts = region.take(4 * 8LL * s.num_experts);
  layout.wanted = region.take(2 * 4 * slots);
  layout.positions = region.take(4 * slots);
  layout.received = region.take(4 * local);
  layout.starts = region.take(4 * local);
  layout.epoch = region.take(4);
  layout.stamps = region.take(8LL * s.num_blocks * kStamps);
  layout.status = region.take(sizeof(FusedStatus));
  layout.bytes = region.bytes();
  return layout;
}

// One rank's part of a dispatch. Decisions as of `ClipThresholdParams` and `ClipApplyParams`, whose tables the kernel makes
// itself; here are their options and the rank's own inputs and outputs.
struct FusedRank {
  char* region[kMaxPeers];         // of every rank, as this rank sees it
  const void* hidden_states;       // [T, H] bf16
  const void* topk_ids;            // [T, K] i32 or i64
  const float* topk_weights;       // [T, K]
  const int32_t* segment;          // [T]
  const float* router_logits;      // [T, E] or nullptr
  void* new_ids;                   // [T, K] out, dtype of topk_ids
  float* new_weights;              // [T, K] out
  float* weight;                   // [T] out
  int32_t* counts;                 // [3, E, 2] out: kept, clipped, re-routed in; by (expert, text)
  int32_t* cut;                    // [NB, 4] out: level, quota, room, bound
  int32_t* sums;                   // [4] out: N, N_visual, W_visual, W of the group
  int32_t* row_experts;            // [max_rows] out: local expert of each row, -1 for none; nullptr: not wanted
  const void* outputs;             // combine: [max_rows, H] bf16 of this rank's experts; nullptr: they lie in the region
  void* combined;                  // combine: [T, H] bf16 out
  int32_t num_tokens;
  int32_t rank;
};

struct FusedDispatchParams {
  FusedShape shape;
  FusedLayout layout;
  const int8_t* modality;  // [E]
  Policy policy;
  int32_t num_segments;
  bool ids_are_i64;
  bool same_device;  // all regions lie on this device: signals need not reach further
  // FP8: a row's scales come with it, in one piece, and its receiver puts them in their places. Else its sender does, a store
  // of 4 bytes each: a packet of its own on NVLink. The same on all ranks, and in both phases.
  bool scales_with_rows;
  bool names_sources;  // `sources` are written: a store of 4 bytes a row. No kernel reads them
  Phase phase;
  int32_t layer;  // for the record of a fault
  uint64_t timeout_ns;
  FusedRank one;           // the rank of this launch
  const FusedRank* many;   // or [launched] of them in device memory, which it plays all: a row of the grid each
  int32_t launched;
};

struct FusedCombineParams {
  FusedShape shape;
  FusedLayout layout;
  FusedRank one;           // new_ids and new_weights as dispatch left them
  const FusedRank* many;   // as of the dispatch
  bool ids_are_i64, same_device;
  Phase phase;
  int32_t layer;
  uint64_t timeout_ns;
  int32_t launched;
};

}  // namespace macs
