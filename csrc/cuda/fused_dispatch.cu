// fused_dispatch: score, exchange, clip, cast and send the rows of a MoE layer in one launch.
//
// Problem:     R ranks of one NVLink domain with up to 1023 tokens each; [T, H] bf16 in, rows packed by expert out. Bound by
//              latency at small T, by reading a row and writing its copies at large T.
// Algorithm:   a block sends for its tokens' rows, and while they come sends every rank its assignments (an LL word
//              each). Rows are read once, scored, cast and kept in shared memory. Rows per expert, which all blocks count
//              from everybody's LL words, mostly show that no bound is exceeded. Where one may be, assignments are sent
//              again with their weights, and all blocks derive the same cuts; what re-routing changes is agreed upon
//              within the rank, and then between ranks as rows per expert. Every row's place at its receiver is then a
//              prefix sum, so that rows are written once, to where the experts read them. docs/design/fused_dispatch.md draws it.
// Grid:        (blocks of a rank, ranks of this launch), all at once (cooperative); 512 threads, one block a
//              SM.
// Determinism: all decisions are integers; a row's place depends on (source, token, slot) alone.
#include <algorithm>

#include "fused_block.cuh"
#include "fused_decide.cuh"
#include "fused_exchange.cuh"
#include "fused_report.cuh"
#include "fused_scales.cuh"
#include "fused_send.cuh"
#include "fused_weight.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

// Tables that start from zero, or are known. Not by the first threads, which read rows, nor by the last, which send.
__device__ __forceinline__ void clear_tables(const FusedBlock& b) {
  const int experts = b.p.shape.num_experts, thread = (threadIdx.x + kFusedThreads - kRowThreads) % kFusedThreads;
  static_assert(kNamedExperts <= kFusedThreads);
  const int modality = thread < experts ? __ldg(b.p.modality + thread) : 0;  // under way meanwhile
  if (thread < kNamedExperts) {
    b.group_rows()[thread] = 0;
    b.group_units()[thread] = 0;
    b.expert_cut()[thread] = 0;
  }
  if (thread < experts) {
    b.at<uint32_t>(b.args.tables.own_rows)[thread] = 0;
    b.bound_of()[thread] = b.p.policy.scope == Scope::kExpert ? thread : b.args.by_per_rank.divide(thread);
  }
  if (b.p.policy.needs_entropy) {
    const int limbs = b.args.keeps_limbs ? b.p.num_segments * 2 * kLimbs : 0;
#pragma unroll 1
    for (int i = thread; i < limbs; i += kFusedThreads) limbs_of(b, 0)[i] = 0;
  } else {
    clear_cells(b, CutShare(b).size(), thread);
  }
  if (thread < experts) b.modality()[thread] = modality;
  if (thread == 0) {
    b.scalars() = {};
    b.scalars().faulty = gave_up_before(b.wait);
  }
}

// The logits of this block's tokens are sent for, in case that one of them has to look for another expert.
__device__ __forceinline__ void prefetch_logits(const FusedBlock& b) {
  if (b.p.policy.reroute == Reroute::kNone || b.me.router_logits == nullptr) return;
  constexpr int kLine = 32;  // logits
  const int experts = b.p.shape.num_experts;
  const float* const logits = b.me.router_logits + static_cast<int64_t>(b.first) * experts;
#pragma unroll 1
  for (int i = threadIdx.x * kLine; i < (b.end - b.first) * experts; i += kFusedThreads * kLine) prefetch_l2(logits + i);
}

// The rows of tokens [begin, end), four warps a row: sent for, then scored (the entropy into the region), then cast into
// shared memory. One is on its way while the one before is worked on.
template <int kVectors, bool kExact>
class RowReader {
 public:
  __device__ __forceinline__ RowReader(const FusedBlock& b, int begin, int end, bool score)
      : begin_(begin), end_(end), score_(score), next_(begin + b.warp / kRowWarps),
        share_{static_cast<int>(threadIdx.x) % kRowThreads, kRowThreads, b.p.shape.hidden_size / 8} {}

