"""Launches that MACS refuses, one by one, and those that it takes. No SGLang needed."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sglang_macs.config import MacsConfig
from sglang_macs.engine import compat
from sglang_macs.engine.launch import EXPERIMENTAL_ENV, Launch, largest_prefill
from sglang_macs.errors import MacsError
from tests.support.launches import launch


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"dp_size": 2, "enable_dp_attention": True},
        {"dp_size": 2, "attn_dp_size": 2},
        {"tp_size": 8, "ep_size": 8},
        {"dwdp_size": None},
    ],
    ids=str,
)
def test_plain_expert_parallel_launches_are_taken(flags):
    compat.check(launch(**flags))


def test_one_rank_is_taken_only_where_experts_are_bounded():
    one = SimpleNamespace(tp_size=1, ep_size=1)
    for preset in ("paper", "cai", "off"):
        compat.check(Launch(one, MacsConfig.from_preset(preset), "Qwen3VLMoeForConditionalGeneration", 16))
    on_gpu = SimpleNamespace(tp_size=1, ep_size=1, device="cuda", deepep_mode="auto")
    with pytest.raises(MacsError, match="--deepep-mode low_latency"):
        compat.check(Launch(on_gpu, MacsConfig.from_preset("paper"), "Qwen3VLMoeForConditionalGeneration", 16))
    on_gpu.deepep_mode = "low_latency"
    compat.check(Launch(on_gpu, MacsConfig.from_preset("paper"), "Qwen3VLMoeForConditionalGeneration", 16))
    with pytest.raises(MacsError, match="nothing to balance"):
        compat.check(Launch(one, MacsConfig.from_preset(), "Qwen3VLMoeForConditionalGeneration", 16))


@pytest.mark.parametrize(
    "flags",
    [
        {"tp_size": 1, "ep_size": 1},
        {"tp_size": 4, "ep_size": 2},
        {"tp_size": 3, "ep_size": 3},  # 16 experts
        {"enable_prefill_cp": True},
        {"attn_cp_size": 2},
        {"elastic_ep_backend": "mooncake"},
        {"dp_size": 2},
        {"dwdp_size": 2},
        {"enable_waterfill": True},
        {"enable_eplb": True},
        {"ep_num_redundant_experts": 2},
        {"ep_dispatch_algorithm": "lp"},
        {"enforce_shared_experts_fusion": True},
        {"enable_lora": True},
        {"use_ray": True},
        {"smg_grpc_mode": True},
        {"grpc_mode": True},
        {"encoder_only": True},
        {"max_ep_size": 4},
        {"enable_two_batch_overlap": True, "device": "cpu"},
        {"enable_single_batch_overlap": True, "device": "cpu"},
        {"pp_size": 2},
        {"pp_size": 2, "tp_size": 4, "ep_size": 4, "dp_size": 2, "enable_dp_attention": True},
        {"pp_size": 2, "attn_dp_size": 1},
    ],
    ids=str,
)
def test_flags_that_rule_macs_out_are_refused_in_one_line(flags):
    with pytest.raises(MacsError) as caught:
        compat.check(launch(**flags))
    assert "(MACS)" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dp", [{"dp_size": 2, "enable_dp_attention": True}, {"attn_dp_size": 2}], ids=str)
@pytest.mark.parametrize("architecture", ["InternVLChatModel", "Glm4vMoeForConditionalGeneration"])
def test_towers_that_wait_for_all_ranks_are_served_where_all_have_the_picture(architecture, dp):
    compat.check(launch(architecture))
    with pytest.raises(MacsError, match=f"--enable-dp-attention: got {architecture}, whose vision tower waits"):
        compat.check(launch(architecture, **dp))


def test_a_tower_that_stays_on_its_rank_is_served_there():
    dp = {"dp_size": 2, "enable_dp_attention": True, "mm_enable_dp_encoder": True}
    compat.check(launch("Glm4vMoeForConditionalGeneration", **dp))
    with pytest.raises(MacsError, match="InternVLChatModel"):
        compat.check(launch("InternVLChatModel", **dp))
    compat.check(launch(**{**dp, "mm_enable_dp_encoder": False}))


# What these promise holds as long as MACS moves and drops nothing.
PROMISES = [
    {"enable_deterministic_inference": True},
    {"rl_on_policy_target": "fsdp"},
    {"enable_return_routed_experts": True},
    {"init_expert_location": "/moved.json"},
    {"ep_dispatch_algorithm": "static"},
    {"ep_dispatch_algorithm": "dynamic"},
    {"ep_dispatch_algorithm": "fake"},
    {"expert_distribution_recorder_mode": "stat_approx"},
    {"enable_pdmux": True},
    {"dllm_algorithm": "LowConfidence"},
    {"kt_weight_path": "/weights"},
    {"disaggregation_mode": "decode"},
    {"disaggregation_mode": "prefill"},
]


@pytest.mark.parametrize("flags", PROMISES, ids=str)
def test_promises_of_other_flags_are_kept_or_the_launch_is_refused(flags):
    with pytest.raises(MacsError) as caught:
        compat.check(launch(**flags))
    assert "(MACS)" in str(caught.value) and "\n" not in str(caught.value)
    for options in ({"preset": "off"}, {"gamma": math.inf}):
        config = MacsConfig.from_preset(**options)
        compat.check(replace(launch(**flags), config=config))


@pytest.mark.parametrize(
    "flags",
    [
        {"init_expert_location": "trivial", "ep_dispatch_algorithm": None},
        {"expert_distribution_recorder_mode": "stat", "deepep_mode": "normal"},
        {"expert_distribution_recorder_mode": "stat", "deepep_mode": "low_latency"},
        {"disaggregation_mode": "null"},
        {"enable_hierarchical_cache": True},
        {"enable_two_batch_overlap": True, "device": "cuda"},
        {"pp_size": 2, "dp_size": 2, "enable_dp_attention": True},
        {"pp_size": 2, "attn_dp_size": 2},
    ],
    ids=str,
)
def test_flags_beside_which_macs_acts_are_taken(flags):
    compat.check(launch(**flags))


ON_CPU = {"device": "cpu", "ep_dispatch_algorithm": "static"}
PLACED = [{"enable_eplb": True}, {"ep_num_redundant_experts": 4}, {"init_expert_location": "/loads.json"}]


@pytest.mark.parametrize("flags", PLACED, ids=str)
def test_experts_that_move_or_have_replicas_are_served_on_a_cpu(flags):
    flags = {**ON_CPU, **flags}
    compat.check(launch(**flags))
    for options in (
        {"preset": "off"},
        {"gamma": math.inf},
        {"replicas": "keep", "reroute": "none"},
        {"replicas": "keep", "gamma": math.inf},
        {"preset": "paper", "replicas": "keep", "reroute": "none"},
    ):
        compat.check(replace(launch(**flags), config=MacsConfig.from_preset(**options)))


@pytest.mark.parametrize("flags", PLACED, ids=str)
@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"scope": "expert"}, "--macs-scope expert"),
        ({"load": "effective"}, "--macs-load effective"),
        ({"exchange": "local"}, "--macs-exchange local"),
        ({"reroute": "local"}, "--macs-reroute local"),
        ({"preset": "paper", "gamma": math.inf}, "--macs-scope expert"),
        ({"replicas": "keep"}, "keep with --macs-reroute global"),
        ({"replicas": "keep", "reroute": "none", "profile": "/p.json"}, "keep with --macs-profile"),
    ],
    ids=str,
)
def test_options_that_replicas_do_not_go_with_are_refused(flags, options, got):
    config = MacsConfig.from_preset(**options)
    with pytest.raises(MacsError, match=f"--macs-replicas: got {got}"):
        compat.check(replace(launch(**ON_CPU, **flags), config=config))
    compat.check(replace(launch(**ON_CPU), config=config))


@pytest.mark.parametrize("flags", PLACED, ids=str)
def test_on_gpus_replicas_are_served_in_normal_mode_and_elsewhere_on_request(monkeypatch, flags):
    flags = {"device": "cuda", "deepep_mode": "normal", **flags}
    compat.check(launch(**flags))
    for mode in ("low_latency", "auto"):
        with pytest.raises(MacsError, match="on a GPU"):
            compat.check(launch(**{**flags, "deepep_mode": mode}))
    monkeypatch.setenv(EXPERIMENTAL_ENV, "replicas")
    compat.check(launch(**flags, ep_dispatch_algorithm="static"))
    for dispatch, mode in (("fused", "low_latency"), ("bounded", "normal"), ("auto", "normal")):
        config = MacsConfig.from_preset(dispatch=dispatch, gamma=math.inf)
        compat.check(replace(launch(**{**flags, "deepep_mode": mode}), config=config))


@pytest.mark.parametrize("options", [{"preset": "off"}, {"gamma": math.inf}], ids=str)
def test_moved_experts_are_served_on_gpus_where_nothing_changes(options):
    """By any dispatch: physical experts are experts to it."""
    flags = {"device": "cuda", "deepep_mode": "low_latency", "init_expert_location": "/loads.json"}
    for dispatch in ("deepep", "fused"):
        config = MacsConfig.from_preset(dispatch=dispatch, **options)
        compat.check(replace(launch(**flags, ep_dispatch_algorithm="static"), config=config))


def test_eplb_needs_a_mode_of_deepep_that_its_recorder_knows(monkeypatch):
    monkeypatch.setenv(EXPERIMENTAL_ENV, "replicas")
    for mode in ({}, {"deepep_mode": "auto"}):
        with pytest.raises(MacsError, match="--enable-eplb: got --deepep-mode auto"):
            compat.check(launch(device="cuda", enable_eplb=True, **mode))


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_eplb_counts_what_was_asked_for(monkeypatch, mode):
    """What arrives in low-latency mode, and what was given up before (engine/replicas.py)."""
    monkeypatch.setenv(EXPERIMENTAL_ENV, "replicas")
    flags = {"device": "cuda", "enable_eplb": True, "expert_distribution_recorder_mode": "stat"}
    compat.check(launch(**flags, deepep_mode=mode))


def test_copies_are_divided_among_the_ranks():
    compat.check(launch(num_experts=15, **ON_CPU, ep_num_redundant_experts=3))
    with pytest.raises(MacsError, match="18 experts on 4 ranks"):
        compat.check(launch(num_experts=15, **ON_CPU, ep_num_redundant_experts=3, tp_size=4, ep_size=4))


@pytest.mark.parametrize(("algorithm", "options"), [("lp", {}), ("lp", {"gamma": math.inf}), ("fake", {})])
def test_replicas_that_are_not_the_router_s_are_refused(algorithm, options):
    flags = {**ON_CPU, "enable_eplb": True, "ep_dispatch_algorithm": algorithm}
    with pytest.raises(MacsError, match=f"--ep-dispatch-algorithm: got {algorithm}"):
        compat.check(replace(launch(**flags), config=MacsConfig.from_preset(**options)))


def test_lossless_balancing_is_not_batch_invariant():
    """Which rank's partial sum an output is in depends on the batch."""
    config = MacsConfig.from_preset(gamma=math.inf)
    deterministic = {"enable_deterministic_inference": True}
    compat.check(replace(launch(**ON_CPU, **deterministic), config=config))
    with pytest.raises(MacsError, match="batch-invariant answers"):
        compat.check(replace(launch(**ON_CPU, **deterministic, enable_eplb=True), config=config))


