"""What benchmarks/e2e serves: the model, the variants that are compared, and how each is launched."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import requests

from benchmarks.gpu import gpu_launches
from benchmarks.serving import CPU_ARGS, Server, ServerError
from sglang_macs import cpu_compat, tiny_models
from sglang_macs.config import MacsConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

ROUTING_SITE = HERE / "routing_site"
BUILD = ROOT / "build" / "e2e"
LOADS = ROOT / "sglang_macs" / "simulate" / "qwen3vl_30b_a3b.json"


# ---- Variants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One line of the comparison. Variants of equal `flags` share a server; balanced: routed with perfect balance."""

    name: str
    dispatch: str
    flags: tuple[str, ...]
    balanced: bool = False

    @property
    def stock(self) -> bool:
        """Served by SGLang without the plugin."""
        return self.flags == STOCK

    @property
    def redundant(self) -> int:
        """Copies of experts."""
        given = dict(zip(self.flags, self.flags[1:], strict=False))
        return int(given.get(REDUNDANT, 0))


# SGLang's fastest way for this model. DeepGEMM is the only runner that takes DeepEP's formats in bf16. Prefill CUDA
# graphs (SGLang 0.5.21): `--deepep-mode normal` turns all graphs off. Mode auto, whose prefill is the same dispatch,
# keeps them only for models on a list that has Qwen3.5 and not Qwen3-VL-MoE ("multimodal prefill replay faults"),
# unless --cuda-graph-backend-prefill asks for them: option --prefill-graphs does, in every server.
STOCK = ("--moe-a2a-backend", "deepep", "--moe-runner-backend", "deep_gemm")
MACS = ("--moe-a2a-backend", "macs")
COUNTED, BOUNDED = (*MACS, "--macs-dispatch", "deepep"), (*MACS, "--macs-dispatch", "bounded")
OFF, INFINITE, RANK = ("--macs-preset", "off"), ("--macs-gamma", "inf"), ("--macs-gamma", "1.05")
REDUNDANT = "--ep-num-redundant-experts"  # where copies lie: `Launch.server`; servers without it have none
REPLICAS, FEW_REPLICAS = (REDUNDANT, "32"), (REDUNDANT, "16")
# The most telling first: with too little time for all, the last are left out.
VARIANTS = (
    Variant("stock", "deepep", STOCK),
    Variant("balanced", "deepep", STOCK, balanced=True),
    Variant("rank-1.05", "bounded", (*BOUNDED, *RANK)),
    Variant("off", "bounded", (*BOUNDED, *OFF)),
    Variant("balanced", "bounded", (*BOUNDED, *OFF), balanced=True),
    Variant("inf", "bounded", (*BOUNDED, *INFINITE)),
    Variant("rank-1.05", "deepep", (*COUNTED, *RANK)),
    Variant("off", "deepep", (*COUNTED, *OFF)),
    Variant("inf", "deepep", (*COUNTED, *INFINITE)),
    Variant("replicas", "bounded", (*BOUNDED, *INFINITE, *REPLICAS)),
    Variant("replicas-1.05", "bounded", (*BOUNDED, *RANK, *REPLICAS)),
    Variant("rank-1.1", "bounded", (*BOUNDED, "--macs-gamma", "1.1")),
    Variant("replicas-16", "bounded", (*BOUNDED, *INFINITE, *FEW_REPLICAS)),
)


def chosen_variants(names: list[str] | None, dispatches: list[str] | None, device: str) -> list[Variant]:
    """Those asked for and served by this version; stock and its balanced twin are always among them."""
    (known,) = (f.metadata["choices"] for f in dataclasses.fields(MacsConfig) if f.name == "dispatch")
    if device == "cpu":  # SGLang has no all-to-all on CPU: the plugin's, with the preset off, stands for stock SGLang
        stands = {STOCK: (*COUNTED, *OFF)}
        own = [v for v in VARIANTS if v.dispatch == "deepep"]
        variants = [dataclasses.replace(v, dispatch="gloo", flags=stands.get(v.flags, v.flags)) for v in own]
        dispatches = None
    else:
        variants = [v for v in VARIANTS if v.dispatch == "deepep" or v.dispatch in known]
    first, rest = variants[:2], variants[2:]
    wanted = [v for v in rest if names is None or v.name in names]
    return first + [v for v in wanted if dispatches is None or v.dispatch in dispatches]


def grouped(variants: list[Variant], at_once: int) -> list[list[Variant]]:
    """Groups whose servers run side by side, at most `at_once`; stock SGLang is in each, for the ratios."""
    stock = [v for v in variants if v.flags == variants[0].flags]
    others = list(dict.fromkeys(v.flags for v in variants if v.flags != variants[0].flags))
    size = max(at_once - 1, 1)
    parts = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    return [[*stock, *(v for v in variants if v.flags in part)] for part in parts]


