// Small kernels that test_emulator.py runs: what has to work, and planted faults that have to be found.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "grid.cuh"
#include "launch.cuh"
#include "macs/ptx.cuh"

namespace macs::cuda {
namespace {

constexpr int kThreads = 128;

struct Arguments {
  const int* in;
  int* out;
  int variant;
};

template <class Args>
cudaError_t run(void (*kernel)(Args), const Args& args, int blocks, int cluster, void* stream, bool overlap = false) {
  const Shape shape = {.grid = blocks, .block = kThreads, .cluster = cluster, .shared_bytes = 1024, .overlap = overlap};
  return launch(kernel, shape, args, static_cast<cudaStream_t>(stream));
}

// Variant 1 lacks the barrier between the warps' sums and their reader.
__global__ void block_sum(const __grid_constant__ Arguments args) {
  __shared__ int sums[kThreads / kWarp];
  int sum = args.in[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(kFullMask, sum, offset);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  if (args.variant != 1) __syncthreads();
  if (threadIdx.x != 0) return;
  args.out[blockIdx.x] = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) args.out[blockIdx.x] += sums[warp];
}

// out [7, threads]: what each lane gets from each collective, among the lanes whose number has the same parity.
__global__ void collectives(const __grid_constant__ Arguments args) {
  const int lane = threadIdx.x % kWarp, value = args.in[threadIdx.x];
  const unsigned mask = lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  const auto put = [&](int row, int what) { args.out[row * kThreads + threadIdx.x] = what; };
  put(0, __shfl_xor_sync(mask, value, 2));
  put(1, __shfl_up_sync(kFullMask, value, 1, 8));
  put(2, static_cast<int>(__ballot_sync(mask, value > 0)));
  put(3, static_cast<int>(__match_any_sync(mask, value)));
  put(4, __reduce_add_sync(mask, value));
  put(5, __reduce_max_sync(mask, value));
  put(6, __syncthreads_count(value > 0));
}

// A warp turns its numbers around in shared memory. Variant 1 lets a shuffle stand for the barrier.
__global__ void reverse(const __grid_constant__ Arguments args) {
  __shared__ int numbers[kThreads];
  const int lane = threadIdx.x % kWarp;
  numbers[threadIdx.x] = args.in[threadIdx.x];
  if (args.variant == 1) {
    __shfl_sync(kFullMask, lane, 0);
  } else {
    __syncwarp();
  }
  args.out[threadIdx.x] = numbers[threadIdx.x - lane + kWarp - 1 - lane];
}

struct GridArguments {
  const int* in;
  int* out;
  GridState* state;
};

// Every block sees what every other wrote before the barrier; three times over.
__global__ void grid_exchange(const __grid_constant__ GridArguments args) {
  Grid grid(args.state);
  for (int round = 0; round < 3; ++round) {
    int* const row = args.out + round * gridDim.x;
    if (threadIdx.x == 0) row[blockIdx.x] = round == 0 ? args.in[blockIdx.x] : 0;
    grid.barrier();
    const int* const last = row - gridDim.x;
    if (round > 0 && threadIdx.x < gridDim.x) atomicAdd(row + blockIdx.x, last[threadIdx.x]);
    __syncthreads();
  }
  grid.leave();
}

struct PeerArguments {
  uint32_t* flags;  // [2]
  int* data;        // [2, threads]
  int* out;         // [2, threads]
  int* fault;       // [2]
  int rank, variant;
  uint64_t timeout_ns;
};

// Two ranks send each other a row. Variant 1 sets the flag before the data; 2 waits without end; 3 does not release, 4
// does not acquire; 5 does both by fences; 6 reads the row through the path for constants.
__global__ void peer_exchange(const __grid_constant__ PeerArguments args) {
  __shared__ bool came;
  const int rank = args.rank, peer = 1 - rank;
  if (args.variant == 1 && threadIdx.x == 0) store_release_sys(args.flags + peer, 1);
  args.data[peer * kThreads + threadIdx.x] = 100 * rank + static_cast<int>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (args.variant == 5) fence_acq_rel_sys();
    if (args.variant == 3 || args.variant == 5) {
      store_relaxed_sys(args.flags + peer, 1);
    } else if (args.variant != 1) {
      store_release_sys(args.flags + peer, 1);
    }
    const uint64_t start = global_timer_ns();
    came = false;
    while (!came && (args.variant == 2 || global_timer_ns() - start < args.timeout_ns)) {
      const uint32_t* const flag = args.flags + rank;
      came = (args.variant == 4 || args.variant == 5 ? load_relaxed_sys(flag) : load_acquire_sys(flag)) != 0;
    }
    if (args.variant == 5) fence_acq_rel_sys();
    args.fault[rank] = came ? 0 : 1;
  }
  __syncthreads();
  const int* const mine = args.data + rank * kThreads + threadIdx.x;
  args.out[rank * kThreads + threadIdx.x] = !came ? -1 : (args.variant == 6 ? __ldg(mine) : *mine);
}

// One fault a variant.
__global__ void misuse(const __grid_constant__ Arguments args) {
  const int lane = threadIdx.x % kWarp;
  if (args.variant == 0) {  // lane 0 waits for lane 1, which waits for the block
    if (lane == 0) __syncwarp(3);
    __syncthreads();
  } else if (args.variant == 1) {  // one warp, two collectives
    args.out[threadIdx.x] = lane < 16 ? __any_sync(kFullMask, 1) : __shfl_sync(kFullMask, 1, 0);
  } else if (args.variant == 2) {  // a lane that is gone
    if (lane == 5) return;
    args.out[threadIdx.x] = __reduce_add_sync(kFullMask, 1);
  } else if (args.variant == 3) {  // two barriers
    if (threadIdx.x < kWarp) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (args.variant == 4) {  // a lane outside of the mask
    if (lane < 8) args.out[threadIdx.x] = __shfl_sync(0xffu, lane, 9);
  } else if (args.variant == 5) {
    __trap();
  } else if (args.variant == 6) {  // behind the last byte of shared memory
    reinterpret_cast<int*>(dynamic_shared())[256 + threadIdx.x] = 1;
  } else if (args.variant == 7) {  // a vector across two
    reinterpret_cast<int4*>(args.out + 1)[threadIdx.x / 8] = make_int4(1, 2, 3, 4);
  }
}

// x -> 10 x + digit, behind the kernel before. Variant 1 does not wait for that.
__global__ void append_digit(const __grid_constant__ Arguments args) {
  start_dependents();
  if (args.variant != 1) wait_for_previous();
  args.out[threadIdx.x] = 10 * args.out[threadIdx.x] + *args.in;
}

// Every block adds up the numbers that the blocks of its cluster hold.
__global__ void cluster_sum(const __grid_constant__ Arguments args) {
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  int* const number = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x == 0) *number = args.in[blockIdx.x];
  cluster.sync();
  if (threadIdx.x == 0) {
    args.out[blockIdx.x] = 0;
    for (unsigned block = 0; block < cluster.num_blocks(); ++block) {
      args.out[blockIdx.x] += *cluster.map_shared_rank(number, block);
    }
  }
  cluster.sync();  // nobody leaves while its shared memory is being read
}

}  // namespace
}  // namespace macs::cuda

