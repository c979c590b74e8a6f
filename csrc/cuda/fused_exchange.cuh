// How the ranks of a group tell each other of their assignments.
//
// Twice at most. The first time goes out before the rows have been read: an assignment's expert, which is all that the
// rows per expert take, and, where no entropy is asked for, everything else. Only where a bound may be exceeded, and
// what is given up depends on entropies, are assignments told again with what the entropies say. That is between ranks: all
// blocks of a rank know the weights of its tokens, and complete its assignments for themselves.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "assignments.cuh"
#include "fused_block.cuh"

namespace macs::cuda {

__device__ __forceinline__ Assignments options_of(const FusedBlock& b) {
  Assignments in = {};
  in.topk_ids = b.me.topk_ids, in.topk_weights = b.me.topk_weights, in.segment = b.me.segment;
  in.ids_are_i64 = b.p.ids_are_i64;
  in.top_k = b.p.shape.top_k, in.num_experts = b.p.shape.num_experts;
  in.bucket_bits = b.p.bucket_bits, in.importance = b.p.importance;
  return in;
}

// The slots of this block's tokens, as many whole tokens a warp as its lanes hold. The last warps come first: the first
// ones wait for rows.
class OwnSlots {
 public:
  // Sends for the first of them.
  __device__ __forceinline__ explicit OwnSlots(const FusedBlock& b)
      : in_(options_of(b)), step_(in_.top_k), base_(b.first + (kFusedWarps - 1 - b.warp) * step_.tokens) {
    load(b);
  }

  // Every slot into shared memory, as a letter to every rank, and as what comes out if nothing is cut.
  __device__ __forceinline__ void tell(const FusedBlock& b) {
#pragma unroll 1
    for (; base_ < b.end; base_ += kFusedWarps * step_.tokens, load(b)) {
      const bool present = slot_.expert >= 0;
      const unsigned others = __ballot_sync(kFullMask, present) & step_.token_mask(in_.top_k);
      if (!slot_.inside) continue;
      const int at = static_cast<int>(slot_.token) * in_.top_k + step_.slot, here = at - b.first * in_.top_k;
      b.at<int>(b.args.desk.ids)[here] = slot_.expert;
      b.at<float>(b.args.desk.gates)[here] = slot_.gate;
      b.current()[at] = static_cast<int16_t>(present ? slot_.expert : kEmptySlot);
      const Entry entry = present ? entry_of(b, b.lane == __ffs(others) - 1) : Entry{0};
      send(b, b.p.layout.entries, at, entry);
      write(b, at);
    }
  }

  static __device__ __forceinline__ void send(const FusedBlock& b, int64_t letters, int slot, const Entry& entry) {
    const int64_t offset = letters + 8LL * (b.rank * b.most_slots() + slot);
    const uint64_t letter = make_letter(entry.bits, b.patience.round);
#pragma unroll 1  // a row waits in registers
    for (int peer = 0; peer < b.p.shape.num_ranks; ++peer) b.peers.send(peer, offset, letter);
  }

 private:
  __device__ __forceinline__ void write(const FusedBlock& b, int at) const {
    b.write_slot(at, slot_.expert, slot_.gate);
    if (step_.slot == 0 && !b.p.needs_entropy) b.me.weight[slot_.token] = plain_weight(slot_.segment);
  }

  __device__ __forceinline__ void load(const FusedBlock& b) {
    slot_ = b.p.ids_are_i64 ? load_slot<int64_t, false>(in_, step_, base_, b.end)
                            : load_slot<int32_t, false>(in_, step_, base_, b.end);
  }

  // An expert that does not exist is told as it is, so that every block of every rank gives up.
  __device__ __forceinline__ Entry entry_of(const FusedBlock& b, bool leads) {
    const int expert = min(slot_.expert, kMostNamed);
    if (slot_.expert >= in_.num_experts) {
      report(b.patience, Fault::kBadExpert, b.rank, b.block, slot_.expert, in_.num_experts - 1);
      return Entry::of(expert, 0, slot_.text(), leads, 0);
    }
    slot_.weight = plain_weight(slot_.segment);
    if (!b.p.needs_entropy) return Entry::of(expert, bucket_of_slot(in_, slot_), slot_.text(), leads, fixed_weight(slot_.weight));
    return Entry::of(expert, 0, slot_.text(), leads, slot_.text() ? kWeightOne : 0);
  }