def side_by_side(groups: list[list[Variant]]) -> int:
    """Servers of a group, at most."""
    return max(len({variant.flags for variant in group}) for group in groups)


# ---- Routings ------------------------------------------------------------------------------------------------------


def published_spread(layers: int, skew: float) -> list[float]:
    """Maximum over mean of the ranks, for each layer: spread as published for Qwen3-VL-30B-A3B (the file names the
    source), `skew` on average.
    """
    published = json.loads(LOADS.read_text())["rank_max_over_mean_ep8"]["per_layer_mean"]
    kept = [published[i * len(published) // layers] for i in range(layers)]
    mean = sum(kept) / layers
    return [max(1.0, 1 + (value - 1) * (skew - 1) / (mean - 1)) for value in kept]


def routings(layers: int, skews: list[float]) -> list:
    """What the plugin of routing_site is given: perfect balance first, then a routing for each of `skews`."""
    return ["balanced", *([1.0] * layers if skew == 1 else published_spread(layers, skew) for skew in skews)]


# ---- The model -----------------------------------------------------------------------------------------------------


TEXT = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_local_experts": 128,  # the key that SGLang reads for Qwen3-VL-MoE
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "max_position_embeddings": 65536,
    "vocab_size": 151936,
}
VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [8, 16, 24],
}
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "visual"],
}
LARGEST_PICTURE = 16384  # visual tokens


