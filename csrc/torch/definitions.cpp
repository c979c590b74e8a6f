#include "definitions.h"

#include <string_view>
#include <type_traits>
#include <utility>

#include "macs/fused.h"
#include "macs/level.h"
#include "macs/params.h"

namespace macs {
namespace {

std::string quoted(std::string_view word) { return '"' + std::string(word) + '"'; }

// A list of JSON from words with commas between them.
std::string list_of(std::string_view words) {
  std::string list = "[";
  for (size_t end; (end = words.find(',')) != std::string_view::npos; words.remove_prefix(end + 1)) {
    list += quoted(words.substr(0, end)) + ",";
  }
  return list + quoted(words) + "]";
}

template <class Option>
const char* kind_of() {
  if (std::is_enum_v<Option>) return "choice";
  if (std::is_same_v<Option, bool>) return "bool";
  return std::is_integral_v<Option> ? "int" : "float";
}

}  // namespace

std::string definitions() {
  std::string out = "{\"policy\":{";
  const char* separator = "";
  const Policy policy = {};
  for_each_option(policy, [&](const char* name, const auto& option) {
    out += separator + quoted(name) + ":" + quoted(kind_of<std::remove_cvref_t<decltype(option)>>());
    separator = ",";
  });
  out += "},\"names\":{";
  for_each_option(policy, [&](const char* name, const auto& option) {
    using Option = std::remove_cvref_t<decltype(option)>;
    if constexpr (std::is_enum_v<Option>) out += quoted(name) + ":" + list_of(kNames<Option>) + ",";
  });
  out += "\"format\":" + list_of(kNames<RowFormat>) + ",\"phase\":" + list_of(kNames<Phase>) +
         ",\"fault\":" + list_of(kNames<Fault>) + "},\"limits\":{";
  const std::pair<const char*, int64_t> limits[] = {
      {"weight_one", kWeightOne},
      {"num_sums", kNumSums},
      {"min_buckets", num_buckets(kMinBucketBits)},
      {"max_buckets", num_buckets(kMaxBucketBits)},
      {"peers", kMaxPeers},
      {"fused_experts", kMaxFusedExperts},
      {"fused_top_k", kMaxFusedTopK},
      {"fused_tokens", kMaxFusedTokens},
      {"fused_slots", kMaxFusedSlots},
      {"fused_reroute_rounds", kMaxFusedRerouteRounds},
      {"fused_min_hidden", kMinFusedHidden},
      {"fused_max_hidden", kMaxFusedHidden},
      {"fused_hidden_step", kFusedHiddenStep},
  };
  separator = "";
  for (const auto& [name, value] : limits) {
    out += separator + quoted(name) + ":" + std::to_string(value);
    separator = ",";
  }
  return out + "}}";
}

}  // namespace macs
