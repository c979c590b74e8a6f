// What Python would else repeat. No torch.
#pragma once
#include <string>

namespace macs {

// JSON: the options of a policy and their kinds, in the order in which they are packed; names of choices; limits.
std::string definitions();

}  // namespace macs
