// Re-routing (docs/design/method.md 5): rounds of proposals, whoever runs them.
//
// In a round every unplaced assignment proposes the best expert left to it (choose.cuh). Once all proposals are known,
// every bound accepts them in (token, slot) order up to its headroom.
//
// A Team is the threads that plan for a rank: a grid whose warps own a share of the tokens each (GridTeam, clip_apply.cu), or
// a block that accepts for all of them, as every other block of its rank does (BlockTeam, fused_decide.cuh). It has
//   bool propose(int round)        the own assignments propose; then what all propose is summed up. False: a block that this
//                                  one waited for did not take part.
//   for_each_proposal(body)        body(slot, expert, units) by whole warps, in order; expert -1: the lane has none
//   settle(slot, expert, accepted) by whole warps, and only where one lane proposes; what becomes of a proposal
//   int num_bounds()
//   int bound_of(int expert)
//   int64_t limit(int bound)       how many units this block may accept, those of the warps before included
//   int* running()                 [NB] of this warp, units of the warps before it
//   const int* proposed()          [NB] units that the whole rank proposes
//   int* headroom()                [NB] units that the rank may accept
//   int* accepted()                [NB] units that this block has accepted in the round, zero before; of weighed loads only
//   const int* sum_accepted()      [NB] those of the whole rank, behind a barrier
#pragma once
#include <cuda_runtime.h>

#include "../launch.cuh"
#include "accept.cuh"
#include "macs/params.h"

namespace macs::cuda {

// Of a round, as each warp sees it for itself.
struct Proposals {
  bool any;
  bool exceed;  // a bound its headroom: somebody is turned away

  template <class Team>
  __device__ __forceinline__ explicit Proposals(const Team& team) : any(false), exceed(false) {
#pragma unroll 1
    for (int n = threadIdx.x % kWarp; n < team.num_bounds(); n += kWarp) {
      any |= team.proposed()[n] > 0;
      exceed |= team.proposed()[n] > team.headroom()[n];
    }
    any = __any_sync(kFullMask, any);
    exceed = __any_sync(kFullMask, exceed);
  }
};

template <class Team>
__device__ __forceinline__ void accept_proposals(Team& team, bool rows) {
  team.for_each_proposal([&](auto& slot, int expert, int units) {
    const bool pending = expert >= 0;
    if (!__any_sync(kFullMask, pending)) return;
    const int bound = pending ? team.bound_of(expert) : 0;
    const bool accepted = accept_in_order(pending, bound, units, rows, team.running(), team.limit(bound));
    if (accepted && !rows) atomicAdd(team.accepted() + bound, units);
    team.settle(slot, expert, accepted);
  });
}

// What a round accepted: of rows as many as fit, which is known already.
template <class Team>
__device__ __forceinline__ void take_headroom(Team& team, bool rows) {
  __syncthreads();
  const int* const taken = rows ? team.proposed() : team.sum_accepted();
#pragma unroll 1
  for (int n = threadIdx.x; n < team.num_bounds(); n += blockDim.x) {
    team.headroom()[n] -= min(taken[n], team.headroom()[n]);
  }
  __syncthreads();
}

// False: a block did not take part. Another round follows only one that turned somebody away: who found no candidate will
// find none later.
template <class Team>
__device__ __forceinline__ bool reroute_rounds(Team& team, const Policy& policy, const void* router_logits) {
  const int rounds = policy.reroute == Reroute::kNone || router_logits == nullptr ? 0 : policy.reroute_rounds;
  const bool rows = policy.load == Load::kRows;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if (!team.propose(round)) return false;
    const Proposals proposals(team);
    if (!proposals.any) break;
    accept_proposals(team, rows);
    if (!proposals.exceed || round + 1 == rounds) break;
    take_headroom(team, rows);
  }
  return true;
}

}  // namespace macs::cuda
