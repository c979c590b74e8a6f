// fused_dispatch: score, exchange, clip, cast and send the rows of a MoE layer in one launch.
//
// Problem:     R ranks of one NVLink domain with up to 1023 tokens each; [T, H] bf16 in, rows packed by expert out. Bound by
//              latency at small T, by reading a row and writing its copies at large T.
// Algorithm:   a block reads its tokens' rows once and keeps them, cast, in shared memory. It scores them, tells every
//              rank what its assignments are (a letter each), and waits for everybody else's. From these all blocks
//              derive the same cuts; what re-routing changes is agreed upon within the rank, and then between ranks as
//              rows per expert. Every row's place at its receiver is then a prefix sum, so that rows are written once, to
//              where the experts read them. docs/fused_dispatch.md draws it.
// Grid:        (blocks of a rank, ranks of this launch), all at once (cooperative); 512 threads, one block a
//              multiprocessor.
// Determinism: all decisions are integers; a row's place depends on (source, token, slot) alone.
#include "fused_block.cuh"
#include "fused_decide.cuh"
#include "fused_send.cuh"
#include "fused_weight.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

// Before anything else: tables that start from zero, or are known. By the last threads: the first ones read rows.
__device__ __forceinline__ void clear_tables(const FusedBlock& b) {
  const int experts = b.p.shape.num_experts, thread = kFusedThreads - 1 - threadIdx.x;
  for (int j = thread; j < experts; j += kFusedThreads) {
    b.at<uint32_t>(b.args.desk.group_rows)[j] = 0;
    b.at<int>(b.args.desk.group_units)[j] = 0;
    b.at<uint32_t>(b.args.desk.own_rows)[j] = 0;
    b.bound_of()[j] = b.p.scope == Scope::kExpert ? j : j / b.args.per_rank;
  }
  for (int n = thread; n < b.args.bounds; n += kFusedThreads) b.at<int>(b.args.desk.taken)[n] = 0;
  if (thread == 0) b.scalars() = {};
}

// This block's slots into shared memory, by its last threads: the first ones wait for rows. Behind a barrier they are there.
// The logits are sent for, in case that one of the slots has to look for another expert.
__device__ __forceinline__ void load_slots(const FusedBlock& b) {
  const FusedShape& s = b.p.shape;
  Assignments in = {};
  in.topk_ids = b.me.topk_ids, in.ids_are_i64 = b.p.ids_are_i64;
  const int first = b.first * s.top_k, here = (b.end - b.first) * s.top_k, thread = kFusedThreads - 1 - threadIdx.x;
  for (int i = thread; i < here; i += kFusedThreads) {
    b.at<int>(b.args.desk.ids)[i] = load_id(in, first + i);
    b.at<float>(b.args.desk.gates)[i] = __ldg(b.me.topk_weights + first + i);
  }
  if (b.p.reroute == Reroute::kNone || b.me.router_logits == nullptr) return;
  constexpr int kLine = 32;  // logits
  const float* const logits = b.me.router_logits + static_cast<int64_t>(b.first) * s.num_experts;
  for (int i = thread * kLine; i < (b.end - b.first) * s.num_experts; i += kFusedThreads * kLine) prefetch_l2(logits + i);
}

// Reads the rows of tokens [begin, end). `score`: their entropies into the region; `keep`: the rows, cast, into shared
// memory.
template <int kVectors, bool kExact>
__device__ __forceinline__ void read_rows(const FusedBlock& b, int begin, int end, bool score, bool keep) {
  const FusedShape& s = b.p.shape;
  const int group = b.warp / kRowWarps, thread = threadIdx.x % kRowThreads, vectors = s.hidden_size / 8;
  const int feature_bytes = RowBytes(s).features;
  const uint4* const hidden = static_cast<const uint4*>(b.me.hidden_states);
  int side = 0;  // of the parts, so that one barrier a row is enough
  if (begin > b.first) __syncthreads();
  for (int base = begin; base < end; base += kRowGroups, side ^= 1) {
    const int token = base + group;
    Part* const parts = b.at<Part>(b.args.desk.parts) + (side * kRowGroups + group) * kRowWarps;
    const bool inside = token < end, visual = inside && score && __ldg(b.me.segment + token) >= 0;
    if (inside) {
      Share<__nv_bfloat16, kVectors, kExact> share{thread, kRowThreads, vectors};
      share.load(hidden + static_cast<int64_t>(token) * vectors);
      if (visual) {
        const Part part = share.score();
        if (b.lane == 0) parts[b.warp % kRowWarps] = part;
      }
      if (keep) stage(share, s.format, feature_bytes, b.staged(token - begin));
    }
    __syncthreads();
    if (!inside || !score || thread != 0) continue;
    const float entropy = visual ? entropy_of_parts<kRowWarps>(parts) : 0.0f;
    b.peers.send(b.me.rank, b.p.layout.entropy + 8LL * token, make_letter(__float_as_uint(entropy), b.patience.round));
  }
}

