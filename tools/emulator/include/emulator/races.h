// Data races: two accesses of one byte, at least one of them a write and not both atomic, that nothing orders.
//
// Happens-before by vector clocks, as CUDA's memory model has it: a barrier of the block or of the cluster and
// __syncwarp order all that take part, other collectives nothing; a release orders what its thread did or knew of
// before what comes behind an acquire of its value; fences make relaxed operations do so; a launch comes behind the one
// before it. A race is found in any schedule that runs both accesses, however far apart.
//
// Not seen: which scope (gpu, sys) an operation has; distributed shared memory; all but the last readers of a byte.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

struct Thread;

// How far each thread had come when somebody last heard of it.
class VectorClock {
 public:
  uint16_t of(uint32_t thread) const { return thread < at_.size() ? at_[thread] : 0; }
  void set(uint32_t thread, uint16_t time);
  void join(const VectorClock& other);

 private:
  std::vector<uint16_t> at_;
};

// What a thread knows; what its relaxed stores publish, and its relaxed loads have seen but no fence has made known.
struct Knowledge {
  VectorClock now, fenced, pending;
};

enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite, kConstantRead };

class Races {
 public:
  bool on = false;

  void clear();  // the host has waited for everything
  void begin(Thread& thread);
  void end(const Thread& thread);
  // Afterwards each of them knows what all of them know.
  void meet(const std::vector<Thread*>& threads);
  void learn(const Thread& thread, const VectorClock& clock) { knowledge(thread).now.join(clock); }
  void tell(const Thread& thread, VectorClock& clock);

  // An atomic load or store, or one of both (`adds`). `ordered`: acquire, release.
  void load(const Thread& thread, const void* address, bool ordered);
  void store(const Thread& thread, const void* address, bool ordered, bool adds);
  void fence(const Thread& thread);

  // The race that an access makes, in words, or nothing. `place`: an address in this library's code.
  std::string access(const Thread& thread, const void* address, size_t bytes, Access kind, uint32_t place);

 private:
  static constexpr int kReaders = 2;
  static constexpr uintptr_t kPageBytes = 4096;
  struct Record {
    uint32_t thread = 0, place = 0;
    uint16_t time = 0;  // 0: nobody
    bool atomic = false;
  };
  struct Cell {
    Record write, reads[kReaders];
  };

  Knowledge& knowledge(const Thread& thread);
  void advance(const Thread& thread);
  Cell& cell(uintptr_t key);
  const Record* rival(const Cell& cell, const Thread& thread, Access kind);
  void remember(Cell& cell, const Thread& thread, Access kind, uint32_t place);

  std::vector<Knowledge> known_;
  std::vector<std::string> names_;
  std::unordered_map<uintptr_t, VectorClock> published_;  // by atomic stores
  std::unordered_map<uintptr_t, std::vector<Cell>> pages_;
  uintptr_t last_number_ = 0;
  std::vector<Cell>* last_page_ = nullptr;
};

// From the emulated intrinsics: an access that is not a plain one. `address` may be shared memory.
void observe(const void* address, size_t bytes, Access kind);
void observe_load(const void* address, size_t bytes, bool acquire);
void observe_store(const void* address, size_t bytes, bool release, bool adds);
void observe_fence();

}  // namespace emulator
