// peer_all_reduce: the sum of an i32 array over ranks that address each other's memory.
//
// Problem:     [size] of each rank, and their sum; E * 2 * B + 4 values, 128 KB. Bound by one way over NVLink.
// Algorithm:   every value travels as an LL word, so that no flag and no fence has to follow it. One hop: to every peer, and each
//              rank adds up what lies in its own memory; (R - 1) size words leave a rank. Two hops: to its owner, which adds
//              up and sends the sum to all; 2 (R - 1) / R size words, however many ranks there are, and one way more.
// Grid:        a thread a value, up to kMostReduceBlocks blocks; block b waits for the blocks b of the peers and for no other of its own.
// Reuse:       LL words of an epoch lie where those of the epoch before last lay. Whoever sends them has received all of the last
//              epoch, which its peers (in two hops the value's owner) sent behind having read those. A sum lies where its
//              owner's values do in one hop, which no owner sends in two.
// Determinism: integers.
#include <algorithm>

#include "launch.cuh"
#include "macs/cuda.h"
#include "macs/peer_view.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // sources

struct PeerReduce {
  const PeerReduceParams& p;
  char* const home;
  const PeerView peers;
  uint32_t* const epochs;
  const WaitContext wait;
  const int64_t inbox;  // of this epoch

  __device__ __forceinline__ explicit PeerReduce(const PeerReduceParams& params)
      : p(params), home(p.region[p.rank]), peers(p.region),
        epochs(reinterpret_cast<uint32_t*>(home + p.layout.epochs) + blockIdx.x),
        wait{reinterpret_cast<FusedStatus*>(home + p.layout.status), p.timeout_ns, *epochs + 1, false},
        inbox(p.layout.inbox + 8 * (wait.epoch & 1) * p.num_ranks * p.size) {}

  __device__ __forceinline__ int64_t place(int source, int64_t i) const { return inbox + 8 * (source * p.size + i); }

  // Which rank adds `i` up in two hops. A warp's values have the same one.
  __device__ __forceinline__ int owner_of(int64_t i) const { return static_cast<int>(i / kWarp % p.num_ranks); }

  __device__ __forceinline__ void send(int peer, int64_t i, uint32_t value) const {
    peers.send(peer, place(p.rank, i), make_ll_word(value, wait.epoch));
  }
  __device__ __forceinline__ void send_to_all(int64_t i, uint32_t value) const {
#pragma unroll 1
    for (int peer = 0; peer < p.num_ranks; ++peer) {
      if (peer != p.rank) send(peer, i, value);
    }
  }

  // The sum at `i`; false: a peer's part of it never came.
  __device__ __forceinline__ bool add_peers(int64_t i, uint32_t& sum) const {
#pragma unroll 1
    for (int first = 0; first < p.num_ranks; first += kInFlight) {
      uint64_t words[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int source = first + k;
        if (source < p.num_ranks && source != p.rank) words[k] = load_relaxed_sys(address(source, i));
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int source = first + k;
        if (source >= p.num_ranks || source == p.rank) continue;
        if (!await_word(address(source, i), words[k], wait, Fault::kValues, source)) return false;
        sum += value_of(words[k]);
      }
    }
    return true;
  }

  // The sum at `i` as its owner sends it. Its wait is the longer one: a rank that never came is named by whoever waits for it.
  __device__ __forceinline__ bool receive_sum(int64_t i, uint32_t& sum) const {
    WaitContext longer = wait;
    longer.timeout_ns += longer.timeout_ns / 2;
    const int owner = owner_of(i);
    uint64_t word = load_relaxed_sys(address(owner, i));
    if (!await_word(address(owner, i), word, longer, Fault::kValues, owner)) return false;
    sum = value_of(word);
    return true;
  }

 private:
  __device__ __forceinline__ const uint64_t* address(int source, int64_t i) const {
    return reinterpret_cast<const uint64_t*>(home + place(source, i));
  }
};

// This thread's values: `call(i)` for each of them.
template <class Call>
__device__ __forceinline__ void for_each_value(const PeerReduceParams& p, Call call) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.size; i += step) call(i);
}

__device__ __forceinline__ bool reduce_in_one_hop(const PeerReduce& b, bool ok) {
  const PeerReduceParams& p = b.p;
  for_each_value(p, [&](int64_t i) {
    if (ok) b.send_to_all(i, static_cast<uint32_t>(p.values[i]));
  });
  for_each_value(p, [&](int64_t i) {
    uint32_t sum = static_cast<uint32_t>(p.values[i]);
    ok = ok && b.add_peers(i, sum);
    if (ok) p.sum[i] = static_cast<int32_t>(sum);
  });
  return ok;
}

// Owners add up before anybody waits for a sum, so that no two wait for each other.
__device__ __forceinline__ bool reduce_in_two_hops(const PeerReduce& b, bool ok) {
  const PeerReduceParams& p = b.p;
  for_each_value(p, [&](int64_t i) {
    const int owner = b.owner_of(i);
    if (ok && owner != p.rank) b.send(owner, i, static_cast<uint32_t>(p.values[i]));
  });
  for_each_value(p, [&](int64_t i) {
    if (b.owner_of(i) != p.rank) return;
    uint32_t sum = static_cast<uint32_t>(p.values[i]);
    ok = ok && b.add_peers(i, sum);
    if (!ok) return;
    b.send_to_all(i, sum);
    p.sum[i] = static_cast<int32_t>(sum);
  });
  for_each_value(p, [&](int64_t i) {
    if (b.owner_of(i) == p.rank) return;
    uint32_t sum;
    ok = ok && b.receive_sum(i, sum);
    if (ok) p.sum[i] = static_cast<int32_t>(sum);
  });
  return ok;
}

template <bool kTwoHops>
__global__ void __launch_bounds__(kThreads) peer_all_reduce_kernel(const __grid_constant__ PeerReduceParams p) {
  const PeerReduce b(p);
  bool ok = __syncthreads_and(threadIdx.x != 0 || !has_fault(b.wait)) != 0;
  ok = kTwoHops ? reduce_in_two_hops(b, ok) : reduce_in_one_hop(b, ok);
  if (__syncthreads_and(ok) != 0 && threadIdx.x == 0) *b.epochs = b.wait.epoch;
}

}  // namespace

cudaError_t launch_peer_all_reduce(const PeerReduceParams& p, cudaStream_t stream) {
  if (p.num_ranks < 1 || p.num_ranks > kMaxPeers || p.rank < 0 || p.rank >= p.num_ranks || p.size < 1 || p.hops < 0 ||
      p.hops > 2) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = std::min<int64_t>((p.size + kThreads - 1) / kThreads, kMostReduceBlocks);
  // Every rank owns values, so that each waits for every other by itself.
  const bool several = p.num_ranks > kMostRanksOfOneHop && p.size >= kWarp * p.num_ranks;
  const bool two_hops = p.hops == 0 ? several : p.hops == 2;
  return launch(two_hops ? peer_all_reduce_kernel<true> : peer_all_reduce_kernel<false>, {.grid = static_cast<int>(blocks), .block = kThreads}, p, stream);
}

}  // namespace macs::cuda
