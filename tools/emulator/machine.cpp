#include "emulator/machine.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace emulator {

Machine& machine() {
  static Machine it;
  return it;
}

Grid::Grid(Launch from) : launch(std::move(from)) { blocks_left = unreleased = num_blocks(); }

unsigned char* Block::dynamic_base() {
  constexpr uintptr_t kAlign = 128;
  const size_t room = (dynamic.size() - grid->launch.shared_bytes) / 2;
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic.data()) + room) / kAlign * kAlign);
}

int Block::rank() const {
  return static_cast<int>(std::find(cluster->blocks.begin(), cluster->blocks.end(), this) - cluster->blocks.begin());
}

void Clock::note_change() {
  ++round;
  idle = 0;
  idle_rounds = 0;
  leap = 1;
}

void Clock::note_spin(Thread& thread, int runnable) {
  constexpr uint64_t kRoundsToLeap = 3, kLongestLeap = 10'000'000;  // ns
  if (thread.idle_round == round) return;
  thread.idle_round = round;
  if (++idle < runnable) return;
  ++round;
  idle = 0;
  if (++idle_rounds < kRoundsToLeap) return;
  now += leap;
  leap = std::min(2 * leap, kLongestLeap);
}

uint64_t Machine::draw(uint64_t n) {  // splitmix64
  uint64_t x = random += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 31)) % n;
}

void Machine::make_ready(Thread& thread) {
  thread.state = Thread::State::kReady;
  thread.block->ready.push_back(&thread);
  ++runnable;
}

void Machine::wait(const char* what, Where where, unsigned mask) {
  clock.note_change();
  running->state = Thread::State::kWaiting;
  running->waits_for = what;
  running->where = where;
  running->mask = mask;
  leave();
}

void Machine::give_way() {
  if (!options.random || options.preempt_one_in == 0 || draw(options.preempt_one_in) != 0) return;
  leave();
}

void Machine::release(Block& block) {
  if (block.released) return;
  block.released = true;
  --block.grid->unreleased;
}

void Machine::set_failure(const std::string& what) {
  if (failed) return;
  failed = true;
  report = what + "\n" + describe(resident);
}

void Machine::end_run(const std::string& failure) {
  failed = true;
  report = failure;
  running->state = Thread::State::kWaiting;
  leave();
  std::abort();  // nobody resumes it
}

}  // namespace emulator
