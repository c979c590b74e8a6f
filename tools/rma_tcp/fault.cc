#include "fault.h"

#include <sstream>

namespace rma_tcp {

namespace {
int number(const std::string& word, const std::string& digits) {
  size_t used = 0;
  int value = -1;
  try {
    value = std::stoi(digits, &used);
  } catch (const std::exception&) {
  }
  if (value < 0 || used != digits.size()) {
    throw Error(kInvalidArgument, "fault " + word + ": expected a number from 0 on");
  }
  return value;
}
}  // namespace

void Faults::set(const std::string& text) {
  delay = reorder = 0;
  delayed_connection = silent = close = -1;
  corrupt_length = corrupt_offset = false;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals), value = equals == word.npos ? "" : word.substr(equals + 1);
    if (name == "delay") {
      const size_t at = value.find('@');
      delay = number(word, value.substr(0, at));
      if (at != value.npos) delayed_connection = number(word, value.substr(at + 1));
    } else if (name == "reorder") {
      reorder = number(word, value);
    } else if (name == "silent") {
      silent = number(word, value);
    } else if (name == "close") {
      close = number(word, value);
    } else if (word == "corrupt=length") {
      corrupt_length = true;
    } else if (word == "corrupt=offset") {
      corrupt_offset = true;
    } else {
      throw Error(kInvalidArgument,
                  "fault " + word + ": expected delay, reorder, silent, close or corrupt=length|offset");
    }
  }
}

Faults& faults() {
  static Faults the;
  return the;
}

}  // namespace rma_tcp
