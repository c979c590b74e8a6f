// Barriers and exchanges of a warp or a block.
//
// Stricter than CUDA: every lane that a mask names must be alive, and all threads of a block must come to the same
// line of code.
#pragma once
#include <bit>

#include "emulator/language.h"
#include "emulator/scheduler.h"

namespace emulator {

// The word of lane `source`; out of the segment of `width` lanes: the caller's own.
template <class T>
T shuffled(const char* what, unsigned mask, T value, int source, bool inside, Where where) {
  const Words words = meet_warp(what, mask, to_word(value), where);
  if (!inside) return value;
  if ((mask >> source & 1u) == 0) fail(std::string(what) + " reads a lane that the mask does not name", where);
  return from_word<T>(words.of[source]);
}

inline int lane_id() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize);
}

// fold(a, b) over the lanes of `mask`.
template <class T, class Fold>
T folded(const char* what, unsigned mask, T value, Fold fold, Where where) {
  const Words words = meet_warp(what, mask, to_word(value), where);
  T result = value;
  bool first = true;
  for (int lane = 0; lane < warpSize; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const T other = from_word<T>(words.of[lane]);
    result = first ? other : static_cast<T>(fold(result, other));
    first = false;
  }
  return result;
}

}  // namespace emulator

inline void __syncthreads(EMULATOR_WHERE) { emulator::meet_block("__syncthreads", false, where); }
inline int __syncthreads_count(int vote, EMULATOR_WHERE) {
  return emulator::meet_block("__syncthreads_count", vote != 0, where).count;
}
inline int __syncthreads_or(int vote, EMULATOR_WHERE) {
  return emulator::meet_block("__syncthreads_or", vote != 0, where).count != 0;
}
inline int __syncthreads_and(int vote, EMULATOR_WHERE) {
  const emulator::Votes votes = emulator::meet_block("__syncthreads_and", vote != 0, where);
  return votes.count == votes.threads;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_WHERE) {
  emulator::meet_warp("__syncwarp", mask, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_WHERE) {
  const int first = emulator::lane_id() & ~(width - 1);
  return emulator::shuffled("__shfl_sync", mask, value, first | (source & (width - 1)), true, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_WHERE) {
  const int lane = emulator::lane_id(), source = lane - static_cast<int>(delta);
  return emulator::shuffled("__shfl_up_sync", mask, value, source, source >= (lane & ~(width - 1)), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_WHERE) {
  const int lane = emulator::lane_id(), source = lane + static_cast<int>(delta);
  return emulator::shuffled("__shfl_down_sync", mask, value, source, source <= (lane | (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATOR_WHERE) {
  const int lane = emulator::lane_id(), source = lane ^ lanes;
  return emulator::shuffled("__shfl_xor_sync", mask, value, source, source <= (lane | (width - 1)), where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_WHERE) {
  const unsigned own = vote != 0 ? 1u << emulator::lane_id() : 0;
  return emulator::folded("__ballot_sync", mask, own, [](unsigned a, unsigned b) { return a | b; }, where);
}
inline int __any_sync(unsigned mask, int vote, EMULATOR_WHERE) {
  return emulator::folded("__any_sync", mask, int{vote != 0}, [](int a, int b) { return a | b; }, where);
}
inline int __all_sync(unsigned mask, int vote, EMULATOR_WHERE) {
  return emulator::folded("__all_sync", mask, int{vote != 0}, [](int a, int b) { return a & b; }, where);
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_WHERE) {
  const uint64_t own = emulator::to_word(value);
  const emulator::Words words = emulator::meet_warp("__match_any_sync", mask, own, where);
  unsigned same = 0;
  for (int lane = 0; lane < warpSize; ++lane) same |= words.of[lane] == own ? 1u << lane : 0;
  return same & mask;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, EMULATOR_WHERE) {
  const unsigned same = __match_any_sync(mask, value, where);
  *all = same == mask;
  return *all != 0 ? mask : 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, EMULATOR_WHERE) {  // wraps around, as unsigned
  using U = std::make_unsigned_t<T>;
  const auto add = [](U a, U b) { return static_cast<U>(a + b); };
  return static_cast<T>(emulator::folded("__reduce_add_sync", mask, static_cast<U>(value), add, where));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, EMULATOR_WHERE) {
  return emulator::folded("__reduce_min_sync", mask, value, [](T a, T b) { return a < b ? a : b; }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, EMULATOR_WHERE) {
  return emulator::folded("__reduce_max_sync", mask, value, [](T a, T b) { return a > b ? a : b; }, where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMULATOR_WHERE) {
  return emulator::folded("__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; }, where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, EMULATOR_WHERE) {
  return emulator::folded("__reduce_and_sync", mask, value, [](unsigned a, unsigned b) { return a & b; }, where);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, EMULATOR_WHERE) {
  return emulator::folded("__reduce_xor_sync", mask, value, [](unsigned a, unsigned b) { return a ^ b; }, where);
}
