// The options of a plan in one structure, their order on the way from Python, and the names of what can be chosen: stated
// here and nowhere else. docs/design/method.md says what they mean. No torch.
#pragma once
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace macs {

enum class Scope : int32_t { kExpert, kRank };
enum class Load : int32_t { kRows, kEffective };
enum class Importance : int32_t { kEntropy, kGate, kEntropyGate };
enum class Reroute : int32_t { kNone, kLocal, kGlobal };
enum class Scoring : int32_t { kSoftmax, kSigmoid, kSqrtSoftplus };

// An option a row: X(type, name). A new one is a row at the end and whatever reads it.
//   num_experts, num_ranks: E and R; E % R == 0
//   bucket_bits:            m: 2^m buckets an octave, B = 2^(4 + m)
//   gamma ... c_min:        in f64, so that all devices derive the same bounds
//   needs_entropy:          false where nothing depends on entropies: every visual token weighs 0.5
// The order is that of the registers: a kernel loads neighbours in one go.
#define MACS_POLICY(X)         \
  X(int32_t, num_experts)      \
  X(int32_t, num_ranks)        \
  X(int32_t, bucket_bits)      \
  X(Scope, scope)              \
  X(Load, load)                \
  X(Reroute, reroute)          \
  X(bool, protect_text)        \
  X(double, gamma)             \
  X(double, rho)               \
  X(double, alpha)             \
  X(double, c_min)             \
  X(int32_t, reroute_rounds)   \
  X(Importance, importance)    \
  X(Scoring, scoring)          \
  X(bool, needs_entropy)       \
  X(float, delta)

struct Policy {
#define MACS_MEMBER(Type, name) Type name;
  MACS_POLICY(MACS_MEMBER)
#undef MACS_MEMBER
};

// visit(name, member) for every option, in the order in which they are packed.
template <class AnyPolicy, class Visitor>
void for_each_option(AnyPolicy& policy, Visitor&& visit) {
#define MACS_VISIT(Type, name) visit(#name, policy.name);
  MACS_POLICY(MACS_VISIT)
#undef MACS_VISIT
}

// Names of an enumeration's values, as flags spell them, a comma between two.
template <class Enum>
constexpr std::string_view kNames{};
template <>
constexpr std::string_view kNames<Scope>{"expert,rank"};
template <>
constexpr std::string_view kNames<Load>{"rows,effective"};
template <>
constexpr std::string_view kNames<Importance>{"entropy,gate,entropy_gate"};
template <>
constexpr std::string_view kNames<Reroute>{"none,local,global"};
template <>
constexpr std::string_view kNames<Scoring>{"softmax,sigmoid,sqrtsoftplus"};

// How many values there are.
template <class Enum>
constexpr int count_of() {
  static_assert(!kNames<Enum>.empty());
  int count = 1;
  for (const char c : kNames<Enum>) count += c == ',' ? 1 : 0;
  return count;
}

}  // namespace macs
