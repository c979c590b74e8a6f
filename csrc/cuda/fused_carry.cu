// fused_carry: every row of a MoE layer to its expert's rank as it is routed, in one launch. Nothing is decided: decode.
//
// Problem:     R ranks of one NVLink domain, 1 to 128 tokens each as a rule (up to 1023); [T, H] bf16 in, rows by expert out.
//              Bound by latency: a load of the ids, one way of a word between the ranks, one way of the rows.
// Algorithm:   a rank's rows per expert are all that the others have to know: every block counts them from the rank's own ids,
//              and sends them as LL words. An expert's rows lie by source, beginning behind its own rank, which is the last:
//              so the first source waits for nobody, of two ranks none for what crosses NVLink, and a rank waits longest for
//              what it writes into its own memory. A block has a share of the rank's assignments and reads the rows of their
//              tokens while counts are under way; a warp that has a part of a row waits for that row's counts alone.
// Grid:        (blocks of a rank, ranks of this launch); 512 threads, one block an SM. A rank's blocks wait for the first blocks
//              of other ranks, and its last one for all: they need not all run at once. They do (cooperative) where one
//              launch plays several ranks, and where blocks await scales, which any block may send.
// Determinism: a row's place depends on (source, token, slot) alone.
//
// Tables, bytes, signals and faults are those of fused_dispatch; who has sent receives by its second phase. What may be
// overwritten when: docs/design/fused_dispatch.md, "Memory ordering".
#include <algorithm>

#include "fused_block.cuh"
#include "fused_put.cuh"
#include "fused_report.cuh"
#include "fused_scales.cuh"
#include "macs/cuda.h"

namespace macs::cuda {
namespace {

// What a rank sends in place of a count behind an id that names no expert: all of them give up.
constexpr uint32_t kNoCount = 0xffffffffu;

// A block's share of the rank's assignments, and the tokens that they are of.
struct CarryShare {
  int begin, end, first_token, end_token;

