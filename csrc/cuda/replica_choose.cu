// replica_choose: the rows of a replicated expert are numbered over the group, text before visual, then
// by source rank, token and slot; the number says which replica a row goes to.
//
// Problem:     T * K assignments, of which those to up to X replicated experts need their place in (token, slot) order.
// Algorithm:   the grid's warps own T / W tokens each, in order, as in load_histogram.cu, which counted by block. This adds
//              up the blocks before its own, counts by warp, and numbers a step of 32 assignments at a time (match_any).
//              It also counts, by level, what this source sends to exceeded ranks.
// Grid:        16 warps a block, a block per SM at most.
// Determinism: ordered prefixes of integers.
#include "assignments.cuh"
#include "launch.cuh"
#include "macs/cuda.h"
#include "replicas.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = kShareThreads;
constexpr int kWarps = kThreads / kWarp;

// Shared memory of a block, in ints, behind the tables of places.
struct Numbers {
  int* ints;
  int redundant, physical, ranks;

  static size_t bytes(const Places& p) {
    const size_t own = 3ull * p.redundant() + p.num_physical + 2ull * p.num_ranks + 2ull * kWarps * p.redundant();
    return sizeof(int) * (own + Places::size(p.num_physical));
  }
  __device__ __forceinline__ Numbers(int* memory, const Places& p)
      : ints(memory + Places::size(p.num_physical)), redundant(p.redundant()), physical(p.num_physical), ranks(p.num_ranks) {}
  __device__ __forceinline__ int* rows() const { return ints; }                    // [X] of the group
  __device__ __forceinline__ int* first() const { return ints + redundant; }       // [X, 2] number of this block's first row
  __device__ __forceinline__ int* running(int warp) const { return ints + (3 + 2 * warp) * redundant; }  // [X, 2]
  __device__ __forceinline__ int* quota() const { return running(kWarps); }        // [P]
  __device__ __forceinline__ int* limit() const { return quota() + physical; }     // [R] kNotExceeded, or not
  __device__ __forceinline__ int* lowest() const { return limit() + ranks; }       // [R] first level that it counts
};

// Behind the exchange, into zeros: text of all sources before the visual rows of any. A source a warp, then a block a warp.
__device__ __forceinline__ void number_block(const ReplicaChooseArgs& args, const Places& places, const Numbers& numbers) {
  const int keys = 2 * places.redundant(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int row = lane; row < places.num_replicated(); row += kWarp) {
    int all = 0, first_text = 0, first_visual = 0;
#pragma unroll 2
    for (int s = warp; s < places.num_ranks; s += kWarps) {
      const int32_t* const source = args.tail + places.num_ranks + s * keys + 2 * row;
      const int text = __ldcg(source), visual = __ldcg(source + 1);
      const bool before = s < places.own_rank();
      all += text + visual;
      first_text += before ? text : 0, first_visual += text + (before ? visual : 0);
    }
    if (all == 0) continue;
    atomicAdd(numbers.rows() + row, all);
    atomicAdd(numbers.first() + replica_key(row, true), first_text);
    atomicAdd(numbers.first() + replica_key(row, false), first_visual);
  }
#pragma unroll 1
  for (int key = lane; key < keys; key += kWarp) {
    int before = 0;
#pragma unroll 4
    for (int block = warp; block < static_cast<int>(blockIdx.x); block += kWarps) {
      before += __ldcg(args.scratch.block_counts + block * keys + key);
    }
    if (before != 0) atomicAdd(numbers.first() + key, before);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < places.num_physical; i += kThreads) numbers.quota()[i] = __ldcg(args.scratch.quota + i);
#pragma unroll 1
  for (int r = threadIdx.x; r < places.num_ranks; r += kThreads) {
    const int4 limit = __ldcg(reinterpret_cast<const int4*>(args.scratch.limits) + r);
    numbers.limit()[r] = limit.x, numbers.lowest()[r] = limit.y;
  }
}

