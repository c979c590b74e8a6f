// What the emulated intrinsics ask of the scheduler. A thread runs alone until it calls one of these.
#pragma once
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <type_traits>

namespace emulator {

using Where = std::source_location;

// The launch is wrong: reports why and where, and ends it.
[[noreturn]] void fail(const std::string& what, Where where);

// This thread has seen nothing new and looks again later.
void spin(const char* what, Where where);
// This thread has changed what others see; perhaps one of them runs now.
void changed();
// As `changed` before the change: what others did meanwhile comes first.
void preempt();

// Simulated: a nanosecond a scheduling step, and in great leaps while every thread only spins.
uint64_t now_ns();

// Every lane's word once all lanes of `mask` have come.
struct Words {
  uint64_t of[32];
  unsigned mask;
  int lane;  // the caller's
};
Words meet_warp(const char* what, unsigned mask, uint64_t word, Where where);

// Over the predicates of all threads of the block that have not returned.
struct Votes {
  int count, threads;
};
Votes meet_block(const char* what, bool vote, Where where);

unsigned char* dynamic_shared();

void start_dependents();
void wait_for_previous(Where where);

int cluster_rank();
int cluster_blocks();
void cluster_arrive();
void cluster_wait(Where where);
// The place of `shared` in another block of the cluster; valid until this thread next calls the scheduler.
void* map_to_block(const void* shared, int block);

template <class T>
uint64_t to_word(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace emulator

// The caller's line, as an intrinsic's last parameter.
#define EMULATOR_WHERE emulator::Where where = emulator::Where::current()
