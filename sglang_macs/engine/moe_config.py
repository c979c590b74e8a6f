"""What a model's configuration says of its MoE layers: how many experts, which layers, and whether these route by a
function of their own.

All functions take the language model's configuration (SGLang's `hf_text_config`) and read attributes alone, as the
model classes of SGLang 0.5.21 do; where these look at other things, so does this.
"""

from typing import Any

from ..config import MacsConfig
from .launch import Launch

OWN_FUNCTION = "a routing function of the model's own"
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts", "moe_topk")
_LAYERS = ("num_hidden_layers", "first_k_dense_replace", "moe_layer_freq")

# Model types (prefixes) whose class decides it, whatever the configuration says.
_OWN_FUNCTION_TYPES = ("llama4", "gemma4", "grok", "phimoe", "cohere2_moe", "interns1_pro", "afmoe")
_ALL_SPARSE_TYPES = ("qwen", "mixtral", "gpt_oss", "minimax_m2")


def launch_of(flags: Any, options: MacsConfig, model: Any) -> Launch:
    """What the rules of compat.py look at. flags: SGLang's, resolved; model: its `ModelConfig`."""
    architecture, text = (model.hf_config.architectures or ["unknown"])[0], model.hf_text_config
    sizes = num_experts(text), top_k(text)
    inner = (getattr(text, "architectures", None) or [""])[0]
    about = special_routing(text), model.context_len, model.quantization, inner
    return Launch(flags, options, architecture, *sizes, *about)


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
    """What the router is in words, where its class decides by itself; else "": SGLang's TopK says all (topk.py)."""
    return OWN_FUNCTION if _model_type(config).startswith(_OWN_FUNCTION_TYPES) else ""


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