  __device__ __forceinline__ void ask(const FusedBlock& b) {
    visual_ = next_ < end_ && score_ && __ldg(b.me.segment + next_) >= 0;
    if (next_ < end_) share_.load(static_cast<const uint4*>(b.me.hidden_states) + static_cast<int64_t>(next_) * share_.num_vectors);
  }

  // Behind `ask`.
  __device__ __forceinline__ void read(const FusedBlock& b, bool keep) {
    const int group = b.warp / kRowWarps, feature_bytes = RowBytes(b.p.shape).features;
    int side = 0;  // of the parts, so that one barrier a row is enough
#pragma unroll 1
    for (int base = begin_; base < end_; base += kRowGroups, side ^= 1) {
      Part* const parts = b.at<Part>(b.args.tables.parts) + (side * kRowGroups + group) * kRowWarps;
      const int token = next_;
      const bool visual = visual_;
      if (visual) {
        const Part part = share_.score();
        if (b.lane == 0) parts[b.warp % kRowWarps] = part;
      }
      if (keep && token < end_) stage(share_, b.p.shape.format, feature_bytes, b.staged(token - begin_));
      next_ += kRowGroups;
      ask(b);
      if (score_) {
        __syncthreads();
        if (token < end_ && share_.first == 0) send_entropy(b, token, visual ? entropy_of_parts<kRowWarps>(parts) : 0.0f);
      }
    }
  }

 private:
  __device__ __forceinline__ void send_entropy(const FusedBlock& b, int token, float entropy) const {
    b.peers.send(b.rank, b.p.layout.entropy + 8LL * token, make_ll_word(__float_as_uint(entropy), b.wait.epoch));
  }

  const int begin_, end_;
  const bool score_;
  int next_;
  bool visual_;
  Share<__nv_bfloat16, kVectors, kExact> share_;
};

// Behind the first exchange, if weights may decide: those of the rank's tokens, to the other ranks with its assignments.
// False: somebody did not score.
__device__ inline bool exchange_weights(const FusedBlock& b) {
  if (!weigh_tokens(b)) return false;
  clear_cells(b, CutShare(b).size(), threadIdx.x);
  b.stamp(5);
  send_weighed(b);
  __syncthreads();
  b.stamp(6);
  return true;
}

// What is clipped of exceeded bounds and where it goes; then rows per expert anew. False: somebody did not take part.
template <int kKeys>
__device__ inline bool cut_rows(const FusedBlock& b) {
  find_shifts(b);
  if (!cut_bounds(b)) return false;
  share_headroom(b);
  b.stamp(9);
  const bool unplaced = clip_own(b);
  b.stamp(10);
  if (unplaced && !reroute_own<kKeys>(b)) return false;
  b.stamp(11);
  return exchange_counts(b);
}

// From the group's assignments to the place of every kept row.
template <int kKeys>
__device__ inline Decision decide(const FusedBlock& b) {
  Decision decision = {false, false, !b.p.policy.needs_entropy};
#pragma unroll 1  // the second time is the same code
  for (int exchange = 0;; ++exchange) {
    const bool received = receive_assignments(b, exchange) && !b.scalars().faulty;
    b.stamp(exchange == 0 ? 3 : 7);
    if (__syncthreads_and(received) == 0) return {};
    b.stamp(exchange == 0 ? 4 : 8);
    decision.cut = find_exceeded(b, decision.weighed);
    if (decision.cut && __syncthreads_or(counts_unknown(b)) != 0) {
      report_unknown(b, exchange);
      return {};
    }
    if (!decision.cut || decision.weighed) break;
    decision.weighed = true;
    if (!exchange_weights(b)) return {};
  }
  b.stamp(12);
  if (decision.cut && !cut_rows<kKeys>(b)) return {};
  b.stamp(13);
  decision.ok = __syncthreads_and(place_experts(b)) != 0;
  b.stamp(14);
  if (!decision.ok) report_no_room(b);
  return decision;
}

// All tokens of the block, as many at a time as shared memory holds; the first of them lie there already.
template <int kVectors, bool kExact>
__device__ __forceinline__ void send(const FusedBlock& b) {
#pragma unroll 1
  for (int begin = b.first; begin < b.end; begin += b.args.staged_rows) {
    const int end = min(begin + b.args.staged_rows, b.end);
    if (begin > b.first) {
      __syncthreads();  // the rows before have left
      RowReader<kVectors, kExact> rows(b, begin, end, false);
      rows.ask(b);
      rows.read(b, true);
      __syncthreads();
    }
    put_rows(b, begin, end);
  }
  b.stamp(15);
  b.signal_all(Flags::kRows);
  b.stamp(16);
}