def build_model(layers: int, dtype: str, real: bool) -> Path:
    """A checkpoint's folder without weights (`--load-format dummy`): Qwen3-VL-30B-A3B's dimensions if `real`, else the
    tiny model's; tokenizer and processor are the tiny model's. dtype: bf16, or fp8 (blocks of 128 x 128).
    """
    tiny = tiny_models.ensure(ROOT / "build" / "models" / "tiny-qwen3-vl-moe", "qwen3_vl_moe")
    out = BUILD / f"model-{'30b' if real else 'tiny'}-{layers}-{dtype}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(tiny, out, ignore=shutil.ignore_patterns("*.safetensors", "built_from.json"))
    config = json.loads((out / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] = layers
    if real:
        text |= TEXT
        text["rope_parameters"]["mrope_section"] = [24, 20, 20]
        config["vision_config"] |= VISION
    if dtype == "fp8":
        config["quantization_config"] = FP8
    (out / "config.json").write_text(json.dumps(config, indent=1))
    processor = json.loads((out / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {
        "shortest_edge": tiny_models.PIXELS_PER_TOKEN,
        "longest_edge": LARGEST_PICTURE * tiny_models.PIXELS_PER_TOKEN,
    }
    (out / "processor_config.json").write_text(json.dumps(processor, indent=1))
    return out


# ---- Launches ------------------------------------------------------------------------------------------------------


# Below --cache, as benchmarks/gpu/session.py has them: those of Triton, FlashInfer and DeepGEMM lie in the first.
CACHES = {"SGLANG_CACHE_DIR": "", "SGLANG_JIT_CACHE_DIR": "sglang", "TVM_FFI_CACHE_DIR": "tvm-ffi"}


@dataclass(frozen=True)
class Launch:
    """What all servers of a run have in common. tokens: of a rank's pass, at most; requests: of a round, over ranks.

    decode_graphs: requests of a rank that the largest CUDA graph decodes; 0: none. cache: folder for compiled kernels;
    attention: SGLang's backend, None chooses (`attention_backend`); share_gpu: all
    ranks on the first GPU, where `client` is the environment of MPS's clients.
    """

    device: str
    ranks: int
    layers: int
    dtype: str
    tokens: int
    requests: int
    routings: list
    pictures: bool = False
    deepep_mode: str = "normal"
    prefill_graphs: bool = False
    decode_graphs: int = 0
    attention: str | None = None
    cache: Path | None = None
    share_gpu: bool = False
    client: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        n = str(self.ranks)
        sizes = {
            "--max-running-requests": max(self.requests, self.ranks),  # else decode passes come between
            "--max-total-tokens": 4 * self.tokens,
            "--chunked-prefill-size": self.tokens * self.ranks,  # SGLang divides it by dp
            "--max-prefill-tokens": max(self.tokens, 16384),
            "--random-seed": 1,
            "--load-format": "dummy",
            "--prefill-decode-interval": 0,  # else 22 idle rounds follow each prefill of this model
        }
        arguments = ["--tp", n, "--dp", n, "--enable-dp-attention", "--ep-size", n]
        arguments += [*(CPU_ARGS if self.device == "cpu" else self._cuda_arguments()), "--disable-radix-cache"]
        if self.pictures:  # prepared once: what is timed is the model
            arguments += ["--mm-preprocess-cache-size-mb", "4096"]
        return [*arguments, *(str(word) for pair in sizes.items() for word in pair)]

    def _cuda_arguments(self) -> list[str]:
        attention = self.attention or attention_backend()
        arguments = ["--mem-fraction-static", "0.9", "--skip-server-warmup", "--disable-custom-all-reduce"]
        arguments += ["--attention-backend", attention, "--sampling-backend", "pytorch"]
        arguments += ["--mm-attention-backend", "fa3" if attention == "fa3" else "sdpa"]
        if self.share_gpu:  # pictures would go through memory of a process that is no rank
            arguments += ["--mm-feature-transport", "cpu"]
        if self.decode_graphs:
            return [
                *arguments,
                "--deepep-mode",
                self.deepep_mode,
                "--cuda-graph-max-bs-decode",
                str(self.decode_graphs),
            ]
        if self.prefill_graphs:
            return [*arguments, "--deepep-mode", "auto", "--cuda-graph-backend-prefill", "breakable"]
        return [*arguments, "--deepep-mode", self.deepep_mode, "--disable-cuda-graph"]

    def environment(self, variant: Variant, passes: Path) -> dict[str, str]:
        base = gpu_launches.Launch(self.ranks, self.deepep_mode, one_gpu=self.share_gpu).environment()
        inherited = base.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        folders = os.pathsep.join(filter(None, [str(ROUTING_SITE), str(ROOT), inherited]))
        found = base | {
            "PYTHONPATH": folders,
            "SGLANG_PLUGINS": "e2e_routing" if variant.stock else "macs,e2e_routing",
            "E2E_ROUTING": json.dumps({"routings": self.routings, "passes": str(passes)}),
            # A round is one request of many prompts; ranks hold them until all are there, so that every pass is full.
            "SGLANG_ENABLE_COLOCATED_BATCH_GEN": "1",
            "SGLANG_VLM_CACHE_SIZE_MB": "0",  # a picture that is sent again is encoded again
        }
        if self.cache:
            found |= {name: str(self.cache / folder) for name, folder in CACHES.items()}
        if self.decode_graphs:  # ranks times tokens must divide by 4 for DeepGEMM
            found["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(max(4, self.decode_graphs))
        if self.device == "cpu":
            found["PYTHONPATH"] = cpu_compat.environment(self.ranks, {"PYTHONPATH": folders})["PYTHONPATH"]
        return found | self.client

    def caches(self) -> list[Path]:
        """Where a server puts kernels that it compiles."""
        named = [Path(os.environ[name]) for name in CACHES if name in os.environ]
        usual = [Path.home() / ".cache" / name for name in ("sglang", "flashinfer", "tvm-ffi")]
        return [self.cache] if self.cache else [*named, *usual, Path.home() / ".triton"]

    def server(self, variant: Variant, model: Path, folder: Path) -> Server:
        """Not started. `folder` gets its log and the record of its passes."""
        passes = folder / "passes"
        shutil.rmtree(folder, ignore_errors=True)
        passes.mkdir(parents=True)
        environment = self.environment(variant, passes)
        arguments = [*self.arguments(), *variant.flags]
        if variant.redundant:
            sizes = self.layers, TEXT["num_experts"], variant.redundant, self.ranks
            arguments += ["--init-expert-location", gpu_launches.expert_location(*sizes)]
        seconds = gpu_launches.START_SECONDS
        return QuietServer(model, arguments, env=environment, log=folder / "server.log", timeout=seconds)


def attention_backend() -> str:
    """FlashAttention 3 where sglang-kernel brings it, else Triton's, which SGLang brings itself."""
    kernel = importlib.util.find_spec("sgl_kernel")
    folders = [Path(place) for place in kernel.submodule_search_locations or []] if kernel else []
    return "fa3" if any(True for folder in folders for _ in folder.glob("flash_ops*.so")) else "triton"


class QuietServer(Server):
    """A server that is up when it answers, not when it has computed: several whose first passes meet on one GPU stand
    still, each holding what the others' peers wait for.
    """

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < self.timeout:
            if self.process.poll() is not None:
                raise ServerError(self._report(f"server exited with {self.process.returncode} after {elapsed:.0f} s"))
            try:
                if requests.get(f"{self.url}/get_model_info", timeout=5).ok:
                    self.start_seconds = elapsed
                    return
            except requests.RequestException:
                time.sleep(0.25)
        raise ServerError(self._report(f"server not up after {self.timeout:.0f} s"))
