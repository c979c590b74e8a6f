// How the ranks of a group exchange their assignments.
//
// Twice at most. The first time goes out before the rows have been read: an assignment's expert, which is all that the
// rows per expert take, and, where no entropy is asked for, everything else. Only where a bound may be exceeded, and
// what is clipped depends on entropies, are assignments sent again with what the entropies say. That is between ranks: all
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
  in.top_k = b.p.shape.top_k, in.policy = b.p.policy;
  return in;
}

// The slots of this block's tokens, as many whole tokens a warp as its lanes hold. The last warps come first: the first
// ones wait for rows.
class OwnSlots {
 public:
  // Sends for the first of them.
  __device__ __forceinline__ explicit OwnSlots(const FusedBlock& b)
      : in_(options_of(b)), step_(in_.top_k, b.args.by_top_k), base_(b.first + (kFusedWarps - 1 - b.warp) * step_.tokens) {
    load(b);
  }

  // Every slot into shared memory, as an LL word to every rank, and as what comes out if nothing is cut.
  __device__ __forceinline__ void send_all(const FusedBlock& b) {
#pragma unroll 1
    for (; base_ < b.end; base_ += kFusedWarps * step_.tokens, load(b)) {
      const bool present = slot_.expert >= 0;
      const unsigned others = __ballot_sync(kFullMask, present) & step_.token_mask(in_.top_k);
      if (!slot_.inside) continue;
      const int at = static_cast<int>(slot_.token) * in_.top_k + step_.slot, here = at - b.first * in_.top_k;
      b.at<int>(b.args.tables.ids)[here] = slot_.expert;
      b.at<float>(b.args.tables.gates)[here] = slot_.gate;
      b.current()[at] = static_cast<int16_t>(present ? slot_.expert : kEmptySlot);
      const Entry entry = present ? entry_of(b, b.lane == __ffs(others) - 1) : Entry::nobody();
      send(b, b.p.layout.entries, at, entry);
      write(b, at);
    }
  }

  static __device__ __forceinline__ void send(const FusedBlock& b, int64_t words, int slot, const Entry& entry) {
    const int64_t offset = words + 8LL * (b.rank * b.most_slots() + slot);
    const uint64_t word = make_ll_word(entry.bits, b.wait.epoch);
#pragma unroll 1  // a row waits in registers
    for (int peer = 0; peer < b.p.shape.num_ranks; ++peer) b.peers.send(peer, offset, word);
  }

 private:
  __device__ __forceinline__ void write(const FusedBlock& b, int at) const {
    b.write_slot(at, slot_.expert, slot_.gate);
    if (step_.slot == 0 && !b.p.policy.needs_entropy) b.me.weight[slot_.token] = plain_weight(slot_.segment);
  }

  __device__ __forceinline__ void load(const FusedBlock& b) {
    slot_ = b.p.ids_are_i64 ? load_slot<int64_t, false>(in_, step_, base_, b.end)
                            : load_slot<int32_t, false>(in_, step_, base_, b.end);
  }

  // An expert that does not exist is sent as it is, so that every block of every rank gives up.
  __device__ __forceinline__ Entry entry_of(const FusedBlock& b, bool leads) {
    const int expert = min(slot_.expert, kMostNamed);
    if (slot_.expert >= in_.policy.num_experts) {
      report(b.wait, Fault::kBadExpert, b.rank, b.block, slot_.expert, in_.policy.num_experts - 1);
      return Entry::of(expert, 0, slot_.text(), leads, 0);
    }
    slot_.weight = plain_weight(slot_.segment);
    if (!b.p.policy.needs_entropy) {
      return Entry::of(expert, bucket_of_slot(in_, slot_), slot_.text(), leads, fixed_weight(slot_.weight));
    }
    return Entry::of(expert, 0, slot_.text(), leads, slot_.text() ? kWeightOne : 0);
  }

  static constexpr int kMostNamed = kNobody - 1;

  Assignments in_;
  Step step_;
  int base_;
  Slot slot_;
};

// How many tokens this rank has, to the others.
__device__ __forceinline__ void send_tokens(const FusedBlock& b) {
  if (b.block != 0) return;
#pragma unroll 1
  for (int peer = kFusedThreads - 1 - threadIdx.x; peer < b.p.shape.num_ranks; peer += kFusedThreads) {
    b.peers.send(peer, b.p.layout.tokens + 8LL * b.rank, make_ll_word(b.me.num_tokens, b.wait.epoch));
  }
}

