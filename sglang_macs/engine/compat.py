"""Which launches MACS can serve. One rule per line; each names the flag, why, and the way out.

Rules read a plain view of SGLang's resolved flags, so that they can be tested without SGLang.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from ..config import MacsConfig
from ..errors import MacsError
from . import families

A2A_BACKENDS = ("macs", "deepep")
V2 = "deepep_v2"  # only where the environment asks for it: it has not run on GPUs
V2_SINCE = (0, 5, 23)  # before 0.5.22 its prefills do not lie by expert; that one was tried with stand-ins alone
MOST_EXPERTS, MOST_TOP_K = 1024, 32  # of the kernels (csrc/include/macs/cuda.h)
EXPERIMENTAL_ENV = "MACS_EXPERIMENTAL"  # names what is not fit for service and is to be tried nevertheless


@dataclass(frozen=True)
class Launch:
    """What the rules look at: SGLang's resolved flags, the plan's options and what the model's configuration says.

    top_k: 0 where it does not say; inner: the architecture of its language model, "" likewise.
    special_routing: `moe_config.special_routing`. context_length: in tokens.
    quantization: of the weights, by flag or checkpoint.
    """

    flags: Any
    config: MacsConfig
    architecture: str
    num_experts: int
    top_k: int = 0
    special_routing: str = ""
    context_length: int = 0
    quantization: str | None = None
    inner: str = ""

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


def _if_routing_changes(condition: Callable[[Launch], bool], got: str) -> Callable[[Launch], str]:
    """For promises of other flags that hold as long as no assignment is moved or dropped."""
    return lambda launch: got if not launch.config.changes_nothing and condition(launch) else ""


def _on(*names: str) -> Callable[[Launch], bool]:
    return lambda launch: any(launch.flag(name) for name in names)


def _architecture(launch: Launch) -> str:
    if not launch.num_experts:
        return f"{launch.architecture}, which has no experts"
    return families.does_not_fit(launch.architecture, launch.inner)


def _untested(launch: Launch) -> str:
    if experimental("models"):
        return ""
    return families.untested(launch.architecture, launch.inner, launch.flag("device"))


def _sizes(launch: Launch) -> str:
    fits = launch.num_experts <= MOST_EXPERTS and launch.top_k <= MOST_TOP_K
    return "" if fits or launch.flag("device") == "cpu" else f"{launch.num_experts} experts, top-{launch.top_k}"


def _expert_parallel(launch: Launch) -> str:
    tp, ep = launch.flag("tp_size", 1), launch.flag("ep_size", 1)
    if ep != tp:
        return f"tp {tp}, ep {ep}"
    if ep == 1 and launch.config.scope == "rank" and not launch.config.is_off:
        return "one rank, which has nothing to balance (scope rank)"
    if ep == 1 and launch.flag("device") == "cuda" and launch.flag("deepep_mode") != "low_latency":
        return "one rank, which DeepEP's normal mode does not take (use --deepep-mode low_latency)"
    experts = launch.num_experts + (launch.flag("ep_num_redundant_experts") or 0)
    return f"{experts} experts on {ep} ranks" if experts % ep else ""


def _placed(launch: Launch) -> bool:
    """Whether experts do not, or not for long, lie linearly and once each."""
    moved = (launch.flag("init_expert_location") or "trivial") != "trivial"
    return moved or any(launch.flag(name) for name in ("enable_eplb", "ep_num_redundant_experts"))


def _exact_cache(launch: Launch) -> str:
    """Why what was clipped cannot be kept out of the prefix cache: some ranks would insert what others do not."""
    if launch.config.cache == "clipped" or launch.config.changes_nothing:
        return ""
    if launch.flag("pp_size", 1) > 1:
        return f"--pp-size {launch.flag('pp_size')}, stages that do not know what others clipped"
    if launch.flag("disaggregation_mode", "null") not in (None, "null"):
        return f"--disaggregation-mode {launch.flag('disaggregation_mode')}, keys and values that are sent on"
    return "speculative decoding" if launch.flag("speculative_algorithm") else ""


def experimental(name: str) -> bool:
    """Whether the environment asks for what is not fit for service."""
    return name in os.environ.get(EXPERIMENTAL_ENV, "").split(",")


def replicas_on(device: object) -> bool:
    """Whether plans know replicas there: on GPUs, no server with them has been measured."""
    return device == "cpu" or experimental("replicas")


def _balances(launch: Launch) -> bool:
    """Whether plans choose among replicas, by logical expert."""
    config = launch.config
    known = replicas_on(launch.flag("device"))
    return _placed(launch) and known and config.replicas == "balance" and not config.is_off


def _unknown(condition: Callable[[Launch], bool], got: str) -> Callable[[Launch], str]:
    """For replicas where plans do not know them."""
    return lambda launch: got if not replicas_on(launch.flag("device")) and condition(launch) else ""


def _dispatch_algorithm(launch: Launch) -> str:
    algorithm = launch.flag("ep_dispatch_algorithm")
    if algorithm == "lp":
        return "lp, which solves for every batch what MACS solves itself"
    known = replicas_on(launch.flag("device"))
    if not algorithm or launch.config.changes_nothing or (known and algorithm != "fake"):
        return ""
    return f"{algorithm}, experts that the router did not choose" if known else "physical experts"


def _choice_of_replicas(launch: Launch) -> str:
    config = launch.config
    if _balances(launch):
        return config.no_replicas
    if not _placed(launch) or config.is_off:
        return ""
    if config.reroute != "none" and not config.changes_nothing:
        return f"keep with --macs-reroute {config.reroute}, which knows no replicas"
    return "keep with --macs-profile, which knows no replicas" if config.profile else ""


def _overlap(launch: Launch) -> str:
    for name in ("enable_two_batch_overlap", "enable_single_batch_overlap"):
        if launch.flag(name) and launch.flag("device") == "cpu":
            return f"--{name.replace('_', '-')} on the CPU, whose dispatcher sends and waits in one"
    return ""


def _routing(launch: Launch) -> str:
    if launch.config.reroute == "none" or launch.config.changes_nothing or not launch.special_routing:
        return ""
    return f"{launch.config.reroute} for {launch.architecture}, which routes by {launch.special_routing}"


def attention_dp(launch: Launch) -> int:
    """Data-parallel ranks of the EP group's attention."""
    ranks = launch.flag("dp_size", 1) if launch.flag("enable_dp_attention") else 1
    return launch.flag("attn_dp_size") or ranks  # the former from 0.5.22 on