// What is only looked at: weights, sums and cuts by the first block, which never has more tokens than another; counts by the
// next.
__device__ inline void report_rank(const FusedBlock& b, const Decision& decision) {
  if (b.block == min(1, b.num_blocks - 1)) write_counts(b, decision.cut);
  b.stamp(18);
  if (b.block != 0) return;
  if (!decision.weighed && !report_weights(b)) return;
  write_cuts(b, decision.cut);
  b.stamp(19);
}

// The scales that come with rows, by the blocks that neither report nor wait for the rows' signals; by the last one, if there
// are so few. All of them have sent their own rows.
__device__ inline void receive_scales(const FusedBlock& b) {
  constexpr int kReporting = 2;
  const int first = min(kReporting, b.num_blocks - 1), sharers = max(b.num_blocks - 1 - first, 1);
  if (b.block < first || b.block >= first + sharers) return;
  const int base = b.rank * b.args.per_rank;
  place_scales(b, b.group_rows() + base, b.at<int>(b.args.tables.starts) + base, b.block - first, sharers);
  b.stamp(23);
}

// What comes to this rank, by the last block. `ok`: else it gets nothing. Only a good epoch ends: others may not have begun
// it yet, and a rank with a fault on record sends nothing more.
__device__ inline void receive(const FusedBlock& b, bool ok) {
  write_received(b, ok);
  if (b.p.phase == Phase::kSend) return;
  if (ok && !b.await_all(Flags::kRows, Fault::kRows)) {
    ok = false;
    write_received(b, false);
  }
  b.stamp(20);
  if (ok && threadIdx.x == 0) *b.own<uint32_t>(b.p.layout.epoch) = b.wait.epoch;
}

template <int kVectors, bool kExact, int kKeys>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_dispatch_kernel(const __grid_constant__ FusedArgs args) {
  unsigned char* const shared = dynamic_shared();
  FusedBlock b(args, describe_rank(args.p, *reinterpret_cast<FusedRank*>(shared + args.tables.rank)), shared);
  b.wait.epoch = *b.own<uint32_t>(args.p.layout.epoch) + 1;  // through the L1: one load a block, not one a warp
  b.stamp(0);
  const bool score = args.p.policy.needs_entropy;
  const int kept = min(b.first + args.staged_rows, b.end);
  RowReader<kVectors, kExact> rows(b, b.first, kept, score);
  rows.ask(b);
  OwnSlots slots(b);
  clear_tables(b);
  __syncthreads();
  if (!b.scalars().faulty) {
    send_tokens(b);
    slots.send_all(b);
  }
  b.stamp(1);
  prefetch_logits(b);
  rows.read(b, true);
  // More rows than shared memory holds are scored now and read again when they are sent.
  if (score && kept < b.end) {
    __syncthreads();
    RowReader<kVectors, kExact> rest(b, kept, b.end, true);
    rest.ask(b);
    rest.read(b, false);
  }
  b.stamp(2);
  const Decision decision = decide<kKeys>(b);
  if (decision.ok) send<kVectors, kExact>(b);
  if (decision.ok && args.p.phase == Phase::kBoth && scales_with_rows(b)) receive_scales(b);
  if (b.block == b.num_blocks - 1) receive(b, decision.ok);
  if (!decision.ok) {
    drop_tokens(b);
  } else {
    if (decision.cut || args.p.policy.needs_entropy && decision.weighed) write_tokens(b);
    b.stamp(17);
    report_rank(b, decision);
  }
}

