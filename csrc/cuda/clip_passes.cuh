// The passes of clip_apply.cu over the tokens of a warp: clip, keep up to the quota, propose.
#pragma once

#include "clip_walk.cuh"
#include "plan/accept.cuh"
#include "plan/choose.cuh"

namespace macs::cuda {

// Keep what is above the cut, clip what is below, count units at it. Returns whether the warp has any there.
template <class Walk>
__device__ __forceinline__ bool clip_pass(Walk& walk) {
  bool any = false;
  walk.for_each(Walk::kHasPlaces, [&](State& state, int64_t) {
    const Slot& slot = state.slot;
    if (!slot.inside) return;
    const int side = slot.expert < 0 ? 1 : walk.compare_to_cut(state);
    walk.put(state, side < 0 ? -1 : walk.id_of(state), side < 0 ? 0.0f : slot.gate);
    if (side == 0) {
      any = true;
      atomicAdd(walk.storage.own_running() + walk.bound_of(state), walk.units(slot));
    } else if (slot.expert >= 0) {
      walk.count_outcome(state, side > 0);
    }
  });
  return __any_sync(kFullMask, any);
}

// The assignments at the cut, in order, up to the quota.
template <class Walk>
__device__ __forceinline__ void quota_pass(Walk& walk) {
  const bool rows = walk.p.in.policy.load == Load::kRows;
  walk.for_each(true, [&](State& state, int64_t) {
    const Slot& slot = state.slot;
    const bool pending = walk.at_cut(state);
    const int bound = pending ? walk.bound_of(state) : 0;
    const int64_t limit = static_cast<int64_t>(walk.storage.quota()[bound]) - walk.storage.base()[bound];
    const bool stays = accept_in_order(pending, bound, walk.units(slot), rows, walk.storage.own_running(), limit);
    if (!pending) return;
    if (!stays) walk.put(state, -1, 0.0f);
    walk.count_outcome(state, stays);
  });
}

// Proposals of a round: the unplaced slots of every token of this warp, two tokens at a time as far as registers go.
template <int kKeys, class Walk>
__device__ __forceinline__ void propose_pass(Walk& walk) {
  constexpr int kTokensAtOnce = kKeys <= 4 ? 2 : 1;
  constexpr bool kAhead = kTokensAtOnce > 1;  // the next ones' logits fit into the registers, too
  const ClipApplyParams& p = walk.p;
  const SharedStorage& storage = walk.storage;
  const int top_k = p.in.top_k, experts = storage.experts, per_rank = walk.sizes.per_rank;
  const unsigned slots = top_k == kWarp ? kFullMask : (1u << top_k) - 1u;
  const Headroom<kKeys> headroom(experts, storage.headroom(), storage.bound_of());
  storage.clear_own_running();
  walk.for_each(true, [&](State& state, int64_t first) {
    const Slot& slot = state.slot;
    unsigned left = __ballot_sync(kFullMask, slot.expert >= 0 && state.current < 0);
    if (left == 0) return;
    const bool local = p.in.policy.reroute == Reroute::kLocal && slot.expert >= 0;
    const int from = local ? storage.rank_of()[slot.expert] * per_rank : -1, units = walk.units(slot);
    const auto take = [&](UnplacedToken<kKeys>(&tokens)[kTokensAtOnce]) {
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        const int token = left != 0 ? walk.sizes.by_top_k.divide(__ffs(left) - 1) : 0;
        const unsigned of_token = slots << (token * top_k);
        const bool mine = walk.step.used && walk.step.token_lane == token;
        tokens[t].unplaced = left & of_token;
        left &= ~of_token;
        tokens[t].original = mine ? slot.expert : -1, tokens[t].current = mine ? walk.expert_of(state.current) : -1;
        tokens[t].from = from, tokens[t].units = __shfl_sync(kFullMask, units, token * top_k);
        if (tokens[t].unplaced != 0) load_logits<kKeys>(walk.order, experts, first + token, tokens[t].logits);
      }
    };
    UnplacedToken<kKeys> tokens[kTokensAtOnce];
    take(tokens);
    int choice = -1;
    for (bool more = true; more;) {
      more = left != 0;
      UnplacedToken<kKeys> next[kTokensAtOnce];
      if (more && kAhead) take(next);  // on their way meanwhile
      choice = max(choice, choose<kTokensAtOnce, kKeys>(headroom, tokens, per_rank, storage.own_struck()));
      if constexpr (kAhead) {
#pragma unroll
        for (int t = 0; t < kTokensAtOnce; ++t) tokens[t] = next[t];
      } else if (more) {
        take(tokens);
      }
    }
    if (choice >= 0) {
      walk.put(state, -2 - choice);
      atomicAdd(storage.own_running() + storage.bound_of()[choice], units);
    }
  });
}

// Behind a barrier of the block, and before one. The home of an expert is its place with most headroom, on the lowest rank among
// equals: `bound_of` is its rank then, `rank_of` its physical id.
__device__ __forceinline__ void find_homes(const Places& places, const SharedStorage& storage) {
#pragma unroll 1
  for (int j = threadIdx.x; j < storage.experts; j += kThreads) {
    int home = places.first()[j];
#pragma unroll 1
    for (int i = home + 1; i < places.first()[j + 1]; ++i) {
      if (storage.headroom()[places.rank()[i]] > storage.headroom()[places.rank()[home]]) home = i;
    }
    storage.bound_of()[j] = places.rank()[home], storage.rank_of()[j] = places.physical()[home];
  }
  __syncthreads();
}

}  // namespace macs::cuda
