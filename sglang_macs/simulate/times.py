"""What a MoE layer costs on a machine, in microseconds. Every function takes rows with any leading dimensions."""

from dataclasses import dataclass

import numpy as np

from .machines import Machine, Model

EXCHANGES = ("flat", "hierarchical")
FP8_SCALE_BYTES = 4 / 128  # one f32 scale for 128 elements


@dataclass(frozen=True)
class Cluster:
    """R ranks of a machine that serve a model with expert parallelism, `tokens` prefill tokens on each."""

    machine: Machine
    model: Model
    num_ranks: int
    tokens: int
    fp8: bool = False
    tile_m: int = 128  # rows to which grouped GEMMs pad each expert (DeepGEMM: 128)
    low_latency: bool = False  # one row per assignment; otherwise one per destination rank, as DeepEP's normal mode

    @property
    def nodes(self) -> int:
        return -(-self.num_ranks // self.machine.gpus_per_node)

    @property
    def flop_per_us(self) -> float:
        peak = self.machine.fp8_flop_per_us if self.fp8 else self.machine.bf16_flop_per_us
        return peak * self.machine.gemm_efficiency


def expert_us(rows: np.ndarray, cluster: Cluster) -> np.ndarray:
    """[..., E] -> [..., R]: the two grouped GEMMs of each rank, by the larger of arithmetic and memory traffic."""
    model, machine = cluster.model, cluster.machine
    local = rows.reshape(*rows.shape[:-1], cluster.num_ranks, -1)
    padded = (np.ceil(local / cluster.tile_m) * cluster.tile_m).sum(-1)
    flop = padded * 6 * model.hidden * model.intermediate  # gate, up and down
    width = 1 if cluster.fp8 else 2
    weights = (local > 0).sum(-1) * 3 * model.hidden * model.intermediate * width
    # In and out in bf16 or fp8, gate and up written and read, their product written and read.
    activations = local.sum(-1) * (model.hidden * (width + 2) + model.intermediate * (2 * 2 * 2 + width * 2))
    memory = (weights + activations) / (machine.hbm_bytes_per_us * machine.hbm_efficiency)
    return np.maximum(flop / cluster.flop_per_us, memory) + 3 * machine.launch_us


def transfer_us(rows: np.ndarray, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """[..., E] -> dispatch and combine of each rank, both [..., R]: what it receives (and then gives back) over NVLink
    and RDMA, the two at the same time. Tokens come evenly from all ranks, so no rank sends more than the mean.
    """
    machine, hidden = cluster.machine, cluster.model.hidden
    nvlink, rdma = _received(rows, cluster)
    in_bytes = hidden * (1 + FP8_SCALE_BYTES) if cluster.fp8 else hidden * 2
    slowest = np.maximum(
        nvlink / (machine.nvlink_bytes_per_us * machine.nvlink_efficiency),
        rdma / (machine.rdma_bytes_per_us * machine.rdma_efficiency),
    )
    return slowest * in_bytes + machine.dispatch_us, slowest * hidden * 2 + machine.dispatch_us


def _received(rows: np.ndarray, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that each rank takes in over NVLink and over RDMA, both [..., R]."""
    ranks, per_node = cluster.num_ranks, min(cluster.num_ranks, cluster.machine.gpus_per_node)
    remote = 1 - per_node / ranks
    local = rows.reshape(*rows.shape[:-1], ranks, -1)
    if cluster.low_latency:
        received = local.sum(-1)
        return received * (per_node - 1) / ranks, received * remote
    # A token goes once to a node and once to a rank, however many of its experts are there. Experts taken as chosen
    # independently of each other.
    tokens = cluster.tokens * ranks
    absent = np.log1p(-np.minimum(local / tokens, 1 - 1e-9)).sum(-1)  # [..., R], log of the share that skips the rank
    nvlink = tokens * -np.expm1(absent) * (per_node - 1) / per_node
    by_node = absent.reshape(*absent.shape[:-1], -1, per_node).sum(-1)
    rdma = tokens * -np.expm1(by_node) * remote / per_node
    return nvlink, np.repeat(rdma, per_node, axis=-1)


def exchange_us(cluster: Cluster, buckets: int, kind: str) -> float:
    """The all-reduce of the histogram, by NCCL's own latency model with the LL protocol (half the bandwidth).

    flat: one collective, the better of ring and tree. hierarchical: reduce-scatter within nodes, all-reduce of the
    shards between them, all-gather within: three collectives.
    """
    machine, ranks, nodes = cluster.machine, cluster.num_ranks, cluster.nodes
    per_node = min(ranks, machine.gpus_per_node)
    size = (cluster.model.experts * 2 * buckets + 4) * 4
    nvlink = size / (machine.nvlink_bytes_per_us * machine.nvlink_efficiency / 2)
    rdma = size / per_node / (machine.rdma_bytes_per_us * machine.rdma_efficiency / 2)  # all NICs of a node share it
    inside, outside = (per_node - 1) / per_node, (nodes - 1) / nodes
    if kind == "flat":
        moved = 2 * max(nvlink * inside, rdma * outside)
        tree = (per_node - 1) * machine.nvlink_hop_us + np.ceil(np.log2(nodes)) * machine.rdma_tree_hop_us
        ring = (ranks - nodes) * machine.nvlink_hop_us + (nodes if nodes > 1 else 0) * machine.rdma_ring_hop_us
        return machine.nccl_base_us + 2 * min(tree, ring) + moved
    latency = 2 * (machine.nccl_base_us + (per_node - 1) * machine.nvlink_hop_us)
    if nodes > 1:
        latency += machine.nccl_base_us + 2 * np.ceil(np.log2(nodes)) * machine.rdma_tree_hop_us
    return latency + 2 * nvlink * inside + 2 * rdma * outside


def plan_us(cluster: Cluster) -> float:
    """The plan's operators on one rank's tokens, interpolated between measurements and scaled by nothing."""
    tokens, times = zip(*cluster.machine.plan_us, strict=True)
    return float(np.interp(cluster.tokens, tokens, times))


def other_us(cluster: Cluster, context: int) -> float:
    """Attention and router of one layer on one rank: projections, and scores over `context` tokens, causal."""
    model, tokens = cluster.model, cluster.tokens
    wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
    projections = 2 * tokens * model.hidden * (2 * wide + 2 * narrow + model.experts)
    scores = 4 * tokens * (context / 2) * wide
    peak = cluster.machine.bf16_flop_per_us * cluster.machine.gemm_efficiency
    traffic = 12 * tokens * model.hidden * 2 / (cluster.machine.hbm_bytes_per_us * cluster.machine.hbm_efficiency)
    return (projections + scores) / peak + traffic + 10 * cluster.machine.launch_us