// An own assignment with what the entropies say. The weights of all of the rank's tokens are known.
__device__ __forceinline__ Entry weighed_entry(const FusedBlock& b, int slot, float gate) {
  const Entry first = b.own_entry(slot);
  if (!first.present()) return first;
  const int token = b.args.by_top_k.divide(slot);
  const Slot whole = {token, first.expert(), first.text() ? -1 : 0, gate, b.at<float>(b.args.tables.weight)[token], true};
  return Entry::of(first.expert(), bucket_of_slot(options_of(b), whole), first.text(), first.leads(), fixed_weight(whole.weight));
}

// This block's assignments again, to the other ranks. A barrier has to follow: nobody has completed them here yet.
__device__ inline void send_weighed(const FusedBlock& b) {
  if (b.p.shape.num_ranks == 1) return;
  const int first = b.first * b.p.shape.top_k, end = b.end * b.p.shape.top_k;
#pragma unroll 1
  for (int slot = first + threadIdx.x; slot < end; slot += kFusedThreads) {
    OwnSlots::send(b, b.p.layout.weighed, slot, weighed_entry(b, slot, b.at<float>(b.args.tables.gates)[slot - first]));
  }
}

// One warp: how many tokens rank `lane` has. -1: it did not say, or more than there may be.
__device__ inline int receive_tokens(const FusedBlock& b) {
  int tokens = b.lane == b.rank ? b.me.num_tokens : 0;
  if (b.lane < b.p.shape.num_ranks && b.lane != b.rank) {
    const uint64_t* const address = b.own<uint64_t>(b.p.layout.tokens) + b.lane;
    uint64_t word = load_relaxed_sys(address);
    if (!await_word(address, word, b.wait, Fault::kAssignments, b.lane)) return -1;
    tokens = static_cast<int>(value_of(word));
    if (tokens < 0 || tokens > b.p.shape.max_tokens) {
      report(b.wait, Fault::kBadTokens, b.lane, -1, tokens, b.p.shape.max_tokens);
      return -1;
    }
  }
  if (b.warp == 0 && b.lane < b.p.shape.num_ranks) b.at<int>(b.args.tables.tokens)[b.lane] = tokens;
  return tokens;
}

// One lane: LL words at `address`, `apart` from each other. Those that it does not wait for are of this epoch already.
__device__ __forceinline__ bool await_words(const FusedBlock& b, const uint64_t* address, int apart,
                                            uint64_t (&words)[kClaim], Fault fault, int source) {
  for (Poll poll;;) {
    uint32_t wrong = 0;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) wrong |= epoch_of(words[i]) ^ b.wait.epoch;
    if (wrong == 0) return true;
    uint32_t seen = 0;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      if (!is_of(words[i], b.wait.epoch)) seen = epoch_of(words[i]);
    }
    if (!poll.go_on(b.wait, fault, source, -1, seen, b.wait.epoch)) return false;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      if (!is_of(words[i], b.wait.epoch)) words[i] = load_relaxed_sys(address + i * apart);
    }
  }
}

constexpr int kChunk = kClaim * kWarp;

// What a warp waits for together: a chunk of a source's LL words, kClaim a lane.
struct Claimed {
  int source, begin, first;  // the chunk's first slot, and this lane's
  const uint64_t* address;
  uint64_t words[kClaim];

  // The next that nobody has claimed, sent for whether the source has as many slots or not.
  __device__ __forceinline__ Claimed(const FusedBlock& b, int exchange) {
    int claim = b.lane == 0 ? atomicAdd(&b.scalars().claims[exchange], 1) : 0;
    claim = __shfl_sync(kFullMask, claim, 0);
    const int chunk = b.args.by_ranks.divide(claim);
    source = claim - chunk * b.p.shape.num_ranks;
    begin = chunk * kChunk, first = begin + b.lane;
    address = b.words_of(exchange == 0 ? b.p.layout.entries : b.p.layout.weighed, source) + first;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) words[i] = first + i * kWarp < b.most_slots() ? load_relaxed_sys(address + i * kWarp) : 0;
  }

  // Of `slots` that the source has: what lies behind them names nobody, and has come.
  __device__ __forceinline__ void end_at(int slots, uint32_t epoch) {
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      if (first + i * kWarp >= slots) words[i] = make_ll_word(Entry::nobody().bits, epoch);
    }
  }
};

