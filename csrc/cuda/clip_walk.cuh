// The tokens of a warp of clip_apply.cu, step by step: what a slot holds, where it goes, how it stands to its cut.
#pragma once

#include "assignments.cuh"
#include "grid.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "plan/choose.cuh"
#include "replicas.cuh"
#include "shared_storage.cuh"

namespace macs::cuda {

constexpr int kThreads = kShareThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxExperts = 1024;

struct ThresholdApplyArgs {
  ClipThresholdParams threshold;
  ClipApplyParams apply;
  Logits order;  // what candidates are ordered by
  ApplySizes sizes;
  GridState* state;  // the CutBroadcast lies behind it
  void* scratch;
  Places places;             // of the instance for replicas, whose ids are physical
  ReplicaScratch replicas;
};

template <class Id>
struct Output {
  Id* ids;
  float* weights;
  __device__ __forceinline__ Output(const ClipApplyParams& p, const Slot& slot, const Step& step) {
    const int64_t index = slot.token * p.in.top_k + step.slot;
    ids = static_cast<Id*>(p.new_ids) + index;
    weights = p.new_weights + index;
  }
  __device__ __forceinline__ void set(int id, float weight) const { *ids = static_cast<Id>(id), *weights = weight; }
};

// A slot, its present id (>= 0 an expert, -1 unplaced, -2 - j a proposal) and its new weight. With replicas, `slot.expert` and j
// are logical, `current` and `routed` physical.
struct State {
  Slot slot;
  int current;
  float weight;
  bool in_registers;  // until the end; else its output slot holds it between the passes
  int routed;         // the id that came in
};

// What every pass shares: the tokens of this warp, step by step, the first step kept in registers.
template <class Id, bool kReplicas>
struct Walk {
  static constexpr bool kHasPlaces = kReplicas;
  const ClipApplyParams& p;
  const Logits& order;
  const ApplySizes& sizes;
  const Places& places;
  const SharedStorage storage;
  const Step step;
  int64_t begin, end;
  State first;

  __device__ __forceinline__ Walk(const ThresholdApplyArgs& args, const SharedStorage& b, const Places& tables)
      : p(args.apply), order(args.order), sizes(args.sizes), places(tables), storage(b), step(p.in.top_k, sizes.by_top_k) {
    const int warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
    begin = sizes.shares.begin(warp), end = sizes.shares.end(warp);
  }
  template <bool kWithWeight>
  __device__ __forceinline__ State load(int64_t at, bool in_registers) const {
    State state = {load_slot<Id, kWithWeight>(p.in, step, at, end), -1, 0.0f, in_registers, -1};
    if (kReplicas && state.slot.expert >= 0) {
      state.routed = state.slot.expert;
      state.slot.expert = places.logical()[state.routed];
    }
    return state;
  }
  // Before the wait: what is older than the chain of kernels. The weight is not.
  __device__ __forceinline__ void load_first() { first = load<false>(begin, true); }
  __device__ __forceinline__ void load_weight() {
    if (first.slot.inside) first.slot.weight = p.in.weight[first.slot.token];
  }
  // Of an assignment that has not lost its place: its bound, the id that it goes out with, and an id's expert. With replicas
  // the place is in `current` from their choice on.
  __device__ __forceinline__ int bound_of(const State& state) const {
    return kReplicas ? sizes.by_rank.divide(state.current) : storage.bound_of()[state.slot.expert];
  }
  __device__ __forceinline__ int id_of(const State& state) const { return kReplicas ? state.current : state.slot.expert; }
  __device__ __forceinline__ int expert_of(int id) const { return kReplicas && id >= 0 ? places.logical()[id] : id; }

  __device__ __forceinline__ void put(State& state, int id, float weight) const {
    state.current = id, state.weight = weight;
    if (!state.in_registers) Output<Id>(p, state.slot, step).set(id, weight);
  }
  __device__ __forceinline__ void put(State& state, int id) const {
    state.current = id;
    if (!state.in_registers) *Output<Id>(p, state.slot, step).ids = static_cast<Id>(id);
  }
  // Last: a barrier would wait for stores sooner.
  __device__ __forceinline__ void write_first() const {
    if (first.slot.inside) Output<Id>(p, first.slot, step).set(first.current, first.weight);
  }

  // body(State&, first token of the step): changes a state by `put`.
  template <class Body>
  __device__ __forceinline__ void for_each(bool with_current, Body body) {
    if (begin < end) body(first, begin);
    for (int64_t at = begin + step.tokens; at < end; at += step.tokens) {
      State state = load<true>(at, false);
      if (with_current && state.slot.inside) state.current = static_cast<int>(*Output<Id>(p, state.slot, step).ids);
      body(state, at);
    }
  }
  __device__ __forceinline__ int units(const Slot& slot) const { return load_units(p.in.policy.load, slot.weight); }
  __device__ __forceinline__ int compare_to_cut(const State& state) const {
    const Slot& slot = state.slot;
    const int shift = storage.shift()[slot.expert];
    const int level = level_of(bucket_of_slot(p.in, slot), shift, slot.text(), p.in.policy);
    return level - storage.level()[bound_of(state)];
  }
  // Behind the clip pass, which leaves no place to what is below its cut.
  __device__ __forceinline__ bool at_cut(const State& state) const {
    return state.slot.expert >= 0 && (!kReplicas || state.current >= 0) && compare_to_cut(state) == 0;
  }
  __device__ __forceinline__ void count(int kind, int expert, bool text) const {
    atomicAdd(storage.counts() + (kind * storage.experts + expert) * 2 + (text ? 1 : 0), 1);
  }
  // Whether an assignment that was routed stays.
  __device__ __forceinline__ void count_outcome(const State& state, bool stays) const {
    count(stays ? 0 : 1, state.slot.expert, state.slot.text());
    if (kReplicas && stays && state.current != state.routed) {
      atomicAdd(storage.moved(kWarps) + state.slot.expert * 2 + (state.slot.text() ? 1 : 0), 1);
    }
  }
};

}  // namespace macs::cuda
