// peer_all_reduce: the sum of an i32 array over ranks that address each other's memory.
//
// Problem:     [size] of each rank, and their sum; E * 2 * B + 4 values, 128 KB. Bound by one way over NVLink.
// Algorithm:   every value goes to every peer as an LL word, so that no flag and no fence has to follow it; each rank adds up
//              what lies in its own memory.
// Grid:        a thread a value, up to kMostReduceBlocks blocks; block b waits for the blocks b of the peers and for no other of its own.
// Reuse:       LL words of an epoch lie where those of the epoch before last lay. Whoever sends them has heard all of the last
//              epoch, which its peers sent behind having read those.
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

  __device__ __forceinline__ void tell(int64_t i) const {
    const uint64_t word = make_ll_word(static_cast<uint32_t>(p.values[i]), wait.epoch);
#pragma unroll 1
    for (int peer = 0; peer < p.num_ranks; ++peer) {
      if (peer != p.rank) peers.send(peer, place(p.rank, i), word);
    }
  }

  // The sum at `i`; false: a peer's part of it never came.
  __device__ __forceinline__ bool hear(int64_t i, uint32_t& sum) const {
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

 private:
  __device__ __forceinline__ const uint64_t* address(int source, int64_t i) const {
    return reinterpret_cast<const uint64_t*>(home + place(source, i));
  }
};

__global__ void __launch_bounds__(kThreads) peer_all_reduce_kernel(const __grid_constant__ PeerReduceParams p) {
  const PeerReduce b(p);
  bool ok = __syncthreads_and(threadIdx.x != 0 || !has_fault(b.wait)) != 0;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  for (int64_t i = begin; i < p.size && ok; i += step) b.tell(i);
  for (int64_t i = begin; i < p.size; i += step) {
    uint32_t sum = static_cast<uint32_t>(p.values[i]);
    ok = ok && b.hear(i, sum);
    if (ok) p.sum[i] = static_cast<int32_t>(sum);
  }
  if (__syncthreads_and(ok) != 0 && threadIdx.x == 0) *b.epochs = b.wait.epoch;
}

}  // namespace

cudaError_t launch_peer_all_reduce(const PeerReduceParams& p, cudaStream_t stream) {
  if (p.num_ranks < 1 || p.num_ranks > kMaxPeers || p.rank < 0 || p.rank >= p.num_ranks || p.size < 1) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = std::min<int64_t>((p.size + kThreads - 1) / kThreads, kMostReduceBlocks);
  return launch(peer_all_reduce_kernel, {.grid = static_cast<int>(blocks), .block = kThreads}, p, stream);
}

}  // namespace macs::cuda