def test_disaggregation_is_tried_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv(EXPERIMENTAL_ENV, "disaggregation")
    compat.check(launch(disaggregation_mode="prefill"))
    compat.check(replace(launch(disaggregation_mode="decode"), config=MacsConfig.from_preset(decode=True)))
    with pytest.raises(MacsError, match="no prefill batches to act on"):
        compat.check(launch(disaggregation_mode="decode"))


@pytest.mark.parametrize(
    ("flags", "ranks", "tokens"),
    [
        ({"chunked_prefill_size": 8192}, 1, 8192),
        ({"chunked_prefill_size": 8192, "dp_size": 4}, 1, 8192),  # four groups of their own
        ({"chunked_prefill_size": 2048, "dp_size": 4, "enable_dp_attention": True}, 4, 2048),
        ({"chunked_prefill_size": 2048, "dp_size": 1, "attn_dp_size": 4, "enable_dp_attention": True}, 4, 2048),
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 16384}, 1, 32768),
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 65536}, 1, 65536),
    ],
    ids=str,
)
def test_the_largest_prefill_batch_is_what_sglang_may_schedule(flags, ranks, tokens):
    assert largest_prefill(replace(launch(**flags), context_length=32768)) == (ranks, tokens)


def test_a_prefill_batch_beyond_the_histograms_is_refused_at_the_launch():
    ep = {"tp_size": 64, "ep_size": 64, "dp_size": 64, "enable_dp_attention": True, "chunked_prefill_size": 16384}
    one = replace(launch(num_experts=128, **ep), top_k=8)
    compat.check(one)  # 1,048,576 tokens, counted in rows
    with pytest.raises(MacsError, match=r"1048576 tokens a prefill batch \(64 x 16384\)"):
        compat.check(replace(one, config=MacsConfig.from_preset("paper")))


