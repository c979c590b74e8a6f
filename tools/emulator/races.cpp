#include "emulator/races.h"

#include <algorithm>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr uint16_t kMostTime = 0xffff;  // of a clock, which stays there: races later on may go unseen

bool is_write(Access kind) { return kind == Access::kWrite || kind == Access::kAtomicWrite; }
bool is_atomic(Access kind) { return kind == Access::kAtomicRead || kind == Access::kAtomicWrite; }

// Shared memory has the same addresses in block after block.
uintptr_t key_of(const Thread& thread, const void* address) {
  const Block& block = *thread.block;
  const auto* const at = static_cast<const unsigned char*>(address);
  const StaticShared& statics = machine().statics;
  const uintptr_t own = (uintptr_t{1} << 62) + (static_cast<uintptr_t>(block.number) << 24);
  if (statics.holds(at)) return own + (uintptr_t{1} << 23) + static_cast<uintptr_t>(at - statics.base);
  if (at >= block.dynamic.data() && at < block.dynamic.data() + block.dynamic.size()) {
    return own + static_cast<uintptr_t>(at - block.dynamic.data());
  }
  return reinterpret_cast<uintptr_t>(address);
}

const char* verb(Access kind) {
  switch (kind) {
    case Access::kRead: return "reads";
    case Access::kWrite: return "writes";
    case Access::kAtomicRead: return "atomically reads";
    case Access::kAtomicWrite: return "atomically writes";
    case Access::kConstantRead: return "reads, as what nobody writes during the launch,";
  }
  return "";
}

}  // namespace

void VectorClock::set(uint32_t thread, uint16_t time) {
  if (thread >= at_.size()) at_.resize(thread + 1);
  at_[thread] = time;
}

void VectorClock::join(const VectorClock& other) {
  if (other.at_.size() > at_.size()) at_.resize(other.at_.size());
  for (size_t i = 0; i < other.at_.size(); ++i) at_[i] = std::max(at_[i], other.at_[i]);
}

Knowledge& Races::knowledge(const Thread& thread) { return known_[thread.identity]; }

void Races::advance(const Thread& thread) {
  VectorClock& now = knowledge(thread).now;
  now.set(thread.identity, static_cast<uint16_t>(std::min(now.of(thread.identity) + 1, int{kMostTime})));
}

void Races::clear() {
  known_.clear();
  names_.clear();
  published_.clear();
  pages_.clear();
  last_page_ = nullptr;
}

void Races::begin(Thread& thread) {
  if (!on) return;
  thread.identity = static_cast<uint32_t>(known_.size());
  known_.emplace_back();
  names_.push_back(name_of(thread));
  known_.back().now = thread.block->grid->before;
  advance(thread);
}

void Races::end(const Thread& thread) {
  if (on) tell(thread, thread.block->grid->after);
}

void Races::meet(const std::vector<Thread*>& threads) {
  if (!on) return;
  VectorClock all;
  for (const Thread* thread : threads) all.join(knowledge(*thread).now);
  for (const Thread* thread : threads) {
    knowledge(*thread).now = all;
    advance(*thread);
  }
}

void Races::tell(const Thread& thread, VectorClock& clock) {
  clock.join(knowledge(thread).now);
  advance(thread);
}

void Races::load(const Thread& thread, const void* address, bool ordered) {
  const auto found = published_.find(key_of(thread, address));
  if (found == published_.end()) return;
  Knowledge& known = knowledge(thread);
  (ordered ? known.now : known.pending).join(found->second);
}

void Races::store(const Thread& thread, const void* address, bool ordered, bool adds) {
  VectorClock& clock = published_[key_of(thread, address)];
  const Knowledge& known = knowledge(thread);
  if (!adds) clock = {};
  clock.join(ordered ? known.now : known.fenced);
  advance(thread);
}

void Races::fence(const Thread& thread) {
  Knowledge& known = knowledge(thread);
  known.now.join(known.pending);
  known.fenced = known.now;
  advance(thread);
}

Races::Cell& Races::cell(uintptr_t key) {
  const uintptr_t number = key / kPageBytes;
  if (last_page_ == nullptr || number != last_number_) {
    std::vector<Cell>& page = pages_[number];
    if (page.empty()) page.resize(kPageBytes);
    last_number_ = number;
    last_page_ = &page;
  }
  return (*last_page_)[key % kPageBytes];
}

// An access of the byte that this one conflicts with, and that nothing orders before it.
const Races::Record* Races::rival(const Cell& cell, const Thread& thread, Access kind) {
  const VectorClock& now = kind == Access::kConstantRead ? thread.block->grid->at_start : knowledge(thread).now;
  const auto conflicts = [&](const Record& other) {
    const bool mine = other.thread == thread.identity && kind != Access::kConstantRead;
    return other.time != 0 && !mine && !(other.atomic && is_atomic(kind)) && other.time > now.of(other.thread);
  };
  if (conflicts(cell.write)) return &cell.write;
  if (!is_write(kind)) return nullptr;
  const auto reader = std::find_if(std::begin(cell.reads), std::end(cell.reads), conflicts);
  return reader != std::end(cell.reads) ? reader : nullptr;
}

void Races::remember(Cell& cell, const Thread& thread, Access kind, uint32_t place) {
  const VectorClock& now = knowledge(thread).now;
  const Record mine = {thread.identity, place, now.of(thread.identity), is_atomic(kind)};
  if (is_write(kind)) {
    cell = {mine, {}};
    return;
  }
  // In the place of a reader that this thread knows of, else of the oldest.
  const auto known = [&](const Record& other) { return other.time <= now.of(other.thread); };
  Record* const end = std::end(cell.reads);
  Record* const free = std::find_if(std::begin(cell.reads), end, known);
  if (free == end) std::rotate(std::begin(cell.reads), std::begin(cell.reads) + 1, end);
  *(free == end ? end - 1 : free) = mine;
}

std::string Races::access(const Thread& thread, const void* address, size_t bytes, Access kind, uint32_t place) {
  const uintptr_t key = key_of(thread, address);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& it = cell(key + i);
    if (const Record* const other = rival(it, thread, kind); other != nullptr) {
      const std::string how = other->atomic ? "atomically " : "", what = other == &it.write ? "wrote" : "read";
      return "race: " + name_of(thread) + "\n  " + verb(kind) + " at " + code(place) +
             "\n  what, ordered by nothing, " + names_[other->thread] + "\n  " + how + what + " at " +
             code(other->place) + "\n";
    }
    remember(it, thread, kind, place);
  }
  return "";
}

}  // namespace emulator