// What a thread counts of the assignments that it sees, and where.
class Tally {
 public:
  // What an exchange carries: rows per expert the first, units and sums whichever carries weights. Where that is the second,
  // visual tokens weigh nothing in the first.
  __device__ __forceinline__ Tally(const FusedBlock& b, int exchange)
      : again_(exchange != 0), in_units_(again_ || (b.p.policy.load != Load::kRows && !b.p.policy.needs_entropy)) {}

  // ahead: of this block's assignments.
  __device__ __forceinline__ void add(const FusedBlock& b, const Entry& entry, bool ahead) {
    if (!again_) atomicAdd(&entry.in(b.group_rows()), ahead ? 0x10001u : 1u);
    if (in_units_) atomicAdd(&entry.in(b.group_units()), entry.fixed());
    seen_ += entry.bits & (Entry::kPresent | Entry::kVisual);
    tokens_ += entry.bits & (Entry::kLeads | Entry::kVisualLeads);
    if (again_) weight_ += (entry.bits & Entry::kVisualLeads) != 0 ? entry.fixed() : 0;
  }

  // The warp's part of the group's sums. A barrier has to follow.
  __device__ __forceinline__ void finish(const FusedBlock& b) const {
    int* const sums = b.scalars().sums;
    if (again_) {
      add_sum(b, sums + 2, weight_);
      add_sum(b, sums + 3, weight_);
      return;
    }
    constexpr uint32_t kFirst = (1u << Entry::kTallyBits) - 1;
    const int number = seen_ & kFirst, visual = seen_ >> Entry::kTallyBits;
    const int leads = tokens_ >> 1 & kFirst, visual_leads = tokens_ >> (1 + Entry::kTallyBits);
    const int visual_weight = b.p.policy.needs_entropy ? 0 : visual_leads * fixed_weight(plain_weight(0));
    add_sum(b, sums, number);
    add_sum(b, sums + 1, visual);
    add_sum(b, sums + 2, visual_weight);
    add_sum(b, sums + 3, (leads - visual_leads) * kWeightOne + visual_weight);
  }

 private:
  static __device__ __forceinline__ void add_sum(const FusedBlock& b, int* sum, int part) {
    part = __reduce_add_sync(kFullMask, part);
    if (b.lane == 0 && part != 0) atomicAdd(sum, part);
  }

  const bool again_, in_units_;
  uint32_t seen_ = 0, tokens_ = 0;  // two numbers each: Entry
  int weight_ = 0;
};

// Everybody's assignments as they come, kept in shared memory and counted. Warps claim what they wait for, so that those
// that are busy with rows are not waited for. The first LL words are sent for before it is known how many there are, and the
// next ones before the first are counted: counting them takes as long as their way. False: a rank did not send them. A warp
// at a time: a barrier of the block has to follow.
__device__ __forceinline__ bool receive_words(const FusedBlock& b, int exchange, Tally& tally) {
  const int ranks = b.p.shape.num_ranks, top_k = b.p.shape.top_k;
  Claimed next(b, exchange);
  const int tokens = exchange == 0 ? receive_tokens(b) : (b.lane < ranks ? b.at<int>(b.args.tables.tokens)[b.lane] : 0);
  if (__any_sync(kFullMask, tokens < 0)) return false;
  const int longest = __reduce_max_sync(kFullMask, tokens) * top_k;
  // Otherwise every warp claims once, in the order in which they come.
  const bool more = ranks * ((longest + kChunk - 1) / kChunk) > kFusedWarps;
#pragma unroll 1
  do {
    Claimed c = next;
    if (c.begin >= longest) return true;
    const int slots = __shfl_sync(kFullMask, tokens, c.source) * top_k;
    const bool own = c.source == b.rank, wanted = c.begin < slots && (exchange == 0 || !own);
    if (wanted) c.end_at(slots, b.wait.epoch);
    const bool ok = !wanted || await_words(b, c.address, kWarp, c.words, Fault::kAssignments, c.source);
    if (more) next = Claimed(b, exchange);
    if (!__all_sync(kFullMask, ok)) return false;
    if (!wanted) continue;
    const int ahead = c.source < b.rank ? b.most_slots() : own ? b.first * top_k : 0;
    uint32_t* const kept = b.entries_of(c.source) + c.first;
    const bool keeps = b.args.keeps_group || own;
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      const Entry entry = {value_of(c.words[i])};
      const int slot = c.first + i * kWarp;
      if (keeps && slot < slots) kept[i * kWarp] = entry.bits;
      tally.add(b, entry, slot < ahead);
    }
  } while (more);
  return true;
}

