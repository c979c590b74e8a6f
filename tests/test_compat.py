"""Launches that MACS refuses, one by one, and those that it takes. No SGLang needed."""

from types import SimpleNamespace

import pytest

from sglang_macs import compat
from sglang_macs.config import MacsConfig
from sglang_macs.errors import MacsError

GOOD = {"tp_size": 2, "ep_size": 2}


def launch(architecture: str = "Qwen3VLMoeForConditionalGeneration", num_experts: int = 16, **flags) -> compat.Launch:
    return compat.Launch(SimpleNamespace(**{**GOOD, **flags}), MacsConfig.from_preset(), architecture, num_experts)


@pytest.mark.parametrize("flags", [{}, {"dp_size": 2}, {"tp_size": 8, "ep_size": 8}, {"dwdp_size": None}], ids=str)
def test_plain_expert_parallel_launches_are_taken(flags):
    compat.check(launch(**flags))


def test_one_rank_is_taken_only_where_experts_are_bounded():
    one = SimpleNamespace(tp_size=1, ep_size=1)
    for preset in ("paper", "cai", "off"):
        compat.check(compat.Launch(one, MacsConfig.from_preset(preset), "Qwen3VLMoeForConditionalGeneration", 16))
    on_gpu = SimpleNamespace(tp_size=1, ep_size=1, device="cuda", deepep_mode="auto")
    with pytest.raises(MacsError, match="--deepep-mode low_latency"):
        compat.check(compat.Launch(on_gpu, MacsConfig.from_preset("paper"), "Qwen3VLMoeForConditionalGeneration", 16))
    on_gpu.deepep_mode = "low_latency"
    compat.check(compat.Launch(on_gpu, MacsConfig.from_preset("paper"), "Qwen3VLMoeForConditionalGeneration", 16))
    with pytest.raises(MacsError, match="nothing to balance"):
        compat.check(compat.Launch(one, MacsConfig.from_preset(), "Qwen3VLMoeForConditionalGeneration", 16))


@pytest.mark.parametrize(
    "flags",
    [
        {"tp_size": 1, "ep_size": 1},
        {"tp_size": 4, "ep_size": 2},
        {"tp_size": 3, "ep_size": 3},  # 16 experts
        {"enable_prefill_cp": True},
        {"attn_cp_size": 2},
        {"elastic_ep_backend": "mooncake"},
        {"dwdp_size": 2},
        {"enable_waterfill": True},
        {"enable_eplb": True},
        {"ep_num_redundant_experts": 2},
        {"ep_dispatch_algorithm": "lp"},
        {"enforce_shared_experts_fusion": True},
        {"enable_lora": True},
    ],
    ids=str,
)
def test_flags_that_rule_macs_out_are_refused_in_one_line(flags):
    with pytest.raises(MacsError) as caught:
        compat.check(launch(**flags))
    assert "(MACS)" in str(caught.value) and "\n" not in str(caught.value)


LOW_LATENCY = {"device": "cuda", "deepep_mode": "low_latency"}


def fused_launch(options: dict[str, object], flags: dict[str, object]) -> compat.Launch:
    config = MacsConfig.from_preset(dispatch="fused", **options)
    flags = SimpleNamespace(**{**GOOD, **LOW_LATENCY, **flags})
    return compat.Launch(flags, config, "Qwen3VLMoeForConditionalGeneration", 16)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"device": "cpu"}),
        ({}, {"deepep_mode": "normal"}),
        ({}, {"deepep_mode": "auto"}),
        ({}, {"enable_single_batch_overlap": True}),
        ({"exchange": "local"}, {}),
    ],
    ids=str,
)
def test_the_fused_dispatch_is_refused_where_it_would_carry_nothing(options, flags):
    with pytest.raises(MacsError, match="--macs-dispatch deepep"):
        compat.check(fused_launch(options, flags))


@pytest.mark.parametrize(("options", "flags"), [({}, {}), ({"decode": True}, {"deepep_mode": "auto"})], ids=str)
def test_the_fused_dispatch_is_taken_where_planned_batches_are_low_latency(options, flags):
    compat.check(fused_launch(options, flags))


NORMAL = {"device": "cuda", "deepep_mode": "normal", "moe_runner_backend": "deep_gemm", "quantization": None}


def bounded_launch(flags: dict[str, object]) -> compat.Launch:
    flags = SimpleNamespace(**{**GOOD, **NORMAL, **flags})
    return compat.Launch(flags, MacsConfig.from_preset(dispatch="bounded"), "Qwen3VLMoeForConditionalGeneration", 16)


@pytest.mark.parametrize(
    "flags",
    [
        {"device": "cpu"},
        {"deepep_mode": "low_latency"},
        {"moe_runner_backend": "triton"},
        {"quantization": "w4afp8"},
        {"enable_two_batch_overlap": True},
        {"enable_single_batch_overlap": True},
        {"expert_distribution_recorder_mode": "stat"},
        {"speculative_algorithm": "EAGLE"},
        {"enable_deterministic_inference": True},
    ],
    ids=str,
)
def test_the_bounded_dispatch_is_refused_where_it_cannot_carry(flags):
    with pytest.raises(MacsError, match=r"got bounded .*--macs-dispatch deepep"):
        compat.check(bounded_launch(flags))


@pytest.mark.parametrize("flags", [{}, {"deepep_mode": "auto"}, {"quantization": "fp8"}], ids=str)
def test_the_bounded_dispatch_is_taken_in_normal_mode(flags):
    compat.check(bounded_launch(flags))


@pytest.mark.parametrize(
    ("architecture", "experts"),
    [("Llama4ForConditionalGeneration", 16), ("Ernie4_5_VLMoeForConditionalGeneration", 64), ("Qwen3ForCausalLM", 0)],
)
def test_models_that_macs_cannot_serve_are_refused(architecture, experts):
    with pytest.raises(MacsError, match=architecture):
        compat.check(launch(architecture, experts))


@pytest.mark.parametrize("backend", ["none", "mooncake", "nixl", "flashinfer", "pplx", "deepep_v2"])
def test_other_all_to_all_backends_are_refused(backend):
    with pytest.raises(MacsError, match="--moe-a2a-backend"):
        compat.check_a2a(backend)
