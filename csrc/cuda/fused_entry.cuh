// An assignment as the ranks of a group exchange it: everything that decides what becomes of it, in 32 bits.
#pragma once
#include <cstdint>

#include "macs/fused.h"
#include "macs/level.h"
#include "macs/params.h"

namespace macs::cuda {

// Tables that entries look into have a place for every expert that an entry can name, whether it exists or not; the last is
// where those go that name none. So nobody asks whether one is there before counting it.
constexpr int kExpertBits = 9, kNamedExperts = 1 << kExpertBits, kNobody = kNamedExperts - 1;

// kPresent and kVisual can be added up as one number, and so can kLeads and kVisualLeads: of all entries that a thread may see
// the one's sum does not reach the other's.
struct Entry {
  static constexpr uint32_t kPresent = 1u, kLeads = 1u << 1, kVisual = 1u << 13, kVisualLeads = 1u << 14;
  static constexpr int kExpertAt = 2, kBucketAt = 15, kFixedAt = 23, kTallyBits = 13;

  static_assert(kMaxPeers * (kMaxFusedSlots / 32) < 1 << kTallyBits);  // a warp may have to receive all of them

  uint32_t bits;

  // fixed: the token's weight in units of 1 / 256. leads: the first assignment of its token, which counts the token.
  static __device__ __forceinline__ Entry of(int expert, int bucket, bool text, bool leads, int fixed) {
    const uint32_t first = kPresent | (leads ? kLeads : 0u), flags = text ? first : first | first << kTallyBits;
    return {flags | static_cast<uint32_t>(expert) << kExpertAt | static_cast<uint32_t>(bucket) << kBucketAt |
            static_cast<uint32_t>(fixed) << kFixedAt};
  }
  static __device__ __forceinline__ Entry nobody() { return {static_cast<uint32_t>(kNobody) << kExpertAt}; }  // empty slot

  __device__ __forceinline__ bool present() const { return (bits & kPresent) != 0; }
  __device__ __forceinline__ int expert() const { return static_cast<int>(bits >> kExpertAt & (kNamedExperts - 1u)); }
  __device__ __forceinline__ int bucket() const { return static_cast<int>(bits >> kBucketAt & 0xffu); }
  __device__ __forceinline__ bool text() const { return (bits & kVisual) == 0; }
  __device__ __forceinline__ bool leads() const { return (bits & kLeads) != 0; }
  __device__ __forceinline__ int fixed() const { return static_cast<int>(bits >> kFixedAt); }
  __device__ __forceinline__ int units(Load load) const { return load == Load::kRows ? 1 : fixed(); }

  // Its expert's word in a table of kNamedExperts, without a shift.
  template <class T>
  __device__ __forceinline__ T& in(T* table) const {
    static_assert(sizeof(T) == 1 << kExpertAt);
    return *reinterpret_cast<T*>(reinterpret_cast<char*>(table) + offset());
  }

 private:
  __device__ __forceinline__ uint32_t offset() const { return bits & (kNamedExperts - 1u) << kExpertAt; }
};

}  // namespace macs::cuda
