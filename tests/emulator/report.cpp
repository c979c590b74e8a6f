// Reports: who waits for what, threads in the same place together.
#include <cstdio>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr int kMaxLines = 40;

std::string brackets(uint3 at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

std::string name_of(const Block& block) {
  return "launch " + std::to_string(block.grid->number) + " (" + block.grid->launch.name + "), block " +
         brackets(block.index);
}

std::string state_of(const Thread& thread) {
  if (thread.state == Thread::State::kReturned) return "returned";
  if (*thread.waits_for == '\0') return "runs";
  const std::string at = std::string(" ") + thread.waits_for + " at " + place(thread.where);
  return (thread.state == Thread::State::kWaiting ? "wait in" : "last seen in") + at;
}

// Runs of neighbouring threads in one state.
void describe_block(const Block& block, std::string& text, int& lines) {
  text += "  " + name_of(block) + "\n";
  for (size_t first = 0, end; first < block.threads.size(); first = end) {
    const std::string state = state_of(block.threads[first]);
    end = first + 1;
    while (end < block.threads.size() && state_of(block.threads[end]) == state) ++end;
    if (++lines > kMaxLines) continue;
    text += "    threads " + std::to_string(first) + " to " + std::to_string(end - 1) + " " + state + "\n";
  }
}

}  // namespace

std::string place(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string name_of(const Thread& thread) { return name_of(*thread.block) + ", thread " + brackets(thread.index); }

std::string describe(const std::vector<Block*>& blocks) {
  std::string text;
  int lines = 0;
  for (const Block* block : blocks) {
    if (lines < kMaxLines) describe_block(*block, text, lines);
  }
  if (lines >= kMaxLines) text += "  (and more)\n";
  return text;
}

}  // namespace emulator