  static constexpr int kMostNamed = 0x3ff;  // an entry has ten bits for an expert

  Assignments in_;
  Step step_;
  int base_;
  Slot slot_;
};

// How many tokens this rank has, to the others.
__device__ __forceinline__ void tell_tokens(const FusedBlock& b) {
  if (b.block != 0) return;
#pragma unroll 1
  for (int peer = kFusedThreads - 1 - threadIdx.x; peer < b.p.shape.num_ranks; peer += kFusedThreads) {
    b.peers.send(peer, b.p.layout.tokens + 8LL * b.rank, make_letter(b.me.num_tokens, b.patience.round));
  }
}

// An own assignment with what the entropies say. The weights of all of the rank's tokens are known.
__device__ __forceinline__ Entry weighed_entry(const FusedBlock& b, int slot, float gate) {
  const Entry told = b.own_entry(slot);
  if (!told.present()) return told;
  const int token = b.args.by_top_k.divide(slot);
  const Slot whole = {token, told.expert(), told.text() ? -1 : 0, gate, b.at<float>(b.args.desk.weight)[token], true};
  return Entry::of(told.expert(), bucket_of_slot(options_of(b), whole), told.text(), told.leads(), fixed_weight(whole.weight));
}

// This block's assignments again, to the other ranks. A barrier has to follow: nobody has completed them here yet.
__device__ inline void tell_weighed(const FusedBlock& b) {
  if (b.p.shape.num_ranks == 1) return;
  const int first = b.first * b.p.shape.top_k, end = b.end * b.p.shape.top_k;
#pragma unroll 1
  for (int slot = first + threadIdx.x; slot < end; slot += kFusedThreads) {
    OwnSlots::send(b, b.p.layout.weighed, slot, weighed_entry(b, slot, b.at<float>(b.args.desk.gates)[slot - first]));
  }
}

// One warp: how many tokens rank `lane` has. -1: it did not say, or more than there may be.
__device__ inline int hear_tokens(const FusedBlock& b) {
  int tokens = b.lane == b.rank ? b.me.num_tokens : 0;
  if (b.lane < b.p.shape.num_ranks && b.lane != b.rank) {
    const uint64_t* const address = b.own<uint64_t>(b.p.layout.tokens) + b.lane;
    uint64_t letter = load_relaxed_sys(address);
    if (!await_letter(address, letter, b.patience, Fault::kAssignments, b.lane)) return -1;
    tokens = static_cast<int>(value_of(letter));
    if (tokens < 0 || tokens > b.p.shape.max_tokens) {
      report(b.patience, Fault::kBadTokens, b.lane, -1, tokens, b.p.shape.max_tokens);
      return -1;
    }
  }
  if (b.warp == 0 && b.lane < b.p.shape.num_ranks) b.at<int>(b.args.desk.tokens)[b.lane] = tokens;
  return tokens;
}

// One lane: `count` letters at `address`, `apart` from each other.
__device__ __forceinline__ bool await_letters(const FusedBlock& b, const uint64_t* address, int apart, int count,
                                              uint64_t (&letters)[kClaim], Fault fault, int source) {
  for (Wait wait;;) {
    uint64_t missing = make_letter(0, b.patience.round);
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      if (i < count && !is_of(letters[i], b.patience.round)) missing = letters[i];
    }
    if (is_of(missing, b.patience.round)) return true;
    const uint32_t seen = static_cast<uint32_t>(missing >> 32);
    if (!wait.go_on(b.patience, fault, source, -1, seen, b.patience.round)) return false;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      if (i < count && !is_of(letters[i], b.patience.round)) letters[i] = load_relaxed_sys(address + i * apart);
    }
  }
}

