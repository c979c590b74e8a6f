"""Plans of a group whose experts are replicated."""

from __future__ import annotations

from reference.replica_cases import ReplicaGroup
from sglang_macs.config import MacsConfig
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan


def plans(group: ReplicaGroup, config: MacsConfig) -> list[Plan]:
    """One for each rank: their tables differ in whose they are."""
    mapped, num_experts, num_ranks = group.placed
    given = config, num_experts, num_ranks, group.group.modality, group.group.routing
    return [Plan(*given, Places(num_experts, len(mapped), num_ranks, rank, mapped)) for rank in range(num_ranks)]
