"""Machines and models of `sglang-macs simulate`: rates, bandwidths, latencies and shapes, each with its source.

Rates are peaks; an efficiency beside each says what kernels reach of it. `ASSUMED` names what has no published source.
"""

from dataclasses import dataclass

H100 = "https://glennklockwood.com/garden/processors/h100 (after NVIDIA's data sheets)"
H200 = "https://aiwiki.ai/wiki/nvidia_h200 (after NVIDIA's data sheets; compute as H100)"
B200 = "https://glennklockwood.com/garden/processors/B200 (after NVIDIA's data sheets, HGX at 1000 W)"
DEEP_EP = "https://github.com/deepseek-ai/DeepEP/blob/main/docs/legacy.md"
DEEP_GEMM = "https://github.com/deepseek-ai/DeepGEMM (first README, grouped GEMMs, contiguous layout)"
TILESCALE = "https://github.com/tile-ai/tilescale/blob/main/examples/distributed/deepseek_deepep/deepep.md"
NCCL = "https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc"
HERE = "docs/results/kernels.json"
HERE_H100 = "docs/results/kernels_h100.json"

# (tokens of the rank, us) of the plan's operators, without the exchange.
H100_PLAN_US = ((128, 13.5), (1024, 20.0), (8192, 37.2), (65536, 171.5))

# What every preset shares, and where it comes from.
SOURCES = {
    "gemm_efficiency": f"1100 to 1300 of 1979 FP8 TFLOP/s in grouped GEMMs on H800: {DEEP_GEMM}",
    "hbm_efficiency": f"a copy at 4.23 to 4.26 of 4.8 TB/s on H200: {HERE}",
    "nvlink_efficiency": f"DeepEP dispatches at 329 and combines at 287 of 450 GB/s on 8 H100: {TILESCALE}",
    "rdma_efficiency": f"DeepEP reaches 43 to 58 of 50 GB/s between nodes: {DEEP_EP}",
    "rdma_bytes_per_us": f"one 400 Gb/s ConnectX-7 per GPU, as in DeepEP's own measurements: {DEEP_EP}",
    "nccl_base_us, nvlink_hop_us, rdma_tree_hop_us, rdma_ring_hop_us": f"baseLat and hwLat, LL protocol: {NCCL}",
    "plan_us": f"measured on one H200 ({HERE}) and one H100 ({HERE_H100})",
}
ASSUMED = {
    "dispatch_us": "time of an empty dispatch or combine",
    "nvlink_efficiency and rdma_efficiency on B200": "taken to be those of H100",
    "plan_us on B200": "taken to be that of H200",
}


@dataclass(frozen=True)
class Machine:
    """One GPU and its links; bytes and FLOP per microsecond, in one direction. Nodes hold `gpus_per_node` of them."""

    name: str
    bf16_flop_per_us: float
    fp8_flop_per_us: float
    hbm_bytes_per_us: float
    nvlink_bytes_per_us: float
    source: str
    rdma_bytes_per_us: float = 50e3
    gpus_per_node: int = 8
    gemm_efficiency: float = 0.6
    hbm_efficiency: float = 0.89
    nvlink_efficiency: float = 0.68
    rdma_efficiency: float = 0.9
    nccl_base_us: float = 6.8
    nvlink_hop_us: float = 0.6
    rdma_tree_hop_us: float = 5.0
    rdma_ring_hop_us: float = 2.7
    dispatch_us: float = 20.0
    launch_us: float = 3.0
    # (tokens of the rank, us) of the plan's operators, without the exchange.
    plan_us: tuple[tuple[int, float], ...] = ((128, 12.7), (1024, 18.0), (8192, 29.6), (65536, 132.4))


MACHINES = {
    m.name: m
    for m in (
        Machine("h100", 989e6, 1979e6, 3.35e6, 450e3, H100, plan_us=H100_PLAN_US),
        Machine("h200", 989e6, 1979e6, 4.8e6, 450e3, H200),
        Machine("b200", 2250e6, 4500e6, 8.0e6, 900e3, B200),
    )
}


@dataclass(frozen=True)
class Model:
    """Shapes of a mixture-of-experts model: hidden size, intermediate size of an expert, attention."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    source: str
    head_dim: int = 128


MODELS = {
    m.name: m
    for m in (
        Model(
            "qwen3-vl-30b-a3b", 48, 2048, 768, 128, 8, 32, 4,
            "https://huggingface.co/Qwen/Qwen3-VL-30B-A3B-Instruct/blob/main/config.json",
        ),
        Model(
            "qwen3-vl-235b-a22b", 94, 4096, 1536, 128, 8, 64, 4,
            "https://huggingface.co/Qwen/Qwen3-VL-235B-A22B-Instruct/blob/main/config.json",
        ),
    )
}  # fmt: skip