def _vision_tower(launch: Launch) -> str:
    """Attention-DP ranks have requests of their own: one with a picture would wait for others that have none."""
    for name, alone in families.TOWERS_OVER_ALL_RANKS.items():
        if launch.architecture.startswith(name) and attention_dp(launch) > 1 and not (alone and launch.flag(alone)):
            return f"{launch.architecture}, whose vision tower waits for ranks without a picture"
    return ""


def _stages(launch: Launch) -> str:
    shares = launch.flag("tp_size", 1) // attention_dp(launch)
    if launch.flag("pp_size", 1) == 1 or shares == 1:
        return ""
    return f"{launch.flag('pp_size')} stages whose batches are each scattered over {shares} ranks"


def largest_prefill(launch: Launch) -> tuple[int, int]:
    """(data-parallel ranks of the EP group, tokens that SGLang puts at most into a prefill batch of each).

    SGLang has divided --chunked-prefill-size by the ranks already; without chunks a request is not split.
    """
    ranks = attention_dp(launch)
    chunk = launch.flag("chunked_prefill_size") or -1
    return ranks, chunk if chunk > 0 else max(launch.flag("max_prefill_tokens") or 0, launch.context_length)


def _prefill(launch: Launch) -> str:
    from ..plan.plan import most_tokens  # imports torch, which `sglang-macs doctor` may find missing

    (ranks, tokens), most = (
        largest_prefill(launch),
        most_tokens(max(1, launch.top_k), launch.config.load, _balances(launch)),
    )
    return f"{ranks * tokens} tokens a prefill batch ({ranks} x {tokens})" if ranks * tokens > most else ""


