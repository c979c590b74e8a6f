// The scheduler: which launch starts, and which thread runs next.
//
// A thread runs until it has to wait (a collective, a barrier), spins, or passes an ordered memory operation. Then a
// block is drawn, and for some steps its threads one after the other, all from one seed: the same seed, the same run.
// Round robin takes blocks and threads in order instead.
//
// Time: a nanosecond a step. A round in which every thread that does not wait has only spun, while nothing that the
// scheduler sees has changed, can be ended by a timeout only; after three of them time leaps, farther each round.
#include "emulator/scheduler.h"

#include <algorithm>

#include "emulator/machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kMaxSlice = 64;              // steps of one block in a row
constexpr size_t kSharedRoom = 1024;       // on both sides, in which accesses out of bounds show
constexpr unsigned char kGarbage = 0xa5;   // what shared memory holds before somebody writes it

// Where every fiber begins; never returns.
void thread_main() {
  Machine& it = machine();
  it.running->block->grid->launch.kernel();
  it.running->state = Thread::State::kReturned;
  it.leave();
}

// --- Launches

// A launch starts when the one before has ended, or at its leave (programmatic dependent launch).
bool start_next(Machine& it, Stream& stream) {
  if (stream.queue.empty()) return false;
  Grid* const previous = stream.started.empty() ? nullptr : stream.started.back().get();
  const bool leave = stream.queue.front().overlap && previous != nullptr && previous->admitted() &&
                     previous->unreleased == 0;
  if (previous != nullptr && !leave) return false;
  Launch launch = std::move(stream.queue.front());
  stream.queue.pop_front();
  it.clock.note_change();
  if (launch.host) {
    launch.host();
    return true;
  }
  stream.started.push_back(std::make_unique<Grid>(std::move(launch)));
  stream.started.back()->number = it.launches++;
  stream.started.back()->previous = previous;
  stream.started.back()->at_start = stream.started.back()->before = stream.done;
  return true;
}

void fill_threads(Machine& it, Block& block, dim3 size) {
  const int threads = block.alive;
  block.warps.resize((threads + 31) / 32);
  block.threads.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    const auto n = static_cast<unsigned>(i);
    thread.block = &block;
    thread.number = i;
    thread.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
    thread.fiber.stack = it.stacks.take();
    block.warps[i / 32].alive |= 1u << (i % 32);
    it.races.begin(thread);
    it.make_ready(thread);
  }
}

void admit_block(Machine& it, Grid& grid, Cluster* cluster) {
  const dim3 &size = grid.launch.block, &blocks = grid.launch.grid;
  const auto at = static_cast<unsigned>(grid.next_block++);
  grid.blocks.push_back(std::make_unique<Block>());
  Block& block = *grid.blocks.back();
  block.grid = &grid;
  block.number = it.blocks++;
  block.cluster = cluster;
  block.index = {at % blocks.x, at / blocks.x % blocks.y, at / blocks.x / blocks.y};
  block.alive = static_cast<int>(size.x * size.y * size.z);
  block.dynamic.assign(kSharedRoom + grid.launch.shared_bytes + kSharedRoom, kGarbage);
  block.statics.assign(it.statics.bytes, kGarbage);
  fill_threads(it, block, size);
  cluster->blocks.push_back(&block);
  cluster->threads += block.alive;
  it.resident.push_back(&block);
}

// Blocks of the grids that have started, whole clusters of them, while there is room.
void admit_blocks(Machine& it) {
  for (auto& [handle, stream] : it.streams) {
    for (auto& grid : stream.started) {
      const int size = grid->launch.cluster;
      while (!grid->admitted() && static_cast<int>(it.resident.size()) + size <= it.device.resident_blocks()) {
        grid->clusters.push_back(std::make_unique<Cluster>());
        for (int i = 0; i < size; ++i) admit_block(it, *grid, grid->clusters.back().get());
      }
    }
  }
}

// The launch before `grid` has ended.
void let_go(Machine& it, const Stream& stream, Grid& grid) {
  grid.previous = nullptr;
  grid.before = stream.done;
  for (auto& block : grid.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.waits_in(kBeforePrevious)) it.make_ready(thread);
    }
  }
}

