// replica_balance: how many rows of the group each replica gets, and what this source may keep on a rank that stays over its
// bound (docs/design/method.md, 3b and 4b).
//
// Problem:     E * 2 * B cells into P quotas, R loads, E shifts and R limits; only exceeded ranks look at levels.
// Algorithm:   a block per rank. Each finds rows, quotas and shifts for itself, the same ones: cells are in L2, and a barrier
//              would cost as much. A warp pours the experts of a step at once, a lane each: they share no rank.
//              Then a block adds up the levels of its own rank, if that is exceeded.
// Grid:        R blocks of 512 threads.
// Determinism: integers, and doubles rounded step by step.
#include "launch.cuh"
#include "macs/cuda.h"
#include "plan/threshold.cuh"
#include "replicas.cuh"
#include "warp.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostShare = 2 * (kOctaves << kMaxBucketBits) / kWarp;  // levels of a lane
constexpr int kFewPlaces = 4;  // of an expert that is poured in registers
constexpr int kCells = 4;      // that a lane loads at once
constexpr int kExperts = 8;    // whose rows a warp counts at once

// Shared memory of a block, in ints, behind the tables of places. Loads and quotas change place by place.
struct Table {
  int* ints;
  int experts, physical, ranks, num_levels;

  static size_t bytes(const Places& p, const Policy& policy) {
    const size_t own = 3ull * p.num_experts + p.num_physical + p.num_ranks + 4ull * num_buckets(policy.bucket_bits);
    return sizeof(int) * (own + Places::size(p.num_physical));
  }
  __device__ __forceinline__ Table(int* memory, const Places& p, const Policy& policy)
      : ints(memory + Places::size(p.num_physical)), experts(p.num_experts), physical(p.num_physical), ranks(p.num_ranks),
        num_levels(2 * num_buckets(policy.bucket_bits)) {}
  __device__ __forceinline__ int* rows() const { return ints; }                 // [E]
  __device__ __forceinline__ int* text() const { return ints + experts; }       // [E]
  __device__ __forceinline__ int* shift() const { return ints + 2 * experts; }  // [E]
  __device__ __forceinline__ int* quota() const { return ints + 3 * experts; }  // [P]
  __device__ __forceinline__ int* load() const { return quota() + physical; }   // [R]
  __device__ __forceinline__ Levels levels(bool alone) const {                  // [2 * B] each
    int* const group = load() + ranks;
    return {group, alone ? group : group + num_levels};
  }
};

__device__ __forceinline__ void count_rows(const ReplicaBalanceArgs& args, const Table& table) {
  const int lane = threadIdx.x % kWarp, buckets = table.num_levels / 2;
#pragma unroll 1
  for (int first = threadIdx.x / kWarp; first < table.experts; first += kExperts * kWarps) {
    int visual[kExperts] = {}, text[kExperts] = {};
#pragma unroll 2
    for (int b = lane; b < buckets; b += kWarp) {
#pragma unroll
      for (int i = 0; i < kExperts; ++i) {
        const int e = first + i * kWarps;
        if (e >= table.experts) continue;
        const int32_t* const cells = args.p.group + static_cast<int64_t>(e) * table.num_levels + b;
        visual[i] += __ldcg(cells), text[i] += __ldcg(cells + buckets);
      }
    }
#pragma unroll
    for (int i = 0; i < kExperts; ++i) {
      const int e = first + i * kWarps;
      const int of_visual = __reduce_add_sync(kFullMask, visual[i]), of_text = __reduce_add_sync(kFullMask, text[i]);
      if (lane == 0 && e < table.experts) table.rows()[e] = of_visual + of_text, table.text()[e] = of_text;
    }
  }
}

// Products of rows and places fit into 32 bits: rows are below 2^23, places are ranks.
__device__ __forceinline__ void split_evenly(const Places& places, const Table& table) {
#pragma unroll 1
  for (int e = threadIdx.x; e < table.experts; e += kThreads) {
    const int first = places.first()[e], count = places.num_places(e);
    const unsigned rows = table.rows()[e];
    unsigned until = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const unsigned end = rows * (i + 1) / count, part = end - until;
      until = end;
      table.quota()[first + i] = static_cast<int>(part);
      atomicAdd(table.load() + places.rank()[first + i], static_cast<int>(part));
    }
  }
}

// Of all places, or of at most kMost.
template <int kMost, class Body>
__device__ __forceinline__ void for_each_place(int count, const Body& body) {
  if constexpr (kMost > 0) {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < count) body(i);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < count; ++i) body(i);
  }
}

