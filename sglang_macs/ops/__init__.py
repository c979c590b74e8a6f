"""The operators of the plan (docs/design/method.md), and the plan in one call or two, as thin wrappers over
`torch.ops.sglang_macs`.

Every operator exists for CPU, CUDA and Meta under one name. For CUDA it is the extension's kernel or, where that was
built without nvcc, the one of triton/; MACS_CUDA_BACKEND=cuda or =triton in the environment insists on one of them.
`policy` holds the options of a plan (policy.py). They raise ValueError on a wrong shape, dtype, device or option.
"""

from .bounded import bounded_gather, bounded_permute, bounded_workspace_size
from .fused import (
    RegionLayout,
    RegionShape,
    fused_carry,
    fused_combine,
    fused_dispatch,
    fused_layout,
    fused_receive,
)
from .library import check, cuda_backend, has_cuda, is_whole
from .operators import (
    clip_apply,
    clip_threshold,
    entropy_score,
    entropy_weight,
    load_histogram,
    replica_balance,
    replica_choose,
    selection_score,
)
from .peers import PeerReduceLayout, allocate_shared, open_shared, peer_all_reduce, peer_reduce_layout
from .policy import Policy
from .whole_plan import ALONE, Peers, plan, score_histogram, threshold_apply

__all__ = [
    "ALONE",
    "PeerReduceLayout",
    "Peers",
    "Policy",
    "RegionLayout",
    "RegionShape",
    "allocate_shared",
    "bounded_gather",
    "bounded_permute",
    "bounded_workspace_size",
    "check",
    "clip_apply",
    "clip_threshold",
    "cuda_backend",
    "entropy_score",
    "entropy_weight",
    "fused_carry",
    "fused_combine",
    "fused_dispatch",
    "fused_layout",
    "fused_receive",
    "has_cuda",
    "is_whole",
    "load_histogram",
    "open_shared",
    "peer_all_reduce",
    "peer_reduce_layout",
    "plan",
    "replica_balance",
    "replica_choose",
    "score_histogram",
    "selection_score",
    "threshold_apply",
]