void end_grids(Stream& stream) {
  while (!stream.started.empty() && stream.started.front()->blocks_left == 0) {
    stream.done.join(stream.started.front()->after);
    if (stream.started.size() > 1) let_go(machine(), stream, *stream.started[1]);
    stream.started.pop_front();
  }
}

// --- Steps

// The static shared memory of `block` into its place.
void load_statics(Machine& it, Block* block) {
  if (it.loaded == block) return;
  const StaticShared& place = it.statics;
  if (it.loaded != nullptr) std::copy_n(place.base, place.bytes, it.loaded->statics.data());
  if (block != nullptr) std::copy_n(block->statics.data(), place.bytes, place.base);
  it.loaded = block;
}

void retire(Machine& it, Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.number / 32];
  const unsigned lane = 1u << thread.lane();
  it.clock.note_change();
  it.races.end(thread);
  it.stacks.give(thread.fiber.stack);
  warp.alive &= ~lane;
  --block.alive;
  for (const Meeting& meeting : warp.open) {
    if ((meeting.mask & lane) == 0) continue;
    it.set_failure(name_of(thread) + " has returned while others wait for it in " + meeting.what);
  }
  pass_if_complete(block);
  if (block.alive > 0) return;
  it.release(block);
  load_statics(it, nullptr);
  it.resident.erase(std::find(it.resident.begin(), it.resident.end(), &block));
  --block.grid->blocks_left;
}

void step(Machine& it, Thread& thread) {
  it.running = &thread;
  threadIdx = thread.index;
  ++it.steps;
  ++it.clock.now;
  resume(thread.fiber, thread_main);
  it.running = nullptr;
  if (thread.state == Thread::State::kReady) {
    thread.block->ready.push_back(&thread);
    return;
  }
  --it.runnable;
  if (thread.state == Thread::State::kReturned) retire(it, thread);
}

Block* choose_block(Machine& it) {
  const size_t blocks = it.resident.size();
  if (blocks == 0) return nullptr;
  const size_t first = it.options.random ? it.draw(blocks) : it.turn++;
  for (size_t i = 0; i < blocks; ++i) {
    Block* const block = it.resident[(first + i) % blocks];
    if (!block->ready.empty()) return block;
  }
  return nullptr;
}

Thread& choose_thread(Machine& it, Block& block) {
  if (it.options.random) std::swap(block.ready.front(), block.ready[it.draw(block.ready.size())]);
  Thread* const thread = block.ready.front();
  block.ready.pop_front();
  return *thread;
}

void run_slice(Machine& it, Block& block) {
  load_statics(it, &block);
  blockIdx = block.index;
  blockDim = block.grid->launch.block;
  gridDim = block.grid->launch.grid;
  const size_t steps = it.options.random ? 1 + it.draw(kMaxSlice) : block.ready.size();
  it.slice_over = false;
  for (size_t i = 0; i < steps && !block.ready.empty() && !it.failed && !it.slice_over; ++i) {
    step(it, choose_thread(it, block));
  }
}

void drop_all(Machine& it) {
  for (Block* block : it.resident) {
    for (Thread& thread : block->threads) {
      if (thread.state != Thread::State::kReturned) it.stacks.give(thread.fiber.stack);
    }
  }
  it.resident.clear();
  it.streams.clear();
  it.loaded = nullptr;
  it.runnable = 0;
  it.stacks.trim();
}

}  // namespace

bool Machine::run_all() {
  failed = false;
  report.clear();
  random = options.seed;
  turn = 0;
  clock.note_change();
  races.clear();
  for (auto& [handle, stream] : streams) stream.done = {};
  while (!failed) {
    for (auto& [handle, stream] : streams) {
      end_grids(stream);
      while (start_next(*this, stream)) {
      }
    }
    admit_blocks(*this);
    Block* const block = choose_block(*this);
    if (block != nullptr) {
      run_slice(*this, *block);
    } else if (resident.empty()) {
      stacks.trim();
      return true;
    } else {
      set_failure("deadlock: every thread waits");
    }
  }
  drop_all(*this);
  return false;
}

}  // namespace emulator
