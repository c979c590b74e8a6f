"""Which launches MACS can serve. One rule per line; each names the flag, why, and the way out.

Conditions of one flag stand here; those of dispatches and of replicas, which share facts, in modules of their own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from ..errors import MacsError
from . import dispatch_choice, families, placement
from .launch import EXPERIMENTAL_ENV, V2, Launch, attention_dp, experimental, largest_prefill

A2A_BACKENDS = ("macs", "deepep")
V2_SINCE = (0, 5, 23)  # before 0.5.22 its prefills do not lie by expert; that one was tried with stand-ins alone
MOST_EXPERTS, MOST_TOP_K = 1024, 32  # of the kernels (csrc/include/macs/cuda.h)


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


def _exact_cache(launch: Launch) -> str:
    """Why what was clipped cannot be kept out of the prefix cache: some ranks would insert what others do not."""
    if launch.config.cache == "clipped" or launch.config.changes_nothing:
        return ""
    if launch.flag("pp_size", 1) > 1:
        return f"--pp-size {launch.flag('pp_size')}, stages that do not know what others clipped"
    if launch.flag("disaggregation_mode", "null") not in (None, "null"):
        return f"--disaggregation-mode {launch.flag('disaggregation_mode')}, keys and values that are sent on"
    return "speculative decoding" if launch.flag("speculative_algorithm") else ""


def _routing(launch: Launch) -> str:
    if launch.config.reroute == "none" or launch.config.changes_nothing or not launch.special_routing:
        return ""
    return f"{launch.config.reroute} for {launch.architecture}, which routes by {launch.special_routing}"


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


def _prefill(launch: Launch) -> str:
    from ..plan.plan import most_tokens  # imports torch, which `sglang-macs doctor` may find missing

    ranks, tokens = largest_prefill(launch)
    most = most_tokens(max(1, launch.top_k), launch.config.load, placement.balances(launch))
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
        placement.where_unknown(_on("enable_eplb", "ep_num_redundant_experts"), "replicated experts on a GPU"),
        "--deepep-mode normal: on GPUs, plans with replicas have been measured there alone",
        f"Pass it, or leave EPLB out; {EXPERIMENTAL_ENV}=replicas tries it nevertheless.",
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
        placement.where_unknown(
            lambda x: not x.config.changes_nothing and placement.placed(x), "moved experts on a GPU"
        ),
        "trivial, or --deepep-mode normal: elsewhere on GPUs experts are counted in the model's own order",
        _LEAVE_OUT,
    ),
    Rule(
        "--ep-dispatch-algorithm",
        placement.dispatch_algorithm,
        "none: router logits and profiles count experts in the model's own order",
        _LEAVE_OUT,
    ),
    Rule(
        "--macs-replicas",
        placement.choice_of_replicas,
        "balance with --macs-scope rank, --macs-load rows and --macs-exchange group, or keep with --macs-reroute none",
        "Pass these.",
    ),
    Rule(
        "--moe-a2a-backend deepep_v2",
        dispatch_choice.v2,
        "one host, --deepep-v2-mode direct, experts in their own order in bf16, and prefills alone planned",
        f"Pass --moe-a2a-backend macs; {EXPERIMENTAL_ENV}=v2 tries hybrid mode and FP8 blocks nevertheless.",
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
                and (not x.config.changes_nothing or placement.balances(x))
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
    Rule("overlap", dispatch_choice.overlap, "none on the CPU", "Leave it out."),
    Rule(
        "--macs-dispatch",
        dispatch_choice.fused,
        "fused only with --deepep-mode auto or low_latency, --macs-exchange group and CUDA",
        "Or pass --macs-dispatch deepep.",
    ),
    Rule(
        "--macs-decode",
        dispatch_choice.decode_in_graphs,
        "no CUDA graphs",
        "Add --disable-cuda-graph, or leave it out.",
    ),
    Rule(
        "--macs-dispatch",
        dispatch_choice.bounded,
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
    if backend not in (*A2A_BACKENDS, V2):
        raise MacsError(
            "--moe-a2a-backend", repr(backend), "macs or deepep with --enable-macs", "Pass --moe-a2a-backend macs."
        )


def check(launch: Launch) -> None:
    """Raises MacsError for the first rule that refuses this launch."""
    for rule in RULES:
        if got := rule.refuses(launch):
            raise MacsError(rule.what, got, f"{rule.expected} (MACS)", rule.fix)
