// Reports: who waits for what, the threads of a block in the same place together.
#include <cstdio>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr size_t kMaxBlocks = 16;
constexpr int kMaxRanges = 8;

std::string brackets(uint3 at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

std::string name_of(const Block& block) {
  return "launch " + std::to_string(block.grid->number) + " (" + block.grid->launch.name + "), block " +
         brackets(block.index);
}

std::string state_of(const Thread& thread) {
  if (thread.state == Thread::State::kReturned) return "returned";
  if (*thread.waits_for == '\0') return "run";
  const std::string at = std::string(" ") + thread.waits_for + " at " + place(thread.where);
  return (thread.state == Thread::State::kWaiting ? "wait in" : "run, last seen in") + at;
}

// Numbers in rising order, neighbours as a range, the first few.
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  int shown = 0;
  for (size_t first = 0, end; first < numbers.size(); first = end) {
    end = first + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (++shown > kMaxRanges) return text + ", ...";
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[first]);
    if (end > first + 1) text += "-" + std::to_string(numbers[end - 1]);
  }
  return text;
}

std::string describe(const Block& block) {
  std::map<std::string, std::vector<int>> states;
  for (const Thread& thread : block.threads) states[state_of(thread)].push_back(thread.number);
  std::string text = "  " + name_of(block) + "\n";
  for (const auto& [state, numbers] : states) text += "    " + state + ": threads " + ranges(numbers) + "\n";
  return text;
}

}  // namespace

std::string place(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string code(uint32_t offset) {
  char text[32];
  std::snprintf(text, sizeof text, "@0x%x@", offset);
  return text;
}

std::string name_of(const Thread& thread) { return name_of(*thread.block) + ", thread " + brackets(thread.index); }

std::string describe(const std::vector<Block*>& blocks) {
  std::string text;
  for (size_t i = 0; i < blocks.size() && i < kMaxBlocks; ++i) text += describe(*blocks[i]);
  return text + (blocks.size() > kMaxBlocks ? "  (and more blocks)\n" : "");
}

}  // namespace emulator