// What a warp waits for together: some letters of a source, kClaim a lane. The second time own assignments are completed by
// their gates, which take the letters' place.
struct Claimed {
  int chunk, source, first;  // first: this lane's first slot
  bool completes;
  const uint64_t* address;
  uint64_t words[kClaim];

  // The next that nobody has claimed, sent for whether the source has as many slots or not.
  __device__ __forceinline__ Claimed(const FusedBlock& b, int exchange) {
    int claim = b.lane == 0 ? atomicAdd(&b.scalars().claims[exchange], 1) : 0;
    claim = __shfl_sync(kFullMask, claim, 0);
    chunk = b.args.by_ranks.divide(claim), source = claim - chunk * b.p.shape.num_ranks;
    first = chunk * kClaim * kWarp + b.lane;
    address = b.letters_of(exchange == 0 ? b.p.layout.entries : b.p.layout.weighed, source) + first;
    completes = exchange != 0 && source == b.rank;
    const int slots = completes ? b.slots() : b.most_slots();
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      const int slot = first + i * kWarp;
      words[i] = 0;
      if (slot >= slots) continue;
      words[i] = completes ? make_letter(__float_as_uint(__ldg(b.me.topk_weights + slot)), b.patience.round)
                           : load_relaxed_sys(address + i * kWarp);
    }
  }
};

// Own assignments behind the second exchange's letters, which are their gates so far.
__device__ inline void complete(const FusedBlock& b, Claimed& c, int heard) {
#pragma unroll 1  // the same code for each, over one register
  for (int i = 0; i < kClaim; ++i) {
    const uint64_t gate = c.words[0];
#pragma unroll
    for (int j = 1; j < kClaim; ++j) c.words[j - 1] = c.words[j];
    c.words[kClaim - 1] = i < heard ? weighed_entry(b, c.first + i * kWarp, __uint_as_float(value_of(gate))).bits : 0;
  }
}

// Everybody's assignments as they come, kept in shared memory: use(entry, counts, source, slot) for each; those that are not
// there do not count. Warps claim what they wait for, so that those that are busy with rows are not waited for. The first
// letters are sent for before it is known how many there are, and the next ones before the first are counted: counting them
// takes as long as their way. False: a rank did not send them, or they are not to be believed. A warp at a time: a barrier
// of the block has to follow.
template <class Use>
__device__ __forceinline__ bool hear_letters(const FusedBlock& b, int exchange, Use use) {
  const int ranks = b.p.shape.num_ranks, top_k = b.p.shape.top_k;
  Claimed next(b, exchange);
  const int tokens = exchange == 0 ? hear_tokens(b) : (b.lane < ranks ? b.at<int>(b.args.desk.tokens)[b.lane] : 0);
  if (__any_sync(kFullMask, tokens < 0)) return false;
  const int longest = __reduce_max_sync(kFullMask, tokens) * top_k;
  // Otherwise every warp claims once, in the order in which they come.
  constexpr int kChunk = kClaim * kWarp;
  const bool more = ranks * ((longest + kChunk - 1) / kChunk) > kFusedWarps;
#pragma unroll 1
  do {
    Claimed c = next;
    if (c.chunk * kChunk >= longest) return true;
    const int slots = __shfl_sync(kFullMask, tokens, c.source) * top_k;
    const int count = min(kClaim, (slots - c.first + kWarp - 1) / kWarp);
    bool ok = await_letters(b, c.address, kWarp, count, c.words, Fault::kAssignments, c.source);
    if (more) next = Claimed(b, exchange);
    const int heard = ok ? count : 0;
    if (c.completes) complete(b, c, heard);
    uint32_t* const kept = b.args.keeps_group || c.source == b.rank ? b.entries_of(c.source) + c.first : nullptr;
    int unknown = -1;  // an expert that does not exist
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      const Entry entry = {value_of(c.words[i])};
      const bool present = i < heard && entry.present(), known = entry.expert() < b.p.shape.num_experts;
      if (i < heard && kept != nullptr) kept[i * kWarp] = entry.bits;
      if (present && !known) unknown = entry.expert();
      use(entry, present && known, c.source, c.first + i * kWarp);
    }
    if (unknown >= 0) {
      ok = false;
      report(b.patience, Fault::kBadExpert, c.source, -1, unknown, b.p.shape.num_experts - 1);
    }
    if (!__all_sync(kFullMask, ok)) return false;
  } while (more);
  return true;
}

