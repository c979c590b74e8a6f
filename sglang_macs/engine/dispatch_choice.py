"""What can carry a launch's batches: why a dispatch that was asked for cannot, and what `auto` comes to."""

from dataclasses import replace

from ..config import MacsConfig
from .launch import V2, Launch, experimental
from .placement import placed


def overlap(launch: Launch) -> str:
    """The flag that lets batches overlap where no dispatcher can, or ""."""
    for name in ("enable_two_batch_overlap", "enable_single_batch_overlap"):
        if launch.flag(name) and launch.flag("device") == "cpu":
            return f"--{name.replace('_', '-')} on the CPU, whose dispatcher sends and waits in one"
    return ""


def fused(launch: Launch) -> str:
    """What `--macs-dispatch fused` cannot be had with here, or ""."""
    if launch.config.dispatch != "fused":
        return ""
    if launch.flag("device") == "cpu":
        return "fused on the CPU"
    if launch.flag("enable_single_batch_overlap"):
        return "fused with --enable-single-batch-overlap, whose combine starts inside the experts' GEMM"
    if launch.config.exchange != "group":
        return "fused with --macs-exchange local"
    return "--deepep-mode normal" if launch.flag("deepep_mode", "auto") == "normal" else ""


def decode_in_graphs(launch: Launch) -> str:
    """A decode graph is captured once, before there is a batch that could be planned."""
    config = launch.config
    if config.is_off or not config.decode or launch.flag("device") != "cuda" or launch.flag("deepep_mode") == "normal":
        return ""
    graphs = launch.flag("cuda_graph_config")  # as SGLang has resolved it; with --deepep-mode normal it captures none
    backend = getattr(getattr(graphs, "decode", None), "backend", "disabled")
    return "" if backend == "disabled" else "true, and decode replays CUDA graphs, in which nothing would be planned"


def v2(launch: Launch) -> str:
    """What DeepEP V2 is not planned with, or "". SGLang refuses the rest: other runners, overlaps, other models."""
    tried = experimental("v2")
    reasons = (
        (launch.flag("device") == "cpu", "on the CPU"),
        (launch.flag("nnodes", 1) > 1, "between hosts"),
        (launch.flag("deepep_v2_mode") == "hybrid" and not tried, "in hybrid mode, which no server has run"),
        (launch.quantization == "fp8" and not tried, "with FP8 blocks, which no server has run"),
        (launch.quantization not in (None, "fp8"), f"with {launch.quantization} experts"),
        (placed(launch), "with replicated or moved experts"),
        (launch.config.decode and not launch.config.is_off, "with --macs-decode true"),
        (launch.config.dispatch == "fused", "with --macs-dispatch fused"),
        (bool(launch.flag("speculative_algorithm")), "with speculative decoding"),
    )
    return next((words for refused, words in reasons if refused), "") if launch.flag("moe_a2a_backend") == V2 else ""


def bounded(launch: Launch) -> str:
    """What `--macs-dispatch bounded` cannot be had with here, or ""."""
    words = _unbounded(launch) if launch.config.dispatch == "bounded" else ""
    return f"bounded {words}" if words else ""


# Flags under which SGLang does not dispatch a batch as a whole, once a layer.
_DISPATCHES_OTHERWISE = {
    "enable_two_batch_overlap": "--enable-two-batch-overlap",
    "enable_single_batch_overlap": "--enable-single-batch-overlap",
    "speculative_algorithm": "speculative decoding",
}


def _unbounded(launch: Launch) -> str:
    """Why normal mode counts on the host, or ""."""
    recorder = launch.flag("expert_distribution_recorder_mode")  # others count before the dispatch
    reasons = (
        (launch.flag("device") == "cpu", "on the CPU"),
        (launch.flag("deepep_mode", "auto") == "low_latency", "with --deepep-mode low_latency"),
        (launch.flag("moe_runner_backend", "deep_gemm") != "deep_gemm", "with another runner than DeepGEMM's"),
        (launch.quantization not in (None, "fp8"), f"with {launch.quantization} experts"),
        *((bool(launch.flag(name)), f"with {words}") for name, words in _DISPATCHES_OTHERWISE.items()),
        (recorder in ("stat_approx", "per_token"), f"with --expert-distribution-recorder-mode {recorder}"),
        (bool(launch.flag("enable_deterministic_inference")), "with --enable-deterministic-inference"),
    )
    return next((words for refused, words in reasons if refused), "")


def resolved(launch: Launch) -> tuple[MacsConfig, str]:
    """The configuration with what `auto` cannot have here left out, or what no server has shown yet, and why, or ""."""
    config, tried = launch.config, experimental("auto")
    if launch.flag("moe_a2a_backend") == V2 and config.dispatch.startswith("auto"):
        words, all_reduce = _unbounded(launch), "group" if config.all_reduce == "auto" else config.all_reduce
        why = words or "what DeepEP V2 can be dispatched by"
        return replace(config, dispatch="deepep" if words else "bounded", all_reduce=all_reduce), why
    if config.dispatch.startswith("auto") and not tried and (why := _not_shown(launch)):
        all_reduce = "group" if config.all_reduce == "auto" else config.all_reduce
        return replace(config, dispatch="deepep", all_reduce=all_reduce), why
    if config.dispatch == "auto" and (why := _unbounded(launch)):
        return replace(config, dispatch="auto_fused"), why
    if config.dispatch == "auto" and launch.flag("deepep_mode", "auto") == "auto" and not tried:
        why = "no server has shown bounded prefills beside decode in low latency"
        return replace(config, dispatch="auto_fused"), why
    return config, ""


def _not_shown(launch: Launch) -> str:
    """With what no server has run on GPUs under a dispatch or an exchange of ours, or ""."""
    words = next((words for name, words in _DISPATCHES_OTHERWISE.items() if launch.flag(name)), "")
    return f"no server has shown others with {words}" if words else ""