  __device__ __forceinline__ explicit CarryShare(const FusedBlock& b)
      : begin(b.args.by_blocks.divide(b.slots() * b.block)), end(b.args.by_blocks.divide(b.slots() * (b.block + 1))),
        first_token(b.args.by_top_k.divide(begin)),
        end_token(end > begin ? b.args.by_top_k.divide(end - 1) + 1 : first_token) {}
};

__device__ __forceinline__ uint32_t* own_rows(const FusedBlock& b) { return b.at<uint32_t>(b.args.tables.own_rows); }

__device__ __forceinline__ int routed_to(const FusedBlock& b, int slot) {
  return b.p.ids_are_i64 ? static_cast<int>(__ldg(static_cast<const int64_t*>(b.me.topk_ids) + slot))
                         : __ldg(static_cast<const int32_t*>(b.me.topk_ids) + slot);
}

// The rank's rows per expert, and << 16 those before this block's assignments; those of the block into shared memory. Returns
// whether an id is wrong, behind a barrier: no expert, or so often that a token has it twice.
__device__ __forceinline__ bool count_own(const FusedBlock& b, const CarryShare& share) {
  const int experts = b.p.shape.num_experts;
  bool wrong = false;
#pragma unroll 2
  for (int slot = threadIdx.x; slot < b.slots(); slot += kFusedThreads) {
    const int expert = routed_to(b, slot);
    if (slot >= share.begin && slot < share.end) b.at<int>(b.args.tables.ids)[slot - share.begin] = expert;
    if (expert >= experts) {
      wrong = true;
      report(b.wait, Fault::kBadExpert, b.rank, b.block, expert, experts - 1);
    } else if (expert >= 0) {
      atomicAdd(own_rows(b) + expert, slot < share.begin ? 0x10001u : 1u);
    }
  }
  if (__syncthreads_or(wrong) != 0) return true;
  for (int j = threadIdx.x; j < experts; j += kFusedThreads) {
    const int count = static_cast<int>(own_rows(b)[j] & 0xffffu);
    if (count <= b.me.num_tokens) continue;
    wrong = true;
    report(b.wait, Fault::kBadCount, b.rank, b.block, count, b.me.num_tokens);
  }
  return __syncthreads_or(wrong) != 0;
}

// Those counts to the other ranks, a peer a block.
__device__ __forceinline__ void send_counts(const FusedBlock& b, bool wrong) {
  const int experts = b.p.shape.num_experts;
#pragma unroll 1
  for (int peer = b.block; peer < b.p.shape.num_ranks; peer += b.num_blocks) {
    if (peer == b.rank) continue;
    const int64_t row = b.counts_of(b.rank);
#pragma unroll 1
    for (int j = threadIdx.x; j < experts; j += kFusedThreads) {
      b.peers.send(peer, row + 8 * j, make_ll_word(wrong ? kNoCount : own_rows(b)[j] & 0xffffu, b.wait.epoch));
    }
  }
}

// One thread: how many rows another rank sends to an expert. -1: it did not say, or cannot be right.
__device__ __forceinline__ int receive_count(const FusedBlock& b, int source, int expert) {
  const uint64_t* const address = b.own<uint64_t>(b.counts_of(source)) + expert;
  uint64_t word = load_relaxed_sys(address);
  if (!await_word(address, word, b.wait, Fault::kCounts, source)) return -1;
  const uint32_t count = value_of(word);
  if (count <= static_cast<uint32_t>(b.p.shape.max_tokens)) return static_cast<int>(count);
  const Fault fault = count == kNoCount ? Fault::kBadExpert : Fault::kBadCount;
  report(b.wait, fault, source, -1, static_cast<int32_t>(count), b.p.shape.max_tokens);
  return -1;
}

// The rank that is `place`-th in the order of sources of an expert of `owner`: the owner is the last.
__device__ __forceinline__ int source_at(const FusedBlock& b, int owner, int place) {
  const int source = owner + 1 + place;
  return source < b.p.shape.num_ranks ? source : source - b.p.shape.num_ranks;
}

// One warp: the row of this block's assignment `i` at its expert's rank. -1: a rank before it did not send its count.
__device__ __forceinline__ int row_of(const FusedBlock& b, int i, int expert, int owner) {
  const int before = b.rank > owner ? b.rank - owner - 1 : b.rank - owner - 1 + b.p.shape.num_ranks;
  const int count = b.lane < before ? receive_count(b, source_at(b, owner, b.lane), expert) : 0;
  if (__any_sync(kFullMask, count < 0)) return -1;
  int row = (expert - owner * b.args.per_rank) * b.p.shape.expert_rows + static_cast<int>(own_rows(b)[expert] >> 16);
  row += __reduce_add_sync(kFullMask, count);
  const int* const ids = b.at<int>(b.args.tables.ids);
#pragma unroll 1
  for (int base = 0; base < i; base += kWarp) {
    const int j = base + b.lane;
    row += __popc(__ballot_sync(kFullMask, j < i && ids[j] == expert));
  }
  return row;
}

// The rows of tokens [begin, end) into shared memory, four warps a row. The first of a group is sent for by `ask`.
template <int kVectors, bool kExact>
class CarryReader {
 public:
  __device__ __forceinline__ CarryReader(const FusedBlock& b, int begin, int end)
      : begin_(begin), end_(end), next_(begin + b.warp / kRowWarps),
        share_{static_cast<int>(threadIdx.x) % kRowThreads, kRowThreads, b.p.shape.hidden_size / 8} {
    ask(b);
  }
  __device__ __forceinline__ void read(const FusedBlock& b) {
    const int feature_bytes = RowBytes(b.p.shape).features;
#pragma unroll 1
    while (next_ < end_) {
      stage(share_, b.p.shape.format, feature_bytes, b.staged(next_ - begin_));
      next_ += kRowGroups;
      ask(b);
    }
  }

 private:
  __device__ __forceinline__ void ask(const FusedBlock& b) {
    if (next_ >= end_) return;
    share_.load(static_cast<const uint4*>(b.me.hidden_states) + static_cast<int64_t>(next_) * share_.num_vectors);
  }