// Behind a dispatch that only sent: the scales that come with rows. The epoch is that of this block's own signal: another
// block may have ended the rank's epoch before this one begins.
__device__ inline void receive_scales_alone(FusedBlock& b, int sharers) {
  __shared__ uint32_t rows[kMaxFusedExperts];
  __shared__ int starts[kMaxFusedExperts];
  const uint32_t* const received = b.own<uint32_t>(b.p.layout.received);
#pragma unroll 1
  for (int j = threadIdx.x; j < b.args.per_rank; j += kFusedThreads) {
    rows[j] = load_relaxed_sys(received + j);  // the last block may be about to take them back
    starts[j] = static_cast<int>(load_relaxed_sys(b.own<uint32_t>(b.p.layout.starts) + j));
  }
  b.wait.epoch = __ldcg(b.own<uint32_t>(flag_offset(b.p.shape, b.p.layout, Flags::kRows, b.rank, b.block)));
  __syncthreads();
  place_scales(b, rows, starts, b.block, sharers);
}

// The second phase: until everybody's rows are here, by the last block; the others put scales in their places.
__global__ void __launch_bounds__(kFusedThreads, 1) fused_receive_kernel(const __grid_constant__ FusedArgs args) {
  __shared__ FusedRank described;
  FusedBlock b(args, describe_rank(args.p, described), nullptr);
  const int sharers = max(b.num_blocks - 1, 1);
  if (scales_with_rows(b) && b.block < sharers) receive_scales_alone(b, sharers);
  if (b.block != b.num_blocks - 1) return;
  uint32_t* const epoch = b.own<uint32_t>(args.p.layout.epoch);
  b.wait.epoch = __ldcg(epoch) + 1;
  const bool ok = b.await_all(Flags::kRows, Fault::kRows);
  if (!ok) write_received(b, false);
  __syncthreads();
  if (ok && threadIdx.x == 0) *epoch = b.wait.epoch;
}

int cell_bytes(const FusedDispatchParams& p) { return 4 * kCutsAtOnce * CutCells::words(p.policy.bucket_bits); }

FusedTables make_tables(const FusedDispatchParams& p, const FusedArgs& args, int block_tokens, int& bytes) {
  Carver<int> shared(32);
  const int num_bounds = args.bounds, ranks = p.shape.num_ranks;
  const int experts = p.shape.num_experts, top_k = p.shape.top_k;
  const int counters = p.policy.reroute == Reroute::kNone ? 0 : 4 * kFusedWarps * (num_bounds + 1);
  const FusedTables tables = {
      .rank = shared.take(sizeof(FusedRank)),
      .group_rows = shared.take(4 * kNamedExperts),
      .group_units = shared.take(4 * kNamedExperts),
      .expert_cut = shared.take(4 * kNamedExperts),
      .own_rows = shared.take(4 * experts),
      .bound_of = shared.take(4 * experts),
      .modality = shared.take(4 * experts),
      .starts = shared.take(4 * experts),
      .raw = shared.take(sizeof(RawCut) * num_bounds),
      .edge = shared.take(4 * num_bounds),
      .headroom = shared.take(4 * num_bounds),
      .proposed = shared.take(4 * num_bounds),
      .accepted = shared.take(4 * num_bounds),
      .running = shared.take(counters),
      .struck = shared.take(4 * kFusedWarps * kStruckWords),
      .listed = shared.take(4 * kMostListed),
      .cells = shared.take(cell_bytes(p)),
      .counts = shared.take(4 * 6 * experts),
      .current = shared.take(2 * p.shape.max_tokens * top_k),
      .entries = shared.take(4 * p.shape.max_tokens * top_k * (args.keeps_group ? ranks : 1)),
      .entropies = shared.take(4 * p.shape.max_tokens),
      .ids = shared.take(4 * block_tokens * top_k),
      .gates = shared.take(4 * block_tokens * top_k),
      .weight = shared.take(4 * p.shape.max_tokens),
      .parts = shared.take(2 * kRowGroups * kRowWarps * sizeof(Part)),
      .tokens = shared.take(4 * p.shape.num_ranks),
      .scalars = shared.take(sizeof(FusedScalars)),
      .staged = shared.take(0),
  };
  bytes = shared.bytes();
  return tables;
}

constexpr int kMostKept = 8192;  // assignments of a group in shared memory: 32 KB

bool is_supported(const Policy& policy, const FusedShape& s) {
  return policy.num_experts == s.num_experts && policy.num_ranks == s.num_ranks && policy.reroute_rounds >= 0 &&
         policy.reroute_rounds <= kMaxFusedRerouteRounds && policy.bucket_bits >= 1 && policy.bucket_bits <= 4;
}