// One own assignment as the group needs to know it. `here`: which of this block's slots.
__device__ __forceinline__ Entry make_entry(const FusedBlock& b, const Assignments& in, int here) {
  const int* const ids = b.at<int>(b.args.desk.ids);
  const int token = here / in.top_k, expert = ids[here];
  if (expert < 0) return {0};
  if (expert >= in.num_experts) {
    report(b.patience, Fault::kBadExpert, b.me.rank, b.block, expert, in.num_experts - 1);
    return {0};
  }
  bool leads = true;
  for (int other = token * in.top_k; other < here; ++other) leads &= ids[other] < 0;
  const Slot slot = {b.first + token, expert, __ldg(b.me.segment + b.first + token),
                     b.at<float>(b.args.desk.gates)[here], b.at<float>(b.args.desk.weight)[token], true};
  return Entry::of(expert, bucket_of_slot(in, slot), slot.text(), leads, fixed_weight(slot.weight));
}

// This block's assignments to every rank.
__device__ inline void tell_assignments(const FusedBlock& b) {
  const FusedShape& s = b.p.shape;
  Assignments in = {};
  in.top_k = s.top_k, in.num_experts = s.num_experts, in.bucket_bits = b.p.bucket_bits, in.importance = b.p.importance;
  const int first = b.first * s.top_k, here = (b.end - b.first) * s.top_k;
  const int64_t row = b.p.layout.entries + 8LL * (b.me.rank * b.most_slots() + first);
  for (int i = threadIdx.x; i < here; i += kFusedThreads) {
    const uint64_t letter = make_letter(make_entry(b, in, i).bits, b.patience.round);
    for (int peer = 0; peer < s.num_ranks; ++peer) b.peers.send(peer, row + 8LL * i, letter);
  }
  if (b.block != 0) return;
  for (int peer = threadIdx.x; peer < s.num_ranks; peer += kFusedThreads) {
    b.peers.send(peer, b.p.layout.tokens + 8LL * b.me.rank, make_letter(b.me.num_tokens, b.patience.round));
  }
}

// From the group's assignments to the place of every kept row.
template <int kKeys>
__device__ inline bool decide(const FusedBlock& b) {
  if (!hear_assignments(b)) return false;
  b.stamp(5);
  const int* const sums = b.scalars().sums;
  const Capacity capacity(b.args.threshold, make_int4(sums[0], sums[1], sums[2], sums[3]));
  const bool cuts = find_exceeded(b, capacity);
  if (cuts) {
    find_shifts(b, capacity);
    if (!find_cuts(b)) return false;
    b.stamp(6);
    clip_own(b);
    b.stamp(7);
    if (!reroute_own<kKeys>(b)) return false;
  } else {
    keep_all(b);
  }
  b.stamp(8);
  count_own(b);
  if (cuts && !exchange_counts(b)) return false;
  b.stamp(9);
  return place_experts(b);
}

// A rank that gave up sends nothing and says so.
__device__ inline void drop_tokens(const FusedBlock& b) {
  const int end = b.end * b.p.shape.top_k;
  for (int slot = b.first * b.p.shape.top_k + threadIdx.x; slot < end; slot += kFusedThreads) {
    b.own<int32_t>(b.p.layout.positions)[slot] = -1;
    b.me.new_weights[slot] = 0.0f;
    if (b.p.ids_are_i64) {
      static_cast<int64_t*>(b.me.new_ids)[slot] = -1;
    } else {
      static_cast<int32_t*>(b.me.new_ids)[slot] = -1;
    }
  }
}

// All tokens of the block, as many at a time as shared memory holds; the first of them lie there already.
template <int kVectors, bool kExact>
__device__ __forceinline__ void send(const FusedBlock& b) {
  b.stamp(10);
  find_destinations(b);
  b.stamp(11);
  for (int begin = b.first; begin < b.end; begin += b.args.staged_rows) {
    const int end = min(begin + b.args.staged_rows, b.end);
    if (begin > b.first) read_rows<kVectors, kExact>(b, begin, end, false, true);
    put_rows(b, begin, end);
  }
  b.signal_all(Flags::kRows);
  b.stamp(12);
}