  const int begin_, end_;
  int next_;
  Share<__nv_bfloat16, kVectors, kExact> share_;
};

// The block's assignments of the tokens that are staged, `first_token` the first of them, a part of a row a warp. False: a
// place is not known.
__device__ inline bool carry_rows(const FusedBlock& b, const CarryShare& share, int begin, int end, int first_token) {
  const FusedShape& s = b.p.shape;
  const int assignments = end - begin, vectors = RowBytes(s).features / 16;
  const int split = parts_of_a_row(assignments, vectors);
  bool ok = true;
#pragma unroll 1
  for (int item = b.warp; item < assignments << split && ok; item += kFusedWarps) {
    const int slot = begin + (item >> split), part = item & ((1 << split) - 1);
    const int expert = b.at<int>(b.args.tables.ids)[slot - share.begin], token = b.args.by_top_k.divide(slot);
    int32_t* const position = b.own<int32_t>(b.p.layout.positions) + slot;
    if (expert < 0) {
      if (part == 0 && b.lane == 0) *position = -1;
      continue;
    }
    const int owner = b.args.by_per_rank.divide(expert), row = row_of(b, slot - share.begin, expert, owner);
    ok = row >= 0;
    if (!ok) continue;
    if (part == 0 && b.lane == 0) *position = row;
    put_part(b, owner, expert - owner * b.args.per_rank, row, token, b.staged(token - first_token), part, split);
  }
  return ok;
}

// What comes to this rank's experts: rows of each, and where it begins. Behind a barrier. False: a rank did not say.
__device__ inline bool receive_all_counts(const FusedBlock& b) {
  const int base = b.rank * b.args.per_rank;
  bool ok = true;
#pragma unroll 1
  for (int j = threadIdx.x; j < b.args.per_rank; j += kFusedThreads) {
    uint32_t rows = own_rows(b)[base + j] & 0xffffu;
#pragma unroll 1
    for (int place = 0; place < b.p.shape.num_ranks - 1 && ok; ++place) {
      const int count = receive_count(b, source_at(b, b.rank, place), base + j);
      ok = count >= 0;
      rows += ok ? count : 0;
    }
    b.group_rows()[base + j] = rows;
    b.at<int>(b.args.tables.starts)[base + j] = j * b.p.shape.expert_rows;
  }
  return __syncthreads_and(ok) != 0;
}

// A rank that gave up has no rows.
__device__ inline void drop_positions(const FusedBlock& b, const CarryShare& share) {
#pragma unroll 1
  for (int slot = share.begin + threadIdx.x; slot < share.end; slot += kFusedThreads) {
    b.own<int32_t>(b.p.layout.positions)[slot] = -1;
  }
}

// By the last block: what has come, and in the phase that does both when all of it has.
__device__ inline void receive(const FusedBlock& b, bool ok) {
  ok = ok && receive_all_counts(b);
  write_received(b, ok);
  if (b.p.phase == Phase::kSend || !ok) return;
  if (!b.await_all(Flags::kRows, Fault::kRows)) return write_received(b, false);
  if (threadIdx.x == 0) *b.own<uint32_t>(b.p.layout.epoch) = b.wait.epoch;
}

// The scales that come with rows, by the blocks that do not wait for the rows' signals; by the last one, if it is alone.
__device__ inline void receive_scales(const FusedBlock& b) {
  const int sharers = max(b.num_blocks - 1, 1), base = b.rank * b.args.per_rank;
  if (b.block >= sharers || !receive_all_counts(b)) return;
  place_scales(b, b.group_rows() + base, b.at<int>(b.args.tables.starts) + base, b.block, sharers);
  __syncthreads();  // the one block of a rank receives again
}

template <int kVectors, bool kExact>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_carry_kernel(const __grid_constant__ FusedArgs args) {
  unsigned char* const shared = dynamic_shared();
  FusedBlock b(args, describe_rank(args.p, *reinterpret_cast<FusedRank*>(shared + args.tables.rank)), shared);
  b.wait.epoch = *b.own<uint32_t>(args.p.layout.epoch) + 1;
  b.stamp(0);
  const CarryShare share(b);
  int begin = share.first_token, end = min(begin + args.staged_rows, share.end_token);
  CarryReader<kVectors, kExact> first(b, begin, end);
  for (int j = threadIdx.x; j < args.p.shape.num_experts; j += kFusedThreads) own_rows(b)[j] = 0;
  bool ok = __syncthreads_or(threadIdx.x == 0 && gave_up_before(b.wait)) == 0;
  if (ok) {
    const bool wrong = count_own(b, share);
    b.stamp(1);
    send_counts(b, wrong);
    ok = !wrong;
  }
  first.read(b);
  __syncthreads();
  b.stamp(2);
  // As a rule all of the block's tokens are staged at once.
#pragma unroll 1
  while (ok && begin < share.end_token) {
    const int top_k = args.p.shape.top_k;
    ok = carry_rows(b, share, max(share.begin, begin * top_k), min(share.end, end * top_k), begin);
    begin = end, end = min(begin + args.staged_rows, share.end_token);
    if (begin >= share.end_token) break;
    ok = __syncthreads_and(ok) != 0;  // the rows before have left
    CarryReader<kVectors, kExact>(b, begin, end).read(b);
    __syncthreads();
  }
  ok = __syncthreads_and(ok) != 0;
  b.stamp(3);
  if (ok) b.signal_all(Flags::kRows);
  if (!ok) drop_positions(b, share);
  b.stamp(4);
  if (ok && args.p.phase == Phase::kBoth && scales_with_rows(b)) receive_scales(b);
  if (b.block == b.num_blocks - 1) receive(b, ok);
  b.stamp(5);
}

FusedTables make_tables(const FusedShape& s, int& bytes) {
  Carver<int> shared(32);
  const int block_slots = (s.max_tokens * s.top_k + s.num_blocks - 1) / s.num_blocks;
  FusedTables tables = {};
  tables.rank = shared.take(sizeof(FusedRank));
  tables.own_rows = shared.take(4 * s.num_experts);
  tables.group_rows = shared.take(4 * s.num_experts);
  tables.starts = shared.take(4 * s.num_experts);
  tables.ids = shared.take(4 * block_slots);
  tables.staged = shared.take(0);
  bytes = shared.bytes();
  return tables;
}

FusedArgs make_args(const FusedDispatchParams& p, int& shared_bytes) {
  const FusedShape& s = p.shape;
  FusedArgs args = {};
  args.p = p;
  args.per_rank = s.num_experts / s.num_ranks;
  args.by_per_rank = Divisor::of(args.per_rank), args.by_ranks = Divisor::of(s.num_ranks);
  args.by_top_k = Divisor::of(s.top_k), args.by_blocks = Divisor::of(s.num_blocks);
  args.by_scale_chunks = Divisor::of(std::max(scale_chunks(s), 1));
  int table_bytes = 0;
  args.tables = make_tables(s, table_bytes);
  args.row_stride = RowBytes(s).all();
  // A share of assignments may begin and end within a token.
  const int block_slots = (s.max_tokens * s.top_k + s.num_blocks - 1) / s.num_blocks;
  const int block_tokens = (block_slots + s.top_k - 2) / s.top_k + 1;
  args.staged_rows = std::min((max_shared_bytes() - table_bytes) / args.row_stride, block_tokens);
  shared_bytes = table_bytes + args.staged_rows * args.row_stride;
  return args;
}

template <int kVectors, bool kExact>
cudaError_t enqueue(const FusedArgs& args, const Shape& shape, cudaStream_t stream) {
  static bool raised[kMaxDevices] = {};
  const auto kernel = fused_carry_kernel<kVectors, kExact>;
  const cudaError_t error = raise_shared_limit(kernel, max_shared_bytes(), raised);
  return error == cudaSuccess ? launch(kernel, shape, args, stream) : error;
}

}  // namespace

cudaError_t launch_fused_carry(const FusedDispatchParams& p, cudaStream_t stream) {
  // Room for every token of every rank: no place has to be refused, and no row to be counted twice.
  const FusedShape& s = p.shape;
  if (!is_supported(s) || s.expert_rows < s.num_ranks * s.max_tokens || p.phase == Phase::kReceive || p.launched < 1 ||
      p.launched > s.num_ranks || p.one.num_tokens > s.max_tokens) {
    return cudaErrorInvalidValue;
  }
  int shared_bytes = 0;
  const FusedArgs args = make_args(p, shared_bytes);
  if (args.staged_rows < 1) return cudaErrorInvalidValue;
  const bool awaits_scales = p.phase == Phase::kBoth && p.scales_with_rows && is_fp8(s.format);
  const Shape shape = {.grid = s.num_blocks,
                       .block = kFusedThreads,
                       .rows = p.launched,
                       .shared_bytes = static_cast<size_t>(shared_bytes),
                       .cooperative = p.launched > 1 || awaits_scales};
  if (s.hidden_size == 2048) return enqueue<2, true>(args, shape, stream);
  if (s.hidden_size == 7168) return enqueue<7, true>(args, shape, stream);
  return enqueue<8, false>(args, shape, stream);
}

}  // namespace macs::cuda