// Own assignments with what the entropies say, behind send_weighed's barrier.
__device__ inline void weigh_own(const FusedBlock& b, Tally& tally) {
#pragma unroll 1
  for (int first = threadIdx.x; first < b.slots(); first += kClaim * kFusedThreads) {
    float gates[kClaim];
#pragma unroll
    for (int i = 0; i < kClaim; ++i) {
      const int slot = first + i * kFusedThreads;
      gates[i] = slot < b.slots() ? __ldg(b.me.topk_weights + slot) : 0.0f;
    }
#pragma unroll 1  // the same code for each, over one register
    for (int slot = first; slot < b.slots() && slot < first + kClaim * kFusedThreads; slot += kFusedThreads) {
      const float gate = gates[0];
#pragma unroll
      for (int i = 1; i < kClaim; ++i) gates[i - 1] = gates[i];
      const Entry entry = weighed_entry(b, slot, gate);
      b.entries_of(b.rank)[slot] = entry.bits;
      tally.add(b, entry, false);
    }
  }
}

// The group's assignments, with their weights the second time. A barrier has to follow.
__device__ inline bool receive_assignments(const FusedBlock& b, int exchange) {
  Tally tally(b, exchange);
  if (exchange != 0) weigh_own(b, tally);
  const bool ok = exchange != 0 && b.p.shape.num_ranks == 1 || receive_words(b, exchange, tally);
  tally.finish(b);
  return ok;
}

// One thread: whether an expert of its own was named that does not exist.
__device__ __forceinline__ bool counts_unknown(const FusedBlock& b) {
  const int j = threadIdx.x;
  if (j < b.p.shape.num_experts || j >= kNobody) return false;
  return b.group_rows()[j] != 0 || b.group_units()[j] != 0;
}

// Who named an expert that does not exist: on record.
__device__ inline void report_unknown(const FusedBlock& b, int exchange) {
#pragma unroll 1
  for (int source = 0; source < b.p.shape.num_ranks; ++source) {
    if (exchange != 0 && source == b.rank) continue;
    const uint64_t* const words = b.words_of(exchange == 0 ? b.p.layout.entries : b.p.layout.weighed, source);
    const int slots = b.at<int>(b.args.tables.tokens)[source] * b.p.shape.top_k;
#pragma unroll 1
    for (int slot = threadIdx.x; slot < slots; slot += kFusedThreads) {
      const int expert = Entry{value_of(load_relaxed_sys(words + slot))}.expert();
      if (expert < b.p.shape.num_experts || expert == kNobody) continue;
      report(b.wait, Fault::kBadExpert, source, -1, expert, b.p.shape.num_experts - 1);
    }
  }
}

// Behind a barrier: body(entry, own slot or -1) for everybody's assignments. kOwn: for this rank's alone, and of these only
// for those that are `listed`, if they are.
template <bool kOwn, class Body>
__device__ __forceinline__ void for_each_assignment(const FusedBlock& b, bool listed, Body body) {
  constexpr int kInFlight = 4;
#pragma unroll 1
  for (int source = kOwn ? b.rank : 0, end = kOwn ? b.rank + 1 : b.p.shape.num_ranks; source < end; ++source) {
    const bool own = source == b.rank, here = b.args.keeps_group || own, from_list = kOwn && listed;
    const int count = from_list ? b.scalars().listed : b.at<int>(b.args.tables.tokens)[source] * b.p.shape.top_k;
    const uint64_t* const words = b.words_of(b.whole_words(), source);
    const uint32_t* const kept = b.entries_of(source);
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += kInFlight * kFusedThreads) {
      Entry entries[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = first + i * kFusedThreads;
        entries[i] = Entry::nobody();
        if (at >= count) continue;
        entries[i].bits = here ? kept[from_list ? b.listed()[at] : at] : value_of(load_relaxed_sys(words + at));
      }
#pragma unroll 1  // the same code for each, over one register
      for (int at = first; at < count && at < first + kInFlight * kFusedThreads; at += kFusedThreads) {
        const Entry entry = entries[0];
#pragma unroll
        for (int i = 1; i < kInFlight; ++i) entries[i - 1] = entries[i];
        body(entry, from_list ? b.listed()[at] : own ? at : -1);
      }
    }
  }
}

}  // namespace macs::cuda