template <int kVectors, bool kExact, int kKeys>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_dispatch_kernel(const __grid_constant__ FusedArgs args) {
  const FusedRank& me = args.p.many != nullptr ? args.p.many[blockIdx.y] : args.p.one;
  FusedBlock b(args, me, dynamic_shared());
  uint32_t* const round = b.own<uint32_t>(args.p.layout.round);
  b.patience.round = __ldcg(round) + 1;
  b.stamp(0);
  clear_tables(b);
  load_slots(b);
  const bool score = args.p.needs_entropy;
  const int kept = min(b.first + args.staged_rows, b.end);
  read_rows<kVectors, kExact>(b, b.first, kept, score, true);
  // More rows than shared memory holds are scored now and read again when they are sent.
  if (score && kept < b.end) read_rows<kVectors, kExact>(b, kept, b.end, true, false);
  __syncthreads();  // tables are cleared, slots loaded
  b.stamp(1);
  bool ok = weigh_tokens(b);
  b.stamp(2);
  if (ok) {
    tell_assignments(b);
    b.stamp(3);
    ok = decide<kKeys>(b);
  }
  if (ok) {
    send<kVectors, kExact>(b);
    write_tokens(b);
  } else {
    drop_tokens(b);
  }
  if (ok && b.block == b.num_blocks - 1) write_counts(b);
  if (b.block != 0) return;
  write_received(b, ok);
  b.stamp(13);
  if (args.p.phase == Phase::kSend) return;
  if (ok && !b.await_all(Flags::kRows, Fault::kRows)) write_received(b, false);
  b.stamp(14);
  if (threadIdx.x == 0) *round = b.patience.round;  // every block has read it: their rows are here
}

// The second phase: until everybody's rows are here.
__global__ void __launch_bounds__(kFusedThreads, 1) fused_receive_kernel(const __grid_constant__ FusedArgs args) {
  const FusedRank& me = args.p.many != nullptr ? args.p.many[blockIdx.y] : args.p.one;
  FusedBlock b(args, me, dynamic_shared());
  uint32_t* const round = b.own<uint32_t>(args.p.layout.round);
  b.patience.round = __ldcg(round) + 1;
  if (!b.await_all(Flags::kRows, Fault::kRows)) write_received(b, false);
  __syncthreads();
  if (threadIdx.x == 0) *round = b.patience.round;
}

FusedDesk make_desk(const FusedDispatchParams& p, int num_bounds, int block_tokens, bool keeps_group, int& bytes) {
  int at = 0;
  const auto take = [&](int64_t size) {
    const int mine = at;
    at += static_cast<int>((size + 31) / 32 * 32);
    return mine;
  };
  const int64_t experts = p.shape.num_experts, top_k = p.shape.top_k, buckets = num_buckets(p.bucket_bits);
  const int64_t levels = kCutsAtOnce * 2 * 2 * buckets, counts = 6 * experts;
  const FusedDesk desk = {
      .group_rows = take(4 * experts),
      .group_units = take(4 * experts),
      .own_rows = take(4 * experts),
      .shift = take(4 * experts),
      .bound_of = take(4 * experts),
      .starts = take(4 * experts),
      .raw = take(sizeof(RawCut) * num_bounds),
      .room = take(4 * num_bounds),
      .taken = take(4 * num_bounds),
      .over = take(4 * num_bounds),
      .place = take(4 * num_bounds),
      .counted = take(4 * kFusedWarps * num_bounds),
      .running = take(4 * kFusedWarps * num_bounds),
      .levels = take(4 * (levels > counts ? levels : counts)),
      .current = take(2 * p.shape.max_tokens * top_k),
      .entries = take(4 * p.shape.max_tokens * top_k * (keeps_group ? p.shape.num_ranks : 1)),
      .entropies = take(4 * p.shape.max_tokens),
      .ids = take(4 * block_tokens * top_k),
      .gates = take(4 * block_tokens * top_k),
      .dest = take(4 * block_tokens * top_k),
      .weight = take(4 * block_tokens),
      .parts = take(2 * kRowGroups * kRowWarps * sizeof(Part)),
      .tokens = take(4 * p.shape.num_ranks),
      .scalars = take(sizeof(FusedScalars)),
      .staged = take(0),
  };
  bytes = at;
  return desk;
}