def _disaggregated(launch: Launch) -> str:
    mode = launch.flag("disaggregation_mode", "null")
    if mode in (None, "null") or launch.config.changes_nothing:
        return ""
    if mode == "decode" and not launch.config.decode:
        return "decode, which has no prefill batches to act on"
    return "" if experimental("disaggregation") else f"{mode}: no such pair has been served with MACS"


def _replicas(launch: Launch) -> str:
    alone = not launch.flag("enable_dp_attention") and (launch.flag("attn_dp_size") or 1) == 1
    replicas = launch.flag("dp_size") or 1
    return f"{replicas} replicas" if alone and replicas > 1 else ""


def _fused(launch: Launch) -> str:
    if launch.config.dispatch != "fused":
        return ""
    if launch.flag("device") == "cpu":
        return "fused on the CPU"
    if launch.flag("enable_single_batch_overlap"):
        return "fused with --enable-single-batch-overlap, whose combine starts inside the experts' GEMM"
    if launch.config.exchange != "group":
        return "fused with --macs-exchange local"
    return "--deepep-mode normal" if launch.flag("deepep_mode", "auto") == "normal" else ""


def _decode_in_graphs(launch: Launch) -> str:
    """A decode graph is captured once, before there is a batch that could be planned."""
    config = launch.config
    if config.is_off or not config.decode or launch.flag("device") != "cuda" or launch.flag("deepep_mode") == "normal":
        return ""
    graphs = launch.flag("cuda_graph_config")  # as SGLang has resolved it; with --deepep-mode normal it captures none
    backend = getattr(getattr(graphs, "decode", None), "backend", "disabled")
    return "" if backend == "disabled" else "true, and decode replays CUDA graphs, in which nothing would be planned"


def _v2(launch: Launch) -> str:
    """What DeepEP V2 is not planned with, or "". SGLang refuses the rest: other runners, overlaps, other models."""
    reasons = (
        (launch.flag("device") == "cpu", "on the CPU"),
        (launch.flag("nnodes", 1) > 1, "between hosts"),
        (launch.quantization not in (None, "fp8"), f"with {launch.quantization} experts"),
        (_placed(launch), "with replicated or moved experts"),
        (launch.config.decode and not launch.config.is_off, "with --macs-decode true"),
        (launch.config.dispatch == "fused", "with --macs-dispatch fused"),
        (bool(launch.flag("speculative_algorithm")), "with speculative decoding"),
    )
    return next((words for refused, words in reasons if refused), "") if launch.flag("moe_a2a_backend") == V2 else ""


def _bounded(launch: Launch) -> str:
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
        return replace(
            config, dispatch="auto_fused"
        ), "no server has shown bounded prefills beside decode in low latency"
    return config, ""


def _not_shown(launch: Launch) -> str:
    """With what no server has run on GPUs under a dispatch or an exchange of ours, or ""."""
    words = next((words for name, words in _DISPATCHES_OTHERWISE.items() if launch.flag(name)), "")
    return f"no server has shown others with {words}" if words else ""


_LEAVE_OUT = "Leave it out, or pass --macs-preset off."