@pytest.mark.parametrize("reroute", ["local", "global"])
def test_re_routing_is_refused_where_it_cannot_follow_the_router(reroute):
    biased = replace(launch(), special_routing="a routing function of the model's own")
    compat.check(replace(biased, config=MacsConfig.from_preset(reroute="none")))
    compat.check(replace(biased, config=MacsConfig.from_preset(reroute=reroute, gamma=math.inf)))
    with pytest.raises(MacsError, match=r"a routing function of the model's own.* Pass --macs-reroute none\."):
        compat.check(replace(biased, config=MacsConfig.from_preset(reroute=reroute)))


@pytest.mark.parametrize(("experts", "top_k"), [(1024, 32), (1032, 8), (896, 40)])
def test_more_than_the_kernels_take_is_refused_on_a_gpu(experts, top_k):
    cpu = replace(launch(num_experts=experts, device="cpu"), top_k=top_k)
    gpu = replace(launch(num_experts=experts, device="cuda", deepep_mode="low_latency"), top_k=top_k)
    compat.check(cpu)
    if experts <= 1024 and top_k <= 32:
        compat.check(gpu)
        return
    with pytest.raises(MacsError, match=f"{experts} experts, top-{top_k}, expected at most 1024 experts and top-32"):
        compat.check(gpu)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pp_size": 2, "dp_size": 2, "enable_dp_attention": True}, "--pp-size 2"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_exact_cache_is_refused_where_ranks_would_not_insert_alike(monkeypatch, flags, words):
    monkeypatch.setenv(EXPERIMENTAL_ENV, "disaggregation")
    flags = launch(**flags).flags
    for options in ({"cache": "clipped"}, {"cache": "exact", "gamma": math.inf}, {"cache": "exact", "preset": "off"}):
        compat.check(replace(launch(), flags=flags, config=MacsConfig.from_preset(**options)))
    with pytest.raises(MacsError, match=f"--macs-cache: got {words}.*--macs-cache clipped"):
        compat.check(replace(launch(), flags=flags, config=MacsConfig.from_preset(cache="exact")))


@pytest.mark.parametrize(
    ("architecture", "experts"),
    [
        ("Llama4ForConditionalGeneration", 16),
        ("Ernie4_5_VLMoeForConditionalGeneration", 64),
        ("GptOssForCausalLM", 32),
        ("MixtralForCausalLM", 8),
        ("Qwen3ForCausalLM", 0),
    ],
)
def test_models_that_macs_cannot_serve_are_refused(monkeypatch, architecture, experts):
    monkeypatch.setenv(EXPERIMENTAL_ENV, "models")
    with pytest.raises(MacsError, match=architecture):
        compat.check(launch(architecture, experts))


@pytest.mark.parametrize("backend", ["none", "mooncake", "nixl", "flashinfer", "pplx"])
def test_other_all_to_all_backends_are_refused(backend):
    with pytest.raises(MacsError, match="--moe-a2a-backend"):
        compat.check_a2a(backend)