constexpr int kMostKept = 8192;  // assignments of a group in shared memory: 32 KB

bool is_supported(const FusedDispatchParams& p) {
  const FusedShape& s = p.shape;
  const bool sizes = s.num_ranks >= 1 && s.num_ranks <= kMaxPeers && s.num_experts >= 1 &&
                     s.num_experts <= kMaxFusedExperts && s.num_experts % s.num_ranks == 0 && s.top_k >= 1 &&
                     s.top_k <= kMaxFusedTopK && s.max_tokens >= 1 && s.max_tokens <= kMaxFusedTokens &&
                     s.num_blocks >= 1 && s.num_blocks <= kMaxFusedBlocks;
  const bool rows = s.hidden_size >= 2048 && s.hidden_size <= 8192 && s.hidden_size % 512 == 0 && s.alignment >= 1 &&
                    s.expert_rows >= 0 && s.max_rows >= 1 &&
                    static_cast<int64_t>(s.expert_rows) * (s.num_experts / s.num_ranks) <= s.max_rows;
  return sizes && rows && p.launched >= 1 && p.launched <= s.num_ranks && p.one.num_tokens <= s.max_tokens &&
         p.reroute_rounds >= 0 && p.reroute_rounds <= kMaxFusedRerouteRounds && p.bucket_bits >= 1 && p.bucket_bits <= 4;
}

FusedArgs make_args(const FusedDispatchParams& p, int& shared_bytes) {
  FusedArgs args = {};
  args.p = p;
  args.bounds = num_bounds(p.scope, p.shape.num_experts, p.shape.num_ranks);
  args.per_rank = p.shape.num_experts / p.shape.num_ranks;
  ClipThresholdParams& t = args.threshold;
  t.modality = p.modality, t.num_experts = p.shape.num_experts, t.num_ranks = p.shape.num_ranks;
  t.bucket_bits = p.bucket_bits, t.scope = p.scope, t.load = p.load, t.reroute = p.reroute;
  t.protect_text = p.protect_text, t.gamma = p.gamma, t.rho = p.rho, t.alpha = p.alpha, t.c_min = p.c_min;
  const int block_tokens = (p.shape.max_tokens + p.shape.num_blocks - 1) / p.shape.num_blocks;
  int tables = 0;
  args.keeps_group = p.shape.num_ranks * p.shape.max_tokens * p.shape.top_k <= kMostKept;
  args.desk = make_desk(p, args.bounds, block_tokens, args.keeps_group, tables);
  args.row_stride = RowBytes(p.shape).all();
  const int fit = (max_shared_bytes() - tables) / args.row_stride;
  args.staged_rows = fit < block_tokens ? fit : block_tokens;
  shared_bytes = tables + args.staged_rows * args.row_stride;
  return args;
}

using Kernel = void (*)(FusedArgs);

template <int kVectors, bool kExact>
Kernel kernel_for_experts(int num_experts) {
  return num_experts <= 4 * kWarp ? fused_dispatch_kernel<kVectors, kExact, 4>
                                  : fused_dispatch_kernel<kVectors, kExact, 8>;
}

// The shares of a row must be those of entropy_score.
Kernel kernel_for(const FusedShape& s) {
  if (s.hidden_size == 2048) return kernel_for_experts<2, true>(s.num_experts);
  if (s.hidden_size == 7168) return kernel_for_experts<7, true>(s.num_experts);
  return kernel_for_experts<8, false>(s.num_experts);
}

}  // namespace

cudaError_t launch_fused_dispatch(const FusedDispatchParams& p, cudaStream_t stream) {
  if (!is_supported(p)) return cudaErrorInvalidValue;
  int shared_bytes = 0;
  const FusedArgs args = make_args(p, shared_bytes);
  if (p.phase == Phase::kReceive) {
    return launch(fused_receive_kernel, {.grid = 1, .block = kFusedThreads, .rows = p.launched}, args, stream);
  }
  if (args.staged_rows < 1) return cudaErrorInvalidValue;
  const Kernel kernel = kernel_for(p.shape);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes());
  if (error != cudaSuccess) return error;
  const Shape shape = {.grid = p.shape.num_blocks,
                       .block = kFusedThreads,
                       .rows = p.launched,
                       .shared_bytes = static_cast<size_t>(shared_bytes),
                       .cooperative = true};
  return launch(kernel, shape, args, stream);
}

}  // namespace macs::cuda
