// What the thread that runs asks of the machine: barriers, collectives, spinning, clusters.
#include <cstdio>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr uint64_t kMostIdleRounds = 100'000;  // half an hour of simulated time

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

Meeting& join(Warp& warp, const char* what, unsigned mask) {
  for (Meeting& meeting : warp.open) {
    if (meeting.mask == mask && std::strcmp(meeting.what, what) == 0) return meeting;
  }
  warp.open.push_back({what, mask, 0, {}});
  return warp.open.back();
}

void check_meeting(const Warp& warp, const Meeting& meeting, int lane, Where where) {
  if ((meeting.mask >> lane & 1u) == 0) {
    fail(std::string(meeting.what) + " with a mask that does not name the lane itself: " + hex(meeting.mask), where);
  }
  const unsigned returned = meeting.mask & ~warp.alive;
  if (returned != 0) fail(std::string(meeting.what) + " waits for lanes that have returned: " + hex(returned), where);
  for (const Meeting& other : warp.open) {
    if (&other == &meeting || (other.mask & meeting.arrived) == 0 || (meeting.mask & other.arrived) == 0) continue;
    fail(std::string("divergent warp: lanes in ") + meeting.what + " and in " + other.what + " wait for each other",
         where);
  }
}

bool orders_memory(const char* what) { return std::strcmp(what, "__syncwarp") == 0; }

std::vector<Thread*> lanes_of(Thread& thread, unsigned mask) {
  std::vector<Thread*> lanes;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0) lanes.push_back(&thread - thread.lane() + lane);
  }
  return lanes;
}

}  // namespace

Device& device() { return machine().device; }
void find_races(bool on) { machine().races.on = on; }
Options& options() { return machine().options; }
const std::string& report() { return machine().report; }
uint64_t steps() { return machine().steps; }
uint64_t launches() { return machine().launches; }
uint64_t now_ns() { return machine().clock.now; }
bool run_all() { return machine().run_all(); }
void enqueue(void* stream, Launch launch) { machine().streams[stream].queue.push_back(std::move(launch)); }

void fail(const std::string& what, Where where) {
  const Machine& it = machine();
  machine().end_run(what + "\n  at " + place(where) + ", " + name_of(*it.running) + "\n" + describe(it.resident));
}

void preempt() { machine().give_way(); }

void changed() {
  machine().clock.note_change();
  machine().give_way();
}

void spin(const char* what, Where where) {
  Machine& it = machine();
  it.running->waits_for = what;
  it.running->where = where;
  it.clock.note_spin(*it.running, it.runnable);
  if (it.clock.idle_rounds > kMostIdleRounds) {
    fail("livelock: every thread that does not wait spins, and no timeout ends it", where);
  }
  it.slice_over = it.options.random;
  it.leave();
}

Words meet_warp(const char* what, unsigned mask, uint64_t word, Where where) {
  Machine& it = machine();
  Thread& thread = *it.running;
  Warp& warp = thread.block->warps[thread.number / 32];
  Meeting& meeting = join(warp, what, mask);
  meeting.arrived |= 1u << thread.lane();
  meeting.words.of[thread.lane()] = word;
  check_meeting(warp, meeting, thread.lane(), where);
  if (meeting.arrived != mask) {
    it.wait(what, where, mask);
    return thread.words;
  }
  const Words words = meeting.words;
  if (orders_memory(what)) it.races.meet(lanes_of(thread, mask));
  warp.open.erase(warp.open.begin() + (&meeting - warp.open.data()));
  Thread* const first = &thread - thread.lane();
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) == 0 || lane == thread.lane()) continue;
    first[lane].words = words;
    it.make_ready(first[lane]);
  }
  return words;
}

void pass_if_complete(Block& block) {
  BlockBarrier& barrier = block.barrier;
  if (barrier.arrived == 0 || barrier.arrived < block.alive) return;
  barrier.votes = {barrier.count, barrier.arrived};
  barrier.arrived = barrier.count = 0;
  std::vector<Thread*> alive;
  for (Thread& thread : block.threads) {
    if (thread.state != Thread::State::kReturned) alive.push_back(&thread);
    if (thread.waits_in(barrier.what)) machine().make_ready(thread);
  }
  machine().races.meet(alive);
}

Votes meet_block(const char* what, bool vote, Where where) {
  Machine& it = machine();
  Block& block = *it.running->block;
  BlockBarrier& barrier = block.barrier;
  if (barrier.arrived == 0) barrier.what = what, barrier.where = where;
  if (std::strcmp(barrier.what, what) != 0 || barrier.where.line() != where.line()) {
    fail(std::string("divergent block: ") + what + ", while others wait in " + barrier.what + " at " +
             place(barrier.where), where);
  }
  ++barrier.arrived;
  barrier.count += vote ? 1 : 0;
  if (barrier.arrived < block.alive) {
    it.wait(what, where);
  } else {
    it.clock.note_change();
    pass_if_complete(block);
  }
  return barrier.votes;
}

unsigned char* dynamic_shared() { return machine().running->block->dynamic_base(); }

// --- Programmatic dependent launch

void start_dependents() {
  machine().release(*machine().running->block);
  changed();
}

void wait_for_previous(Where where) {
  Machine& it = machine();
  const Grid& grid = *it.running->block->grid;
  if (grid.previous != nullptr) it.wait(kBeforePrevious, where);
  if (it.races.on) it.races.learn(*it.running, grid.before);
}

// --- Clusters

int cluster_rank() { return machine().running->block->rank(); }
int cluster_blocks() { return machine().running->block->grid->launch.cluster; }

constexpr const char* kClusterWait = "cluster_wait";

void cluster_arrive() {
  Thread& thread = *machine().running;
  Cluster& cluster = *thread.block->cluster;
  thread.cluster_phase = cluster.phase;
  if (machine().races.on) machine().races.tell(thread, cluster.told);
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.phase;
    for (Block* block : cluster.blocks) {
      for (Thread& other : block->threads) {
        if (other.waits_in(kClusterWait)) machine().make_ready(other);
      }
    }
  }
  changed();
}

void cluster_wait(Where where) {
  Machine& it = machine();
  const Thread& thread = *it.running;
  const Cluster& cluster = *thread.block->cluster;
  if (cluster.phase == thread.cluster_phase) it.wait(kClusterWait, where);
  if (it.races.on) it.races.learn(thread, cluster.told);
}

void* map_to_block(const void* shared, int number) {
  Machine& it = machine();
  Block& here = *it.running->block;
  Block& there = *here.cluster->blocks.at(static_cast<size_t>(number));
  if (there.alive == 0) fail("shared memory of a block of the cluster that has ended", Where::current());
  const auto* const address = static_cast<const unsigned char*>(shared);
  if (it.statics.holds(address)) {
    return &there == &here ? const_cast<unsigned char*>(address)
                           : there.statics.data() + (address - it.statics.base);
  }
  return there.dynamic_base() + (address - here.dynamic_base());
}

}  // namespace emulator