// One warp, in lane order: the number of this lane's row among those of its key.
__device__ __forceinline__ int number_in_order(bool counted, int key, int first, int* running) {
  const unsigned active = __ballot_sync(kFullMask, counted);
  int number = 0;
  if (counted) {
    const int lane = threadIdx.x % kWarp;
    const unsigned peers = __match_any_sync(active, key);
    const int so_far = running[key];
    number = first + so_far + __popc(peers & ((1u << lane) - 1u));
    __syncwarp(active);
    if (lane == kWarp - 1 - __clz(peers)) running[key] = so_far + __popc(peers);
  }
  __syncwarp();
  return number;
}

template <class Id>
__global__ void __launch_bounds__(kThreads) replica_choose_kernel(const __grid_constant__ ReplicaChooseArgs args) {
  const Assignments& in = args.in;
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  const Places places = copied(args.places, shared);
  const Numbers numbers(shared, places);
  const int keys = 2 * places.redundant(), buckets = num_buckets(in.policy.bucket_bits);
  for (int* i = numbers.rows() + threadIdx.x; i < numbers.quota(); i += kThreads) *i = 0;
  __syncthreads();
  start_dependents();
  const Step step(in.top_k);
  const int of_grid = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int64_t begin = args.shares.begin(of_grid), end = args.shares.end(of_grid);
  int* const running = numbers.running(threadIdx.x / kWarp);
  for (int64_t at = begin; at < end; at += step.tokens) {  // of what is older than this chain
    const Slot slot = load_slot<Id, false>(in, step, at, end);
    const int row = slot.expert >= 0 ? places.row()[places.logical()[slot.expert]] : -1;
    if (row >= 0) atomicAdd(running + replica_key(row, slot.text()), 1);
  }
  wait_for_previous();
  number_block(args, places, numbers);
  __syncthreads();
#pragma unroll 1
  for (int key = threadIdx.x; key < keys; key += kThreads) {  // of the warps before
    int before = 0;
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) {
      const int mine = numbers.running(warp)[key];
      numbers.running(warp)[key] = before;
      before += mine;
    }
  }
  __syncthreads();
  for (int64_t at = begin; at < end; at += step.tokens) {
    const Slot slot = load_slot<Id, true>(in, step, at, end);
    const int expert = slot.expert >= 0 ? places.logical()[slot.expert] : -1;
    const int row = expert >= 0 ? places.row()[expert] : -1, key = row >= 0 ? replica_key(row, slot.text()) : 0;
    const int number = number_in_order(row >= 0, key, row >= 0 ? numbers.first()[key] : 0, running);
    if (!slot.inside) continue;
    int chosen = -1;
    if (expert >= 0) {
      int place = places.first()[expert];
      if (row >= 0) {
        place += place_of(number, numbers.rows()[row], numbers.quota() + place, places.num_places(expert));
      }
      chosen = places.physical()[place];
      const int rank = places.rank()[place];
      if (numbers.limit()[rank] != kNotExceeded) {
        const int level = level_of(bucket_of_slot(in, slot), args.shift[expert], slot.text(), in.policy);
        const int lowest = numbers.lowest()[rank];
        const bool text_stays = in.policy.protect_text && lowest == 0;
        if (level >= lowest && !(text_stays && level >= buckets)) {
          atomicAdd(args.scratch.levels + rank * 2 * buckets + level, 1);
        }
      }
    }
    static_cast<Id*>(args.scratch.chosen)[slot.token * in.top_k + step.slot] = static_cast<Id>(chosen);
  }
}

}  // namespace

cudaError_t enqueue_replica_choose(const ReplicaChooseArgs& given, cudaStream_t stream) {
  ReplicaChooseArgs args = given;
  const int blocks = share_blocks(args.in);
  args.shares = TokenShares::of(args.in.num_tokens, blocks);
  static bool raised[2][kMaxDevices] = {};
  const bool wide = args.in.ids_are_i64;
  const auto kernel = wide ? replica_choose_kernel<int64_t> : replica_choose_kernel<int32_t>;
  const size_t bytes = Numbers::bytes(args.places);
  if (bytes > static_cast<size_t>(max_shared_bytes())) return cudaErrorInvalidValue;
  const cudaError_t error = raise_shared_limit(kernel, max_shared_bytes(), raised[wide]);
  if (error != cudaSuccess) return error;
  const Shape shape = {.grid = blocks, .block = kThreads, .shared_bytes = bytes, .overlap = true};
  return launch(kernel, shape, args, stream);
}

}  // namespace macs::cuda
