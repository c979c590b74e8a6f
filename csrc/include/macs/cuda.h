// CUDA launchers on raw pointers. They allocate nothing, never synchronise with the host, may be captured in a graph.
// Limits, answered with cudaErrorInvalidValue: K <= 32 (clip_apply), E <= 1024 (clip_apply, selection_score).
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "macs/bounded.h"
#include "macs/fused.h"
#include "macs/params.h"
#include "macs/peer_all_reduce.h"
#include "macs/replicas.h"

namespace macs::cuda {

// Scratch in bytes; the caller owns it, contents may be anything. Depends on the current device.
size_t entropy_weight_workspace_bytes(const EntropyWeightParams& p);
size_t clip_apply_workspace_bytes(const ClipApplyParams& p);
size_t plan_workspace_bytes(const EntropyWeightParams& weight, const ClipApplyParams& apply, const Places& places = {});

cudaError_t launch_entropy_score(const EntropyScoreParams& p, cudaStream_t stream);
cudaError_t launch_entropy_weight(const EntropyWeightParams& p, void* workspace, cudaStream_t stream);
cudaError_t launch_load_histogram(const LoadHistogramParams& p, cudaStream_t stream);
cudaError_t launch_clip_threshold(const ClipThresholdParams& p, cudaStream_t stream);
cudaError_t launch_selection_score(const SelectionScoreParams& p, cudaStream_t stream);
cudaError_t launch_clip_apply(const ClipApplyParams& p, void* workspace, cudaStream_t stream);

// The plan in two calls, one on each side of the exchange; the same bits as the five operators one after the other.
// Both get the same `workspace`: the first call prepares in it what the second needs; the second leaves it prepared.
// Routing inputs (ids, gates, segment, router logits) are complete before the first call: the second reads them before
// it waits for the exchange.
// Before the exchange: score.entropy is weight.entropy, weight.weight is histogram.in.weight. score.hidden_states may be
// nullptr where nothing depends on entropies: they are not written, and every visual token weighs 0.5.
// With places, ids are physical, counts [kReplicaCounts, E, 2], and histograms end with what replica_exchange_size says.
cudaError_t launch_score_histogram(const EntropyScoreParams& score, const EntropyWeightParams& weight,
                                   const LoadHistogramParams& histogram, void* workspace, cudaStream_t stream,
                                   const Places& places = {});
// Behind it: threshold.shift and .cut are apply.shift and .cut; without an exchange threshold.own is threshold.group.
// rank_rows [2, R] out, with places: the group's rows of each rank, as routed and as balanced.
cudaError_t launch_threshold_apply(const ClipThresholdParams& threshold, const ClipApplyParams& apply, void* workspace,
                                   cudaStream_t stream, const Places& places = {}, int32_t* rank_rows = nullptr);

// Dispatch with the plan inside, and combine, among ranks that address each other's regions (macs/fused.h).
// Other sizes than those named there: cudaErrorInvalidValue, and so is a grid that does not fit on the device at once.
cudaError_t launch_fused_dispatch(const FusedDispatchParams& p, cudaStream_t stream);
cudaError_t launch_fused_carry(const FusedDispatchParams& p, cudaStream_t stream);  // no plan: rows as they are routed
cudaError_t launch_fused_combine(const FusedCombineParams& p, cudaStream_t stream);

// The exchange of the plan among such ranks: every rank launches it, in the same order (macs/peer_all_reduce.h).
cudaError_t launch_peer_all_reduce(const PeerReduceParams& p, cudaStream_t stream);

// Received tokens to the rows of their experts, and the experts' outputs back (macs/bounded.h).
cudaError_t launch_bounded_permute(const BoundedPermuteParams& p, cudaStream_t stream);
cudaError_t launch_bounded_gather(const BoundedGatherParams& p, cudaStream_t stream);

}  // namespace macs::cuda