bool is_supported(const FusedDispatchParams& p) {
  const FusedShape& s = p.shape;
  return is_supported(s) && p.launched >= 1 && p.launched <= s.num_ranks && p.one.num_tokens <= s.max_tokens &&
         (p.phase == Phase::kReceive || is_supported(p.policy, s));
}

FusedArgs make_args(const FusedDispatchParams& p, int& shared_bytes) {
  FusedArgs args = {};
  args.p = p;
  args.bounds = num_bounds(p.policy);
  args.per_rank = p.shape.num_experts / p.shape.num_ranks;
  args.by_per_rank = Divisor::of(args.per_rank), args.by_ranks = Divisor::of(p.shape.num_ranks);
  args.by_top_k = Divisor::of(p.shape.top_k), args.by_blocks = Divisor::of(p.shape.num_blocks);
  args.by_scale_chunks = Divisor::of(std::max(scale_chunks(p.shape), 1));
  args.threshold.policy = p.policy;
  const int block_tokens = (p.shape.max_tokens + p.shape.num_blocks - 1) / p.shape.num_blocks;
  int table_bytes = 0;
  args.keeps_group = p.shape.num_ranks * p.shape.max_tokens * p.shape.top_k <= kMostKept;
  args.keeps_limbs = p.num_segments <= cell_bytes(p) / (8 * kLimbs);
  args.tables = make_tables(p, args, block_tokens, table_bytes);
  args.row_stride = RowBytes(p.shape).all();
  const int fit = (max_shared_bytes() - table_bytes) / args.row_stride;
  args.staged_rows = fit < block_tokens ? fit : block_tokens;
  shared_bytes = table_bytes + args.staged_rows * args.row_stride;
  return args;
}

template <int kVectors, bool kExact, int kKeys>
cudaError_t enqueue(const FusedArgs& args, const Shape& shape, cudaStream_t stream) {
  static bool raised[kMaxDevices] = {};
  const auto kernel = fused_dispatch_kernel<kVectors, kExact, kKeys>;
  const cudaError_t error = raise_shared_limit(kernel, max_shared_bytes(), raised);
  return error == cudaSuccess ? launch(kernel, shape, args, stream) : error;
}

template <int kVectors, bool kExact>
cudaError_t enqueue_by_experts(const FusedArgs& args, const Shape& shape, cudaStream_t stream) {
  return args.p.shape.num_experts <= 4 * kWarp ? enqueue<kVectors, kExact, 4>(args, shape, stream)
                                               : enqueue<kVectors, kExact, 8>(args, shape, stream);
}

// The shares of a row must be those of entropy_score.
cudaError_t enqueue_by_hidden_size(const FusedArgs& args, const Shape& shape, cudaStream_t stream) {
  if (args.p.shape.hidden_size == 2048) return enqueue_by_experts<2, true>(args, shape, stream);
  if (args.p.shape.hidden_size == 7168) return enqueue_by_experts<7, true>(args, shape, stream);
  return enqueue_by_experts<8, false>(args, shape, stream);
}

}  // namespace

cudaError_t launch_fused_dispatch(const FusedDispatchParams& p, cudaStream_t stream) {
  if (!is_supported(p)) return cudaErrorInvalidValue;
  int shared_bytes = 0;
  const FusedArgs args = make_args(p, shared_bytes);
  if (p.phase == Phase::kReceive) {
    const int blocks = p.scales_with_rows && is_fp8(p.shape.format) ? p.shape.num_blocks : 1;
    return launch(fused_receive_kernel, {.grid = blocks, .block = kFusedThreads, .rows = p.launched}, args, stream);
  }
  if (args.staged_rows < 1) return cudaErrorInvalidValue;
  const Shape shape = {.grid = p.shape.num_blocks,
                       .block = kFusedThreads,
                       .rows = p.launched,
                       .shared_bytes = static_cast<size_t>(shared_bytes),
                       .cooperative = true};
  return enqueue_by_hidden_size(args, shape, stream);
}

}  // namespace macs::cuda