RULES = (
    Rule("--use-ray", _if(_on("use_ray"), "Ray actors"), "schedulers that load plugins", "Leave it out."),
    Rule(
        "--smg-grpc-mode",
        _if(_on("smg_grpc_mode", "grpc_mode"), "a gRPC server that starts schedulers in its own way"),
        "schedulers that load plugins",
        "Use --grpc-port, which stands beside the HTTP server.",
    ),
    Rule("--encoder-only", _if(_on("encoder_only"), "an encoder server"), "MoE layers", "Serve it without MACS."),
    Rule("model", _architecture, "a mixture-of-experts model that dispatches", "Serve it without --enable-macs."),
    Rule(
        "model",
        _untested,
        "one that tests have served (docs/guide/compatibility.md)",
        f"Serve it without --enable-macs; {EXPERIMENTAL_ENV}=models tries it nevertheless.",
    ),
    Rule("model", _sizes, f"at most {MOST_EXPERTS} experts and top-{MOST_TOP_K} on a GPU", "Serve it without MACS."),
    Rule(
        "expert parallelism",
        _expert_parallel,
        "ep equal to tp, dividing the experts",
        "Pass --tp N --ep-size N, on one GPU --macs-scope expert.",
    ),
    Rule(
        "--enable-dp-attention",
        _vision_tower,
        "a vision tower that runs on one rank",
        "Leave it out; GLM can be served with --mm-enable-dp-encoder instead.",
    ),
    Rule(
        "--macs-reroute",
        _routing,
        "none: nobody knows what such a router would choose next",
        "Pass --macs-reroute none.",
    ),
    Rule(
        "--chunked-prefill-size",
        _prefill,
        "a prefill batch of the EP group whose load histograms hold in 32 bits (docs/design/method.md, 3)",
        "Lower it.",
    ),
    Rule(
        "--disaggregation-mode",
        _disaggregated,
        "none",
        f"Serve this side without MACS; {EXPERIMENTAL_ENV}=disaggregation tries it nevertheless.",
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
        "--pp-size",
        _stages,
        "a batch to itself for every rank: SGLang hands one rank's rows to the next stage as if all ranks had them",
        "Pass --dp equal to --tp, with --enable-dp-attention.",
    ),
    Rule(
        "--elastic-ep-backend",
        _if(
            lambda x: any(x.flag(name) is not None for name in ("elastic_ep_backend", "ep_join_mode", "max_ep_size")),
            "elastic EP",
        ),
        "none",
        "Leave it out.",
    ),
    Rule(
        "--dp-size",
        _replicas,
        "one server: replicas with an all-to-all backend end in their schedulers' first round (SGLang to 0.5.23)",
        "Add --enable-dp-attention, or start a server a replica behind SGLang's router.",
    ),
    Rule("--dwdp-size", _if(lambda x: (x.flag("dwdp_size") or 1) > 1, "DWDP"), "none", "Leave it out."),
    Rule(
        "--enable-waterfill",
        _if(_on("enable_waterfill"), "Waterfill"),
        "none: its shared-expert column must not be clipped",
        "Leave it out.",
    ),
    Rule(
        "--enable-eplb, redundant experts",
        _unknown(_on("enable_eplb", "ep_num_redundant_experts"), "replicated experts on a GPU"),
        "experts in their own order: on GPUs, plans with replicas have not been measured",
        f"Leave EPLB out; {EXPERIMENTAL_ENV}=replicas tries it nevertheless.",
    ),
    Rule(
        "--enable-eplb",
        _if(
            lambda x: (
                bool(x.flag("enable_eplb")) and x.flag("device") == "cuda" and x.flag("deepep_mode", "auto") == "auto"
            ),
            "--deepep-mode auto, for which SGLang has no recorder of loads",
        ),
        "normal or low_latency",
        "Pass --deepep-mode normal.",
    ),
    Rule(
        "--init-expert-location",
        _unknown(lambda x: not x.config.changes_nothing and _placed(x), "moved experts on a GPU"),
        "trivial: router logits and profiles count experts in the model's own order",
        _LEAVE_OUT,
    ),
    Rule(
        "--ep-dispatch-algorithm",
        _dispatch_algorithm,
        "none: router logits and profiles count experts in the model's own order",
        _LEAVE_OUT,
    ),
    Rule(
        "--macs-replicas",
        _choice_of_replicas,
        "balance with --macs-scope rank, --macs-load rows and --macs-exchange group, or keep with --macs-reroute none",
        "Pass these.",
    ),
    Rule(
        "--moe-a2a-backend deepep_v2",
        _v2,
        "one host, experts in their own order in bf16 or FP8 blocks, and prefills alone planned",
        "Pass --moe-a2a-backend macs.",
    ),
    Rule(
        "--enforce-shared-experts-fusion",
        _if(_on("enforce_shared_experts_fusion"), "fused shared experts"),
        "shared experts of their own: a fused one must not be clipped",
        "Leave it out.",
    ),
    Rule(
        "--enable-deterministic-inference",
        _if(
            lambda x: (
                _on("enable_deterministic_inference", "rl_on_policy_target")(x)
                and (not x.config.changes_nothing or _balances(x))
            ),
            "batch-invariant answers",
        ),
        "answers that may depend on what else is in the batch",
        _LEAVE_OUT,
    ),
    Rule(
        "--enable-return-routed-experts",
        _if_routing_changes(_on("enable_return_routed_experts"), "experts noted before MACS re-routes and drops"),
        "none",
        _LEAVE_OUT,
    ),
    Rule(
        "--expert-distribution-recorder-mode",
        _if_routing_changes(
            lambda x: x.flag("expert_distribution_recorder_mode") == "stat_approx",
            "stat_approx, loads counted behind the dispatch, where MACS has cut them",
        ),
        "loads as the router asked for them (stat, per_pass or per_token)",
        _LEAVE_OUT,
    ),
    Rule(
        "--enable-pdmux",
        _if_routing_changes(_on("enable_pdmux"), "prefill split by layers"),
        "prefill in one pass: later parts no longer know which tokens are visual",
        _LEAVE_OUT,
    ),
    Rule(
        "--dllm-algorithm",
        _if_routing_changes(_on("dllm_algorithm"), "a diffusion model, which decodes by prefill passes"),
        "decoding that is told from prefill",
        _LEAVE_OUT,
    ),
    Rule(
        "--kt-weight-path",
        _if_routing_changes(_on("kt_weight_path"), "experts computed on the CPU beside the GPU"),
        "ranks whose time follows from their rows",
        _LEAVE_OUT,
    ),
    Rule("overlap", _overlap, "none on the CPU", "Leave it out."),
    Rule(
        "--macs-dispatch",
        _fused,
        "fused only with --deepep-mode auto or low_latency, --macs-exchange group and CUDA",
        "Or pass --macs-dispatch deepep.",
    ),
    Rule("--macs-decode", _decode_in_graphs, "no CUDA graphs", "Add --disable-cuda-graph, or leave it out."),
    Rule(
        "--macs-dispatch",
        _bounded,
        "bounded only in DeepEP's normal mode, whole batches, with DeepGEMM's runner in bf16 or FP8 blocks",
        "Or pass --macs-dispatch deepep.",
    ),
    Rule(
        "--macs-cache",
        _exact_cache,
        "exact only where a request's whole prefill runs in one scheduler's passes",
        "Or pass --macs-cache clipped.",
    ),
    Rule("--enable-lora", _if(_on("enable_lora"), "LoRA"), "none on MoE layers", "Leave it out."),
)