using namespace macs::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int run_block_sum(const int* in, int* out, int64_t blocks, int64_t variant, void* stream) {
  return run(block_sum, Arguments{in, out, static_cast<int>(variant)}, static_cast<int>(blocks), 1, stream);
}
EXPORT int run_collectives(const int* in, int* out, void* stream) {
  return run(collectives, Arguments{in, out, 0}, 1, 1, stream);
}
EXPORT int run_reverse(const int* in, int* out, int64_t variant, void* stream) {
  return run(reverse, Arguments{in, out, static_cast<int>(variant)}, 1, 1, stream);
}
EXPORT int run_grid_exchange(const int* in, int* out, void* state, int64_t blocks, void* stream) {
  const GridArguments args = {in, out, static_cast<GridState*>(state)};
  return run(grid_exchange, args, static_cast<int>(blocks), 1, stream);
}
EXPORT int run_peer_exchange(uint32_t* flags, int* data, int* out, int* fault, int64_t rank, int64_t variant,
                             int64_t timeout_ns, void* stream) {
  return run(peer_exchange,
             PeerArguments{flags, data, out, fault, static_cast<int>(rank), static_cast<int>(variant),
                           static_cast<uint64_t>(timeout_ns)},
             1, 1, stream);
}
EXPORT int run_misuse(int* out, int64_t variant, void* stream) {
  return run(misuse, Arguments{nullptr, out, static_cast<int>(variant)}, 1, 1, stream);
}
EXPORT int run_append_digit(const int* digit, int* out, int64_t variant, void* stream) {
  return run(append_digit, Arguments{digit, out, static_cast<int>(variant)}, 1, 1, stream, true);
}
EXPORT int run_cluster_sum(const int* in, int* out, int64_t blocks, int64_t cluster, void* stream) {
  return run(cluster_sum, Arguments{in, out, 0}, static_cast<int>(blocks), static_cast<int>(cluster), stream);
}

// The formats, without a kernel. 0: bf16, 1: f16, 2: e4m3.
EXPORT int convert(const float* in, unsigned short* codes, float* back, int64_t n, int64_t format, void*) {
  for (int64_t i = 0; i < n; ++i) {
    if (format == 0) {
      const __nv_bfloat16 x = __float2bfloat16_rn(in[i]);
      codes[i] = __bfloat16_as_ushort(x), back[i] = __bfloat162float(x);
    } else if (format == 1) {
      const __half x = __float2half_rn(in[i]);
      codes[i] = __half_as_ushort(x), back[i] = __half2float(x);
    } else {
      const unsigned char x = __nv_cvt_float_to_fp8(in[i], __NV_SATFINITE, __NV_E4M3);
      codes[i] = x, back[i] = __half2float(__nv_cvt_fp8_to_halfraw(x, __NV_E4M3));
    }
  }
  return 0;
}
