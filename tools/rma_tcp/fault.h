// What goes wrong in this plugin, and faults that are asked for.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>

#include "abi.h"

namespace rma_tcp {

struct Error : std::runtime_error {
  Error(Result code, const std::string& what) : std::runtime_error(what), result(code) {}
  Result result;
};

// Faults of this process, set from RMA_TCP_FAULT or by rma_tcp_fault(): words "name=value", separated by spaces.
//   delay=US[@CONNECTION]   a message leaves US microseconds late; with CONNECTION, on that one of a peer's only
//   reorder=N               up to N puts in a row without a signal leave in reverse order
//   silent=RANK             nothing leaves for RANK any more: a cut cable
//   close=RANK              the connections to RANK are closed without a word: a killed process
//   corrupt=length|offset   one message with the wrong length, or past the end of its region
struct Faults {
  std::atomic<int> delay{0}, delayed_connection{-1}, reorder{0}, silent{-1}, close{-1};
  std::atomic<bool> corrupt_length{false}, corrupt_offset{false};

  // Replaces all faults by those of `text`. Raises Error for a word that is none.
  void set(const std::string& text);
};

Faults& faults();

}  // namespace rma_tcp
