"""What a model's configuration says of its MoE layers: how many experts, which layers, and how they route.

All functions take the language model's configuration (SGLang's `hf_text_config`) and read attributes alone, as the
model classes of SGLang 0.5.21 do; where these look at other things, so does this.
"""

from typing import Any

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts", "moe_topk")
_SCORING = ("scoring_func", "score_function", "moe_router_activation_func", "moe_router_score_func")
_LAYERS = ("num_hidden_layers", "first_k_dense_replace", "moe_layer_freq")
_BIAS_SWITCHES = ("use_routing_bias", "moe_router_enable_expert_bias", "use_expert_bias")

# Model types (prefixes) whose class decides it, whatever the configuration says.
_BIASED_TYPES = (
    *("glm4_moe", "glm4v_moe", "step3p5", "ernie4_5_moe", "longcat_flash", "exaone_moe", "kimi_linear"),
    *("nemotron_h", "hy_v3", "laguna", "sarvam"),
)
_OWN_FUNCTION_TYPES = ("llama4", "gemma4", "grok", "phimoe", "cohere2_moe", "interns1_pro", "afmoe")
_ALL_SPARSE_TYPES = ("qwen", "mixtral", "gpt_oss", "minimax_m2")


def num_experts(config: Any) -> int:
    """Routed experts of a layer, 0 for a dense model."""
    return _number(config, _EXPERTS)


def top_k(config: Any) -> int:
    """Experts of a token, 0 where the configuration does not say."""
    return _number(config, _TOP_K)


def layers(config: Any) -> tuple[int, ...] | None:
    """Numbers of the MoE layers, or None where only the model's class knows them."""
    count, dense, every = (getattr(config, name, None) for name in _LAYERS)
    if not isinstance(count, int):
        return None
    if _model_type(config).startswith(_ALL_SPARSE_TYPES):
        return tuple(range(count))
    every = 1 if every is None else every
    if isinstance(dense, int) and isinstance(every, int) and every > 0:
        return tuple(i for i in range(dense, count) if i % every == 0)
    return None


def special_routing(config: Any) -> str:
    """What the router does beside taking the top-k of softmax over its logits, in words, or ""."""
    scoring = next((s for name in _SCORING if (s := getattr(config, name, None)) is not None), "softmax")
    if scoring != "softmax":
        return f"{scoring} scores"
    if _model_type(config).startswith(_OWN_FUNCTION_TYPES):
        return "a routing function of the model's own"
    if (
        getattr(config, "topk_method", None) == "noaux_tc"
        or any(getattr(config, name, False) for name in _BIAS_SWITCHES)
        or _model_type(config).startswith(_BIASED_TYPES)
    ):
        return "a correction bias in the selection"
    groups = _number(config, ("n_group", "num_expert_group"))
    return group_limit(groups, getattr(config, "topk_group", None))


def group_limit(groups: int | None, groups_taken: int | None) -> str:
    """In words, that a token's experts come from some of the groups only, or ""."""
    limited = groups is not None and groups_taken is not None and groups_taken < groups
    return f"experts from {groups_taken} of {groups} groups" if limited else ""


def _model_type(config: Any) -> str:
    return getattr(config, "model_type", None) or ""


def _number(config: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that is a number; of a list of numbers, their sum."""
    for name in names:
        value = getattr(config, name, None)
        value = sum(value) if isinstance(value, list | tuple) else value
        if isinstance(value, int) and value > 0:
            return value
    return 0
