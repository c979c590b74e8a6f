// The emulated machine: its streams, grids, blocks, warps and threads.
#pragma once
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/launches.h"
#include "emulator/races.h"
#include "emulator/scheduler.h"
#include "emulator/static_shared.h"

namespace emulator {

struct Block;
struct Grid;

struct Thread {
  enum class State { kReady, kWaiting, kReturned };

  Fiber fiber;
  Block* block;
  uint3 index;
  int number;  // in the block
  State state = State::kReady;
  const char* waits_for = "";  // or spins for
  Where where;
  unsigned mask = 0;        // of the collective that it waits in
  Words words;              // that it takes home from there
  uint64_t idle_round = 0;  // of spinning, the last that it took part in
  int cluster_phase = 0;    // in which it arrived
  uint32_t identity = 0;    // of all threads of the run

  int lane() const { return number % 32; }
  bool waits_in(const char* what) const { return state == State::kWaiting && std::strcmp(waits_for, what) == 0; }
};

// The lanes that have come to one collective.
struct Meeting {
  const char* what;
  unsigned mask, arrived;
  Words words;
};

struct Warp {
  unsigned alive = 0;
  std::vector<Meeting> open;
};

struct BlockBarrier {
  int arrived = 0, count = 0;
  const char* what = "";
  Where where;
  Votes votes;  // of the last time
};

struct Cluster {
  int arrived = 0, phase = 0, threads = 0;
  std::vector<Block*> blocks;
  VectorClock told;  // by those that arrived
};

struct Block {
  Grid* grid;
  Cluster* cluster;
  uint3 index;
  uint64_t number;  // of all blocks
  int alive;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::deque<Thread*> ready;
  BlockBarrier barrier;
  bool released = false;                    // dependents may start, as far as this block goes
  std::vector<unsigned char> dynamic;       // shared memory
  std::vector<unsigned char> statics;       // static shared memory, while another block's lies in place

  unsigned char* dynamic_base();            // aligned
  int rank() const;                         // in the cluster
};

// A launch that has started.
struct Grid {
  Launch launch;
  uint64_t number;           // of all launches
  Grid* previous = nullptr;  // of its stream, while that runs
  int next_block = 0, blocks_left, unreleased;
  VectorClock at_start, before, after;  // what came before it when it started, and now; what its threads have done
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;

  explicit Grid(Launch from);
  int num_blocks() const { return static_cast<int>(launch.grid.x * launch.grid.y * launch.grid.z); }
  bool admitted() const { return next_block == num_blocks(); }
};

struct Stream {
  std::deque<Launch> queue;
  std::deque<std::unique_ptr<Grid>> started;
  VectorClock done;
};

// Simulated time, and whether anything happens at all.
struct Clock {
  uint64_t now = 0;
  // Spinning: the threads that have since the last change, and rounds in which all did.
  int idle = 0;
  uint64_t round = 1, idle_rounds = 0, leap = 1;

  void note_change();
  // `runnable`: threads that do not wait.
  void note_spin(Thread& thread, int runnable);
};

struct Machine {
  Device device;
  Options options;
  std::map<void*, Stream> streams;
  std::vector<Block*> resident;
  Stacks stacks;
  StaticShared statics = StaticShared::find();
  Block* loaded = nullptr;  // whose static shared memory lies in place
  Thread* running = nullptr;
  int runnable = 0;  // threads that do not wait
  Clock clock;
  Races races;
  bool failed = false, slice_over = false;
  std::string report;
  uint64_t random = 0, steps = 0, launches = 0, blocks = 0;
  size_t turn = 0;  // of round robin

  uint64_t draw(uint64_t n);
  void make_ready(Thread& thread);
  // The thread that runs lets the scheduler have the processor, ready or not.
  void leave() { suspend(running->fiber); }
  void wait(const char* what, Where where, unsigned mask = 0);
  // Another thread's turn, perhaps.
  void give_way();
  void release(Block& block);
  bool run_all();
  void set_failure(const std::string& what);
  // From the thread that runs.
  [[noreturn]] void end_run(const std::string& failure);
};

Machine& machine();

// The barrier of the block is passed when all of its threads have come that have not returned.
void pass_if_complete(Block& block);

// For reports.
std::string place(Where where);
std::string code(uint32_t offset);  // of this library; tests/support/emulated.py finds the line
std::string name_of(const Thread& thread);
std::string describe(const std::vector<Block*>& blocks);

constexpr const char* kBeforePrevious = "wait_for_previous";

}  // namespace emulator