// The greatest level of which the rows still fit below it: that of all places, then of those that do not lie above. Returns
// whether a quota changed. kMost > 0: loads without the expert's own rows stay in registers.
template <int kMost>
__device__ __forceinline__ bool pour(const Places& places, const Table& table, int e) {
  const int first = places.first()[e], count = places.num_places(e), rows = table.rows()[e];
  int kept[kMost > 0 ? kMost : 1];
  const auto without_own = [&](int i) {
    return table.load()[places.rank()[first + i]] - table.quota()[first + i];
  };
  if constexpr (kMost > 0) for_each_place<kMost>(count, [&](int i) { kept[i] = without_own(i); });
  const auto dry = [&](int i) {
    if constexpr (kMost > 0) return kept[i];
    return without_own(i);
  };
  int level = INT32_MAX, below = 0;
#pragma unroll 1
  for (int before = -1; below != before;) {
    before = below, below = 0;
    unsigned sum = rows;
    for_each_place<kMost>(count, [&](int i) {
      const int load = dry(i);
      if (load <= level) ++below, sum += load;
    });
    level = static_cast<int>(sum / below);
  }
  int rest = rows;
  for_each_place<kMost>(count, [&](int i) { rest -= max(0, level - dry(i)); });
  bool changed = false;
  for_each_place<kMost>(count, [&](int i) {
    const int load = dry(i), extra = rest > 0 && load <= level ? 1 : 0, poured = max(0, level - load) + extra;
    rest -= extra;
    changed |= poured != table.quota()[first + i];
    table.quota()[first + i] = poured;
    table.load()[places.rank()[first + i]] = load + poured;
  });
  return changed;
}

// One warp.
__device__ __forceinline__ void pour_all(const Places& places, const Table& table) {
#pragma unroll 1
  for (int sweep = 0; sweep < kBalanceSweeps; ++sweep) {
    bool changed = false;
    int begin = 0;
#pragma unroll 1
    for (int step = 0; step < places.num_steps(); ++step) {
      const int end = places.step_end()[step];
#pragma unroll 1
      for (int i = begin + threadIdx.x % kWarp; i < end; i += kWarp) {
        const int e = places.step_order()[i];
        changed |= places.num_places(e) <= kFewPlaces ? pour<kFewPlaces>(places, table, e) : pour<0>(places, table, e);
      }
      begin = end;
      __syncwarp();
    }
    if (!__any_sync(kFullMask, changed)) return;
  }
}

__device__ __forceinline__ void find_shifts(const ReplicaBalanceArgs& args, const Places& places, const Table& table,
                                            Capacity capacity) {
  const Policy& policy = args.p.policy;
  const bool pressed = policy.alpha > 0.0 && !isinf(policy.gamma);
  const double each = divide(__dmul_rn(policy.gamma, capacity.all), places.first()[table.experts]);
#pragma unroll 1
  for (int e = threadIdx.x; e < table.experts; e += kThreads) {
    capacity.base = __dmul_rn(each, places.num_places(e));
    const double limit = capacity.of_expert(args.p, args.p.modality[e]);
    table.shift()[e] = pressed ? pressure_shift(table.rows()[e], limit, policy.alpha, policy.bucket_bits) : 0;
  }
}

// A whole block: the levels of a rank, in 256ths of a row, and its text rows.
__device__ __forceinline__ void add_levels(const ReplicaBalanceArgs& args, const Places& places, const Table& table,
                                           int rank, const Levels& levels, int* text_rows) {
  const int lane = threadIdx.x % kWarp, buckets = table.num_levels / 2;
#pragma unroll 1
  for (int e = threadIdx.x / kWarp; e < table.experts; e += kWarps) {
    const int first = places.first()[e], count = places.num_places(e);
    const unsigned rows = table.rows()[e];
    unsigned until = 0, share_until = 0, share = 0;
    int place = -1;
#pragma unroll 1
    for (int i = 0; i < count && place < 0; ++i) {
      until += table.quota()[first + i];
      const unsigned end = rows > 0 ? kShareOne * until / rows : kShareOne;
      share = end - share_until, share_until = end;
      if (places.rank()[first + i] == rank) place = i;
    }
    if (place < 0) continue;
    if (lane == 0) {
      const int64_t text = rows_before(table.text()[e], rows, table.quota() + first, count, place);
      atomicAdd(text_rows, static_cast<int>(text));
    }
    if (share == 0) continue;
    const bool alone = levels.own == levels.group;
    const int64_t begin = static_cast<int64_t>(e) * table.num_levels;
#pragma unroll 1
    for (int cells = lane; cells < table.num_levels; cells += kCells * kWarp) {
      int group[kCells], own[kCells];
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int cell = cells + i * kWarp;
        const bool inside = cell < table.num_levels;
        group[i] = inside ? __ldcg(args.p.group + begin + cell) : 0;
        own[i] = inside && !alone ? __ldcg(args.p.own + begin + cell) : 0;
      }
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        if (group[i] == 0) continue;  // none of the group, none of its own
        const int cell = cells + i * kWarp;
        const int level = level_of(cell % buckets, table.shift()[e], cell >= buckets, args.p.policy);
        atomicAdd(levels.group + level, share * group[i]);
        if (own[i] != 0) atomicAdd(levels.own + level, share * own[i]);
      }
    }
  }
}

