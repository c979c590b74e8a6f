"""Which launches MACS can serve. One rule per line; each names the flag, why, and the way out.

Rules read a plain view of SGLang's resolved flags, so that they can be tested without SGLang.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import MacsConfig
from .errors import MacsError

SGLANG = ("0.5.21", "0.5.22", "0.5.23")  # releases whose internals are hooked and tested; pins name the first
A2A_BACKENDS = ("macs", "deepep")

# Architectures whose MoE layers never reach a dispatcher, or that cannot keep the ranks in step.
REFUSED_ARCHITECTURES = {
    "Llama4": "it builds its MoE layers without a dispatcher",
    "Ernie4_5_VLMoe": "it branches per rank on whether a batch has images, which can deadlock a collective dispatch",
}


@dataclass(frozen=True)
class Launch:
    """What the rules look at: SGLang's resolved flags, the plan's options, the model's architecture and its experts."""

    flags: Any
    config: MacsConfig
    architecture: str
    num_experts: int

    def flag(self, name: str, default: object = None) -> Any:
        return getattr(self.flags, name, default)


@dataclass(frozen=True)
class Rule:
    """refuses(launch): what was got, in words, or "" where the launch is fine."""

    what: str
    refuses: Callable[[Launch], str]
    expected: str
    fix: str


def _if(condition: Callable[[Launch], bool], got: str) -> Callable[[Launch], str]:
    return lambda launch: got if condition(launch) else ""


def _architecture(launch: Launch) -> str:
    for name, reason in REFUSED_ARCHITECTURES.items():
        if launch.architecture.startswith(name):
            return f"{launch.architecture}: {reason}"
    return "" if launch.num_experts else f"{launch.architecture}, which has no experts"


def _expert_parallel(launch: Launch) -> str:
    tp, ep = launch.flag("tp_size", 1), launch.flag("ep_size", 1)
    if ep != tp:
        return f"tp {tp}, ep {ep}"
    if ep == 1 and launch.config.scope == "rank" and not launch.config.is_off:
        return "one rank, which has nothing to balance (scope rank)"
    if ep == 1 and launch.flag("device") == "cuda" and launch.flag("deepep_mode") != "low_latency":
        return "one rank, which DeepEP's normal mode does not take (use --deepep-mode low_latency)"
    return f"{launch.num_experts} experts on {ep} ranks" if launch.num_experts % ep else ""


def no_low_latency(config: MacsConfig, mode: str) -> str:
    """Why no planned batch is dispatched in DeepEP's low-latency mode, or ""."""
    if mode == "normal":
        return "--deepep-mode normal"
    if mode == "auto" and not config.decode:
        return "--deepep-mode auto, under which planned batches (prefill) are in normal mode"
    return ""


def _fused(launch: Launch) -> str:
    if launch.config.dispatch != "fused":
        return ""
    if launch.flag("device") == "cpu":
        return "fused on the CPU"
    if launch.flag("enable_single_batch_overlap"):
        return "fused with --enable-single-batch-overlap, whose combine starts inside the experts' GEMM"
    if launch.config.exchange != "group":
        return "fused with --macs-exchange local"
    return no_low_latency(launch.config, launch.flag("deepep_mode", "auto"))


def _bounded(launch: Launch) -> str:
    if launch.config.dispatch != "bounded":
        return ""
    reasons = (
        (launch.flag("device") == "cpu", "on the CPU"),
        (launch.flag("deepep_mode", "auto") == "low_latency", "with --deepep-mode low_latency"),
        (launch.flag("moe_runner_backend", "deep_gemm") != "deep_gemm", "with another runner than DeepGEMM's"),
        (launch.flag("quantization") not in (None, "fp8"), f"with --quantization {launch.flag('quantization')}"),
        (bool(launch.flag("enable_two_batch_overlap")), "with --enable-two-batch-overlap"),
        (bool(launch.flag("enable_single_batch_overlap")), "with --enable-single-batch-overlap"),
        (launch.flag("expert_distribution_recorder_mode") is not None, "with a recorder of the expert distribution"),
        (launch.flag("speculative_algorithm") is not None, "with speculative decoding"),
        (bool(launch.flag("enable_deterministic_inference")), "with --enable-deterministic-inference"),
    )
    return next((f"bounded {words}" for refused, words in reasons if refused), "")


RULES = (
    Rule("model", _architecture, "a mixture-of-experts model that dispatches", "Serve it without --enable-macs."),
    Rule(
        "expert parallelism",
        _expert_parallel,
        "ep equal to tp, dividing the experts",
        "Pass --tp N --ep-size N, on one GPU --macs-scope expert.",
    ),
    Rule(
        "--enable-prefill-cp",
        _if(
            lambda x: bool(x.flag("enable_prefill_cp")) or x.flag("attn_cp_size", 1) > 1, "prefill context parallelism"
        ),
        "none: its zigzag order hides which rows are visual",
        "Leave it out.",
    ),
    Rule(
        "--elastic-ep-backend",
        _if(lambda x: x.flag("elastic_ep_backend") is not None, "elastic EP"),
        "none",
        "Leave it out.",
    ),
    Rule("--dwdp-size", _if(lambda x: (x.flag("dwdp_size") or 1) > 1, "DWDP"), "none", "Leave it out."),
    Rule(
        "--enable-waterfill",
        _if(lambda x: bool(x.flag("enable_waterfill")), "Waterfill"),
        "none: its shared-expert column must not be clipped",
        "Leave it out.",
    ),
    Rule(
        "--enable-eplb, redundant experts",
        _if(
            lambda x: bool(x.flag("enable_eplb")) or (x.flag("ep_num_redundant_experts") or 0) > 0, "replicated experts"
        ),
        "experts in their own order: re-routing reads logical router logits",
        "Leave EPLB out.",
    ),
    Rule(
        "--ep-dispatch-algorithm",
        _if(lambda x: x.flag("ep_dispatch_algorithm") == "lp", "lp"),
        "static or none: LPLB decides on unclipped loads",
        "Choose another algorithm.",
    ),
    Rule(
        "--enforce-shared-experts-fusion",
        _if(lambda x: bool(x.flag("enforce_shared_experts_fusion")), "fused shared experts"),
        "shared experts of their own: a fused one must not be clipped",
        "Leave it out.",
    ),
    Rule(
        "--macs-dispatch",
        _fused,
        "fused only with --deepep-mode low_latency, --macs-exchange group and CUDA",
        "Or pass --macs-dispatch deepep.",
    ),
    Rule(
        "--macs-dispatch",
        _bounded,
        "bounded only in DeepEP's normal mode, whole batches, with DeepGEMM's runner in bf16 or FP8 blocks",
        "Or pass --macs-dispatch deepep.",
    ),
    Rule("--enable-lora", _if(lambda x: bool(x.flag("enable_lora")), "LoRA"), "none on MoE layers", "Leave it out."),
)


def check_a2a(backend: str) -> None:
    """Raises MacsError unless the asked-for all-to-all backend is one that MACS plans for."""
    if backend not in A2A_BACKENDS:
        raise MacsError(
            "--moe-a2a-backend", repr(backend), "macs or deepep with --enable-macs", "Pass --moe-a2a-backend macs."
        )


def check(launch: Launch) -> None:
    """Raises MacsError for the first rule that refuses this launch."""
    for rule in RULES:
        if got := rule.refuses(launch):
            raise MacsError(rule.what, got, f"{rule.expected} (MACS)", rule.fix)
