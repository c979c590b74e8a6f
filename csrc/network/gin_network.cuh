// Network policy of the fused dispatch over NCCL's GIN: peers of another NVLink domain. COMPILED, NOT RUN.
//
// `make check-network` compiles the dispatch with it against the headers of the pinned NCCL, so that the kernels stay free
// of what only a shared address space can do. GIN's device code belongs to the library of its release: build against
// the headers of the NCCL that is loaded.
//
// Signals. A signal must not overtake the rows before it; GIN promises that for signals that add to 64 bits. Every flag is
// signalled once an epoch, so that adding one leaves the epoch's number, as a direct peer's store does.
// Rows. GIN reads from the window, not from shared memory: a warp copies its part of a row to an outbox of its own in this
// rank's region, behind the layout, and waits until the row before has left it.
#pragma once
#include <nccl_device.h>

#include "macs/fused.h"
#include "macs/ptx.cuh"

namespace macs::cuda {

// What FusedDispatchParams::network points to, in device memory. Ranks are those of the communicator.
struct GinState {
  ncclDevComm comm;
  ncclWindow_t window;   // over the whole region
  int64_t outboxes;      // in it: [blocks, warps, outbox_bytes]
  int64_t outbox_bytes;  // a row's features
};

class GinNetwork {
 public:
  __device__ __forceinline__ explicit GinNetwork(const void* state) : state_(*static_cast<const GinState*>(state)) {}

  __device__ __forceinline__ bool is_direct(int peer) const {
    return ncclTeamRankIsMember(ncclTeamLsa(state_.comm), world(), peer);
  }
  template <class T>
  __device__ __forceinline__ void write(int peer, int64_t offset, T value) const {
    gin().putValue(world(), peer, state_.window, offset, value);
  }
  __device__ __forceinline__ void put(int peer, int64_t offset, const uint4* from, int vectors, int lane) const {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t outbox = state_.outboxes + (static_cast<int64_t>(blockIdx.x) * warps + warp) * state_.outbox_bytes;
    const ncclGin net = gin();
    net.flush(ncclCoopWarp());
    uint4* const to = static_cast<uint4*>(ncclGetLocalPointer(state_.window, outbox));
    for (int i = lane; i < vectors; i += 32) to[i] = from[i];
    __syncwarp();
    net.put(world(), peer, state_.window, offset, state_.window, outbox, static_cast<size_t>(vectors) * sizeof(uint4),
            ncclGin_None{}, ncclGin_None{}, ncclCoopWarp());
  }
  __device__ __forceinline__ void signal(int peer, int64_t offset, uint32_t) const {
    gin().signal(world(), peer, ncclGin_StrongVASignalAdd{state_.window, static_cast<size_t>(offset), 1},
                 ncclCoopThread(), ncclGin_None{}, ::cuda::thread_scope_block);
  }

 private:
  __device__ __forceinline__ ncclTeam world() const { return ncclTeamWorld(state_.comm); }
  // A block keeps to one context: a signal is ordered behind the puts of its context.
  __device__ __forceinline__ ncclGin gin() const { return ncclGin(state_.comm, blockIdx.x % state_.comm.ginContextCount); }

  const GinState& state_;
};

}  // namespace macs::cuda