// One warp: units of a window of levels; cleared where asked for.
__device__ __forceinline__ Kept take_levels(const Levels& levels, int begin, int end, bool clear) {
  unsigned group = 0, own = 0;
#pragma unroll 1
  for (int l = begin + static_cast<int>(threadIdx.x) % kWarp; l < end; l += kWarp) {
    group += levels.group[l], own += levels.own[l];
    if (clear) levels.group[l] = levels.own[l] = 0;
  }
  group = __reduce_add_sync(kFullMask, group), own = __reduce_add_sync(kFullMask, own);
  __syncwarp();
  return {group, own};
}

// One warp: the limit of an exceeded rank, and what is at stake there.
__device__ __forceinline__ RankLimit find_limit(const Policy& policy, const Table& table, const Levels& levels, int bound,
                                                int text_rows, Kept* stake) {
  const int buckets = table.num_levels / 2;
  int first = 0, end = table.num_levels, room = bound;
  if (policy.protect_text && text_rows <= bound) {
    end = buckets, room = bound - text_rows;  // all text stays, visual rows share what it leaves
  } else if (policy.protect_text) {
    first = buckets;  // no visual row stays
  }
  const Kept below = take_levels(levels, 0, first, true);
  take_levels(levels, end, table.num_levels, true);
  const Kept window = take_levels(levels, first, end, false);
  const unsigned long long top = static_cast<unsigned long long>(room) * kShareOne;
  unsigned long long kept = window.group > 0 ? top * window.own / window.group : 0;
  *stake = below;
  if (window.group > top) {
    const Cut cut = warp_find_cut<kMostShare>(levels, table.num_levels, static_cast<int>(top));
    kept = window.own - cut.kept.own + cut.quota;
    stake->group += cut.kept.group, stake->own += cut.kept.own;
  }
  return {static_cast<int32_t>(kept / kShareOne), first, 0, bound};
}

__global__ void __launch_bounds__(kThreads) replica_balance_kernel(const __grid_constant__ ReplicaBalanceArgs args) {
  __shared__ int text_rows;
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  const Places places = copied(args.places, shared);
  const Policy& policy = args.p.policy;
  const Table table(shared, places, policy);
  const Levels levels = table.levels(args.p.own == args.p.group);
  const int rank = blockIdx.x;
  for (int r = threadIdx.x; r < table.ranks; r += kThreads) table.load()[r] = 0;
  for (int l = threadIdx.x; l < 2 * table.num_levels; l += kThreads) levels.group[l] = 0;
  if (threadIdx.x == 0) text_rows = 0;
  __syncthreads();
  start_dependents();
  wait_for_previous();
  count_rows(args, table);
  __syncthreads();
  split_evenly(places, table);
  __syncthreads();
  if (threadIdx.x >= kThreads - kWarp) pour_all(places, table);  // the warp with the fewest shifts to find
  const int32_t* const sums = args.p.group + static_cast<int64_t>(table.experts) * table.num_levels;
  const Capacity capacity(args.p, make_int4(__ldcg(sums), __ldcg(sums + 1), __ldcg(sums + 2), __ldcg(sums + 3)));
  find_shifts(args, places, table, capacity);
  __syncthreads();
  for (int l = threadIdx.x; l < table.num_levels; l += kThreads) args.scratch.levels[rank * table.num_levels + l] = 0;
  const int bound = capacity.of_rank(args.p), load = table.load()[rank];
  RankLimit limit = {kNotExceeded, 0, bound - load, bound};
  Kept stake = {0, 0};
  if (load > bound) {
    add_levels(args, places, table, rank, levels, &text_rows);
    __syncthreads();
    if (threadIdx.x < kWarp) limit = find_limit(policy, table, levels, bound, text_rows, &stake);
  }
  if (threadIdx.x == 0) args.scratch.limits[rank] = limit, args.scratch.stakes[rank] = stake;
  if (rank != 0) return;
  const int used = places.first()[table.experts];
  for (int i = threadIdx.x; i < table.physical; i += kThreads) args.scratch.quota[i] = i < used ? table.quota()[i] : 0;
  for (int e = threadIdx.x; e < table.experts; e += kThreads) args.p.shift[e] = table.shift()[e];
  for (int i = threadIdx.x; i < 2 * kReplicaCounts * table.experts; i += kThreads) args.counts[i] = 0;
  for (int r = threadIdx.x; r < table.ranks; r += kThreads) {
    args.rank_rows[r] = __ldcg(sums + kNumSums + r);
    args.rank_rows[table.ranks + r] = table.load()[r];
  }
}

}  // namespace

cudaError_t enqueue_replica_balance(const ReplicaBalanceArgs& args, cudaStream_t stream) {
  static bool raised[kMaxDevices] = {};
  const size_t bytes = Table::bytes(args.places, args.p.policy);
  const int most = max_shared_bytes() - 64;
  if (bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  const cudaError_t error = raise_shared_limit(replica_balance_kernel, most, raised);
  if (error != cudaSuccess) return error;
  const Shape shape = {.grid = args.places.num_ranks, .block = kThreads, .shared_bytes = bytes, .overlap = true};
  return launch(replica_balance_kernel, shape, args, stream);
}

}  // namespace macs::cuda