def has_v2(release: str) -> bool:
    """Whether that release of SGLang has the V2 that is planned."""
    return tuple(map(int, re.findall(r"\d+", release)[:3])) >= V2_SINCE


def check_a2a(backend: str) -> None:
    """Raises MacsError unless the asked-for all-to-all backend is one that MACS plans for."""
    if backend == V2 and not has_v2(found := version("sglang")):
        since = ".".join(map(str, V2_SINCE))
        fix = f"Pass --moe-a2a-backend macs, or install sglang=={since}."
        raise MacsError("--moe-a2a-backend", f"{V2} of sglang {found}", f"V2 of sglang {since} or later", fix)
    if backend == V2 and not experimental("v2"):
        expected, fix = "macs or deepep: V2 has not run under MACS", f"{EXPERIMENTAL_ENV}=v2 tries it nevertheless."
        raise MacsError("--moe-a2a-backend", V2, expected, fix)
    if backend not in (*A2A_BACKENDS, V2):
        raise MacsError(
            "--moe-a2a-backend", repr(backend), "macs or deepep with --enable-macs", "Pass --moe-a2a-backend macs."
        )


def check(launch: Launch) -> None:
    """Raises MacsError for the first rule that refuses this launch."""
    for rule in RULES:
        if got := rule.refuses(launch):
            raise MacsError(rule.what, got, f"{rule.expected} (MACS)", rule.fix)


PARALLEL_FLAGS = (
    "tp_size",
    "dp_size",
    "ep_size",
    "pp_size",
    "attn_dp_size",
    "enable_dp_attention",
    "enable_dp_lm_head",
    "moe_dense_tp_size",
    "enable_two_batch_overlap",
    "enable_mixed_chunk",
)


def parallel_flags(flags: Any) -> str:
    """Those of a launch that say how ranks share their work, as they are set."""
    given = {name: getattr(flags, name, None) for name in PARALLEL_FLAGS}
    return " ".join(
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value not in (None, False)
    )