// A warp's part of one of the group's sums.
__device__ __forceinline__ void add_sum(const FusedBlock& b, int i, int part) {
  const int sum = __reduce_add_sync(kFullMask, part);
  if (b.lane == 0 && sum != 0) atomicAdd(&b.scalars().sums[i], sum);
}

// Rows per expert from the first exchange; units and sums from whichever tells weights. Where that is the second, visual
// tokens weigh nothing in the first. Behind: a barrier has to follow.
__device__ inline bool hear_assignments(const FusedBlock& b, int exchange) {
  uint32_t* const rows = b.at<uint32_t>(b.args.desk.group_rows);
  int* const units = b.at<int>(b.args.desk.group_units);
  const int before = b.first * b.p.shape.top_k;
  const bool again = exchange != 0, in_units = b.p.load != Load::kRows && again == b.p.needs_entropy;
  int number = 0, visual = 0, weight = 0, visual_weight = 0;
  const bool ok = hear_letters(b, exchange, [&](const Entry& entry, bool counts, int source, int slot) {
    const bool ahead = source < b.rank || (source == b.rank && slot < before);
    if (counts && !again) atomicAdd(rows + entry.expert(), ahead ? 0x10001u : 1u);
    if (counts && in_units) atomicAdd(units + entry.expert(), entry.fixed());
    const int fixed = counts && entry.leads() ? entry.fixed() : 0;
    number += counts, weight += fixed;
    visual += counts && !entry.text(), visual_weight += entry.text() ? 0 : fixed;
  });
  add_sum(b, 0, again ? 0 : number);
  add_sum(b, 1, again ? 0 : visual);
  add_sum(b, 2, visual_weight);
  add_sum(b, 3, again ? visual_weight : weight);
  return ok;
}

// Assignments that a thread works on at the same time: one waits for shared memory while another does.
constexpr int kTogether = 2;

// When all have come: body(entries, source) for everybody's, kTogether at a time; those that are not there are empty.
template <class Body>
__device__ __forceinline__ void for_each_entries(const FusedBlock& b, Body body) {
  constexpr int kLoads = 2 * kTogether;  // in flight
#pragma unroll 1
  for (int source = 0; source < b.p.shape.num_ranks; ++source) {
    const int slots = b.at<int>(b.args.desk.tokens)[source] * b.p.shape.top_k;
    const uint64_t* const letters = b.letters_of(b.whole_letters(), source);
    const uint32_t* const kept = b.entries_of(source);
    const bool here = b.args.keeps_group || source == b.rank;
#pragma unroll 1
    for (int first = threadIdx.x; first < slots; first += kLoads * kFusedThreads) {
      Entry entries[kLoads];
      if (here) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int slot = first + i * kFusedThreads;
          entries[i].bits = slot < slots ? kept[slot] : 0;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int slot = first + i * kFusedThreads;
          entries[i].bits = slot < slots ? value_of(load_relaxed_sys(letters + slot)) : 0;
        }
      }
#pragma unroll 1  // the same code for each, over the first registers
      for (int i = first; i < slots && i < first + kLoads * kFusedThreads; i += kTogether * kFusedThreads) {
        Entry now[kTogether];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) (j < kTogether ? now[j] : entries[j - kTogether]) = entries[j];
        body(now, source);
      }
    }
  }
}

// body(entries, slots) for the rank's own assignments, likewise.
template <class Body>
__device__ __forceinline__ void for_each_own(const FusedBlock& b, Body body) {
#pragma unroll 1
  for (int first = threadIdx.x; first < b.slots(); first += kTogether * kFusedThreads) {
    Entry entries[kTogether];
    int slots[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      slots[i] = first + i * kFusedThreads;
      entries[i] = slots[i] < b.slots() ? b.own_entry(slots[i]) : Entry{0};
    }
    body(entries, slots);
  }
}

}  // namespace macs::cuda
