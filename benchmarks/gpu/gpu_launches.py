"""How programs here start the real SGLang server: models, ranks, DeepEP modes, and what the runs of a launch differ in.

Models have random weights, few layers and hidden sizes that DeepEP takes; their visual tokens prefer the first half of
the experts, which are rank 0's: image batches are skewed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.check_serving import REPEATED_FLAGS
from benchmarks.serving import Server
from sglang_macs import tiny_models

HERE = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[2]

ONE_GPU_SITE = HERE / "one_gpu_site"
COMMON = [
    *("--mem-fraction-static", "0.8", "--attention-backend", "triton", "--mm-attention-backend", "sdpa"),
    *("--sampling-backend", "pytorch", "--random-seed", "1", "--skip-server-warmup"),
    *("--enable-macs", "--macs-min-tokens", "0"),
    "--disable-custom-all-reduce",  # compiled at every first start, and it cannot copy within one GPU
]
# SGLang's profile for Qwen3-VL-MoE on Hopper lets 22 rounds go by after a prefill, also where nothing decodes: a
# queue of short answers waits for it, and with --sleep-on-idle each idle round takes a second.
PREFILL_AT_ONCE = ("--prefill-decode-interval", "0")
SMALL = (
    *("--max-total-tokens", "8192", "--max-running-requests", "16", "--chunked-prefill-size", "512", *PREFILL_AT_ONCE),
    "--sleep-on-idle",  # else every rank of every waiting server keeps a core busy, and the others start slower
)
LARGE = (
    *("--max-total-tokens", "65536", "--max-running-requests", "64", "--chunked-prefill-size", "8192"),
    *PREFILL_AT_ONCE,
)
RUNS = {
    "off": ["--macs-preset", "off", "--macs-verify", "true"],
    "inf": ["--macs-gamma", "inf", "--macs-act", "always", "--macs-verify", "true"],
    "1.0": ["--macs-gamma", "1.0", "--macs-act", "always", "--macs-verify", "true"],  # small models gain little
}
ENVIRONMENT = {
    "MACS_EXPERIMENTAL": "replicas,models,auto,v2",  # what is refused in service is tried here
    # Rows per rank of DeepEP's low-latency buffers: ranks times tokens must divide by 4 for DeepGEMM, and a chunk must
    # fit.
    "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256",
    # Compile the kernels that are used when they are used: all of them beforehand take minutes.
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
    # Servers that start side by side take memory from one another.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
# A server that needs longer hangs: it shall not cost the others their time. Three large ones that compile side by
# side, with empty caches, took 180.
START_SECONDS = 240
# DeepEP V2. Its kernels wait for each other with all their blocks, so that a rank's share of a GPU has to hold them
# (docs/design/between_nodes.md).
V2_ENVIRONMENT = {
    "SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256",
    "SGLANG_DEEPEP_V2_NUM_SMS": "24",
    "NCCL_CUMEM_ENABLE": "1",
    "EP_SUPPRESS_NCCL_CHECK": "1",
}
WITHOUT_GIN = {"EP_DISABLE_GIN": "1"}
# No rank addresses another's memory: NCCL's GIN by its proxy, over tools/rma_tcp.
OVER_TCP = {
    "NCCL_RMA_PLUGIN": str(ROOT / "build" / "librma_tcp.so"),
    "NCCL_LSA_TEAM_SIZE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_GIN_TYPE": "2",
    "CUDA_MODULE_LOADING": "EAGER",  # a module that is loaded waits for kernels, and these for the proxy
    "RMA_TCP_TIMEOUT": "120",  # kernels are compiled meanwhile
}
# Every few passes, a layer after the other.
MOVING = ("--enable-eplb", "--eplb-rebalance-num-iterations", "8", "--eplb-rebalance-layers-per-chunk", "1")


@dataclass(frozen=True)
class Launch:
    """One way to serve.

    mode: DeepEP's, or "v2". kind, experts, top_k, layers, copies, hidden, intermediate, fp8: of the model; options:
    others of its builder; flags: beside the common ones; attention_tp: all ranks share every request; fused,
    bounded: what --macs-dispatch asks for where MACS is on, both: auto; peers: with --macs-all-reduce peer there,
    else group; graphs: decode replays CUDA graphs; one_gpu: every rank on the first GPU (under MPS); observed: with
    metrics and trace; redundant: copies of experts; moves: EPLB moves experts meanwhile; over_tcp: no rank addresses
    another's memory.
    """

    ranks: int
    mode: str
    kind: str = "qwen3_vl_moe"
    experts: int = 32
    top_k: int = 4
    layers: int = 3
    copies: int = 0
    hidden: int = 2048
    intermediate: int = 256
    fp8: bool = False
    options: dict[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = SMALL
    attention_tp: bool = False
    fused: bool = False
    bounded: bool = False
    peers: bool = False
    graphs: bool = False
    one_gpu: bool = False
    observed: bool = False
    redundant: int = 0
    moves: bool = False
    over_tcp: bool = False

    @property
    def runs(self) -> dict[str, list[str]]:
        """RUNS; where experts have copies, beside one without them."""
        return RUNS | ({"plain": RUNS["off"]} if self.redundant else {})

    @property
    def without_copies(self) -> Launch:
        return dataclasses.replace(self, redundant=0, moves=False)

    @property
    def gpus(self) -> int:
        return 1 if self.one_gpu else self.ranks

    @property
    def arguments(self) -> list[str]:
        n = str(self.ranks)
        parallel = ["--tp", n, "--ep-size", n]
        if self.ranks == 1:  # it has nothing to balance: its experts are bounded
            parallel += ["--macs-scope", "expert"]
        elif not self.attention_tp:
            parallel += ["--dp", n, "--enable-dp-attention"]
        if self.one_gpu:  # pictures would go through memory of a process that is no rank
            parallel += ["--mm-feature-transport", "cpu"]
        graphs = ["--cuda-graph-max-bs-decode", "8"] if self.graphs else ["--disable-cuda-graph"]
        placed = []
        if self.redundant:
            location = expert_location(self.layers + self.copies, self.experts, self.redundant, self.ranks)
            placed = ["--ep-num-redundant-experts", str(self.redundant), "--init-expert-location", location]
        moving = MOVING if self.moves else ()
        backend = ["--moe-a2a-backend", "macs", "--deepep-mode", self.mode]
        if self.mode == "v2":
            backend = ["--moe-a2a-backend", "deepep_v2", "--deepep-v2-mode", "hybrid" if self.over_tcp else "direct"]
        return [*COMMON, *backend, *graphs, *parallel, *self.flags, *placed, *moving]

    @property
    def dispatch(self) -> str:
        """Of --macs-dispatch."""
        if self.fused:
            return "auto" if self.bounded else "fused"
        return "bounded" if self.bounded else "deepep"

    @property
    def slot(self) -> str:
        """What stands for a picture in a prompt; "" for a model that takes none."""
        return tiny_models.PICTURE_SLOTS.get(self.kind, "")

    @property
    def layers_are_graphs(self) -> bool:
        """Whether a bounded dispatch carries every pass, and a layer of one is a CUDA graph: V2's is prefill's."""
        return self.bounded and self.mode != "v2"

    @property
    def plans_fused(self) -> bool:
        """Whether planned batches, which are prefill's, go through the fused kernels: not in normal mode, nor with
        replicas, which are planned in front.
        """
        return self.fused and self.mode == "low_latency" and not self.redundant

    def environment(self) -> dict[str, str]:
        common = ENVIRONMENT
        if self.mode == "v2":
            common = ENVIRONMENT | V2_ENVIRONMENT | (OVER_TCP if self.over_tcp else WITHOUT_GIN)
        if self.gpus > 1:
            return common
        one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        return common | one | (_one_gpu_environment() if self.one_gpu else {})

    def model_path(self) -> Path:
        """Where the checkpoint lies; launches that differ elsewhere share one."""
        layers = f"-{self.layers + self.copies}" if self.copies else ""
        kind = "InternVL3_5" if self.kind == "internvl" else self.kind  # SGLang looks for that name
        return ROOT / "build" / "models" / f"gpu-{kind}-{self.experts}{layers}{'-fp8' if self.fp8 else ''}"

    def model(self) -> Path:
        """The checkpoint, built if it is not there."""
        size = {"hidden": self.hidden, "layers": self.layers, "num_experts": self.experts, "top_k": self.top_k}
        size |= {"intermediate": self.intermediate, **self.options}
        if self.copies:
            size |= {"copies": self.copies}
        if self.kind == "qwen3_moe":
            size |= {"fp8": self.fp8, "head_dim": 64}
        return tiny_models.ensure(self.model_path(), self.kind, **size)


def expert_location(layers: int, experts: int, redundant: int, ranks: int) -> str:
    """For --init-expert-location: each rank has its own experts, linearly, and copies of others', each of another rank:
    an overloaded rank's first experts have copies in as many places as can be.
    """
    own, copies = experts // ranks, redundant // ranks
    of_layer = []
    for rank in range(ranks):
        sources = [(rank + 1 + i % (ranks - 1)) % ranks for i in range(copies)]
        of_layer += [rank * own + i for i in range(own)] + [source * own + i for i, source in enumerate(sources)]
    return json.dumps({"physical_to_logical_map": [of_layer] * layers}, separators=(",", ":"))


def _one_gpu_environment() -> dict[str, str]:
    """Several ranks of SGLang on one GPU, and of the NCCL that lies beside torch."""
    places = (Path(folder) / "nvidia" / "nccl" / "lib" / "libnccl.so.2" for folder in sys.path)
    libraries = [str(place) for place in places if place.exists()]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ONE_GPU_SITE), os.environ.get("PYTHONPATH")])),
        "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "1",
    } | ({"SGLANG_NCCL_SO_PATH": libraries[0]} if libraries else {})


# Of Qwen3-VL-30B-A3B's experts as many, and as large.
REAL = {"experts": 128, "top_k": 8, "intermediate": 768}
FP8 = {"kind": "qwen3_moe", "fp8": True, "flags": (*SMALL, "--moe-runner-backend", "macs")}
FP8_V2 = FP8 | {"flags": SMALL}
LAUNCHES = {
    "2 ranks, low latency": Launch(2, "low_latency", observed=True),
    "2 ranks, normal": Launch(2, "normal"),
    "2 ranks, peer exchange": Launch(2, "normal", peers=True),
    "2 ranks, 128 experts": Launch(2, "low_latency", observed=True, **REAL),
    "1 rank, low latency": Launch(1, "low_latency"),
    "2 ranks, FP8 blocks": Launch(2, "low_latency", **FP8),
    "2 ranks, two batches": Launch(2, "normal", kind="qwen3_moe", flags=(*SMALL, "--enable-two-batch-overlap")),
    "2 ranks, one GPU": Launch(2, "low_latency", one_gpu=True),
    "2 ranks, bounded": Launch(2, "normal", bounded=True, **REAL),
    "2 ranks, bounded, FP8 blocks": Launch(2, "normal", bounded=True, **FP8),
    "2 ranks, bounded, one GPU": Launch(2, "normal", bounded=True, one_gpu=True),
    "2 ranks, bounded, FP8 blocks, one GPU": Launch(2, "normal", bounded=True, one_gpu=True, **FP8),
    "2 ranks, V2": Launch(2, "v2", bounded=True, **REAL),
    "2 ranks, V2, FP8 blocks": Launch(2, "v2", bounded=True, **FP8_V2),
    "2 ranks, V2, one GPU": Launch(2, "v2", bounded=True, one_gpu=True, **REAL),
    "2 ranks, V2 over TCP": Launch(2, "v2", bounded=True, over_tcp=True, **REAL),
    "2 ranks, V2 over TCP, one GPU": Launch(2, "v2", bounded=True, over_tcp=True, one_gpu=True, **REAL),
    "2 ranks, V2, FP8 blocks, one GPU": Launch(2, "v2", bounded=True, one_gpu=True, **FP8_V2),
    "2 ranks, replicas": Launch(2, "normal", redundant=32, **REAL),
    "2 ranks, replicas, bounded": Launch(2, "normal", redundant=32, bounded=True, **REAL),
    "2 ranks, replicas, EPLB": Launch(2, "normal", redundant=32, moves=True, **REAL),
    "2 ranks, replicas, bounded, EPLB": Launch(2, "normal", redundant=32, moves=True, bounded=True, **REAL),
    "2 ranks, replicas, fused": Launch(2, "low_latency", redundant=32, fused=True, **REAL),
    "2 ranks, replicas, fused, EPLB": Launch(2, "low_latency", redundant=32, moves=True, fused=True, **REAL),
    "2 ranks, fused": Launch(2, "low_latency", fused=True),
    "2 ranks, fused, FP8 blocks": Launch(2, "low_latency", fused=True, **FP8),
    "1 rank, fused": Launch(1, "low_latency", fused=True),
    # As users run it: prefill in normal mode, decode in low latency. Decoding and prefills meet in the mixed requests.
    "2 ranks, auto": Launch(2, "auto", graphs=True),
    "2 ranks, auto, fused": Launch(2, "auto", fused=True, graphs=True),
    "2 ranks, auto, all": Launch(2, "auto", fused=True, bounded=True, peers=True, graphs=True, **REAL),
    "2 ranks, auto, fused, FP8 blocks": Launch(2, "auto", fused=True, graphs=True, **FP8),
    "2 ranks, auto, fused, mixed chunks": Launch(
        2, "auto", fused=True, graphs=True, flags=(*SMALL, "--enable-mixed-chunk")
    ),
    "2 ranks, auto, fused, two batches": Launch(
        2, "auto", kind="qwen3_moe", fused=True, graphs=True, flags=(*SMALL, "--enable-two-batch-overlap")
    ),
    "2 ranks, low latency, fused, graphs": Launch(2, "low_latency", fused=True, graphs=True),
    "2 ranks, auto, fused, one GPU": Launch(2, "auto", fused=True, graphs=True, one_gpu=True),
    "2 ranks, auto, all, one GPU": Launch(
        2, "auto", fused=True, bounded=True, peers=True, graphs=True, one_gpu=True, **REAL
    ),
    "2 ranks, auto, fused, FP8 blocks, one GPU": Launch(2, "auto", fused=True, graphs=True, one_gpu=True, **FP8),
    "2 ranks, low latency, fused, graphs, one GPU": Launch(2, "low_latency", fused=True, graphs=True, one_gpu=True),
}
# Other families as users run them. Heads are as wide as the originals'.
HEADS = {"head_dim": 128}
LATENT = {**HEADS, "latent": 512}
DECODE_IN_GRAPHS = {"ranks": 2, "mode": "auto", "graphs": True}
LAUNCHES |= {
    "2 ranks, auto, InternVL3.5": Launch(
        **DECODE_IN_GRAPHS, kind="internvl", layers=2, options=HEADS, attention_tp=True, **REAL
    ),
    "2 ranks, auto, Kimi-VL": Launch(
        **DECODE_IN_GRAPHS,
        kind="kimi_vl",
        experts=64,
        top_k=6,
        intermediate=512,
        options=LATENT,
        flags=(*SMALL, "--trust-remote-code"),
    ),
    "2 ranks, auto, GLM-4.5V": Launch(
        **DECODE_IN_GRAPHS,
        kind="glm4v_moe",
        hidden=4096,
        experts=64,
        top_k=8,
        options=HEADS,
        flags=(*SMALL, "--mm-enable-dp-encoder"),
    ),
    "2 ranks, auto, Qwen3-Omni": Launch(
        **DECODE_IN_GRAPHS, kind="qwen3_omni", experts=64, top_k=8, options=HEADS, attention_tp=True
    ),
    # As many experts as Qwen3.5-397B-A17B has: more than the kernels for small batches take.
    "2 ranks, auto, Qwen3.5-MoE": Launch(
        **DECODE_IN_GRAPHS,
        kind="qwen3_5_moe",
        experts=512,
        top_k=10,
        layers=4,
        intermediate=128,
        options={"head_dim": 256},
        flags=(*SMALL, "--disable-radix-cache"),  # states of linear attention are not cached
    ),
    "2 ranks, auto, DeepSeek-V3": Launch(**DECODE_IN_GRAPHS, kind="deepseek_v3", experts=64, top_k=8, options=LATENT),
}
# Ranks that share a GPU meet on the host, which decode graphs do not.
LAUNCHES |= {
    f"2 ranks, {name}, one GPU": dataclasses.replace(launch, mode="normal", graphs=False, bounded=True, one_gpu=True)
    for name, launch in (
        (name.removeprefix("2 ranks, auto, "), launch)
        for name, launch in LAUNCHES.items()
        if launch.kind not in ("qwen3_vl_moe", "qwen3_moe")
    )
}
LAUNCHES["2 ranks, replicas, bounded, EPLB, one GPU"] = dataclasses.replace(
    LAUNCHES["2 ranks, replicas, bounded, EPLB"], one_gpu=True
)
# On more GPUs, what differs with their number.
LAUNCHES |= {f"{n} ranks, 128 experts": Launch(n, "low_latency", **REAL) for n in (4, 8)}
LAUNCHES |= {f"{n} ranks, fused": Launch(n, "low_latency", fused=True) for n in (4, 8)}


def bench_launch(ranks: int) -> Launch:
    """That of the image benchmark: half as deep as that model, so that three servers fit beside one another."""
    return Launch(ranks, "normal", flags=(*LARGE, *REPEATED_FLAGS), copies=21, **REAL)


def start(launch: Launch, run: list[str], log: Path, environment: dict[str, str] | None = None) -> Server:
    """A server of `launch` with the flags of a run; a context manager."""
    env = launch.environment() | (environment or {})
    own = []
    if "off" not in run:
        own += ["--macs-dispatch", launch.dispatch, "--macs-all-reduce", "peer" if launch.peers else "group"]
    return Server(launch.model(), [*launch.arguments, *run, *own], env=env, log=log, timeout=START_SECONDS)
