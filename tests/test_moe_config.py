"""What is read from a model's configuration: experts, MoE layers, and routing by a function of its own. No SGLang."""

from types import SimpleNamespace

import pytest

from sglang_macs.engine import moe_config

FIRST_DENSE = {"num_hidden_layers": 5, "first_k_dense_replace": 1}
NOAUX = {"topk_method": "noaux_tc"}


@pytest.mark.parametrize(
    ("values", "experts", "top_k"),
    [
        ({"num_experts": 128, "num_experts_per_tok": 8}, 128, 8),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6}, 64, 6),
        ({"num_local_experts": 32, "num_experts_per_tok": 4}, 32, 4),
        ({"moe_num_experts": 48, "moe_top_k": 3}, 48, 3),
        ({"moe_num_experts": [64, 64], "moe_k": 6}, 128, 6),
        ({"num_experts": None, "n_routed_experts": None}, 0, 0),
        ({"num_experts": 0}, 0, 0),
        ({}, 0, 0),
    ],
    ids=str,
)
def test_experts_are_found_under_the_names_that_models_give_them(values, experts, top_k):
    config = SimpleNamespace(**values)
    assert (moe_config.num_experts(config), moe_config.top_k(config)) == (experts, top_k)


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 3, "mlp_only_layers": [1]}, (0, 1, 2)),  # as SGLang
        ({"model_type": "gpt_oss", "num_hidden_layers": 2}, (0, 1)),
        ({"model_type": "deepseek_v3", **FIRST_DENSE, "moe_layer_freq": 1}, (1, 2, 3, 4)),
        ({"model_type": "deepseek_v2", **FIRST_DENSE, "moe_layer_freq": 2}, (2, 4)),
        ({"model_type": "glm4v_moe_text", **FIRST_DENSE}, (1, 2, 3, 4)),
        ({"model_type": "mimo_v2", **FIRST_DENSE, "moe_layer_freq": [0, 1, 1, 1, 1]}, None),
        ({"model_type": "step3p5", "num_hidden_layers": 3}, None),
        ({}, None),
    ],
    ids=str,
)
def test_moe_layers_are_those_of_the_model_s_class_or_unknown(values, layers):
    assert moe_config.layers(SimpleNamespace(**values)) == layers


@pytest.mark.parametrize("values", [{"model_type": "qwen3_moe"}, {"scoring_func": "sigmoid", **NOAUX}, {}], ids=str)
def test_what_a_top_k_says_by_itself_is_not_asked_of_the_configuration(values):
    assert moe_config.special_routing(SimpleNamespace(**values)) == ""


def test_routing_by_the_model_s_own_function_is_named():
    config = SimpleNamespace(model_type="gemma4_text")
    assert moe_config.special_routing(config) == "a routing function of the model's own"
