"""config.json of one small checkpoint a family, without weights: what the launcher decides by.

`MODELS[name]`: config. `UNTESTED[name]`: config of a model that no test has served.
`REFUSED[name]`: (config, why no launch is taken).
"""

TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
QWEN3 = {**TEXT, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 16}
MLA = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
DEEPSEEK = {**TEXT, **MLA, "n_routed_experts": 16, "n_shared_experts": 2, "first_k_dense_replace": 1}
DEEPSEEK |= {"moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
NOAUX = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
VISION |= {"image_size": 448, "patch_size": 14}
QWEN_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 128}
MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}}

_INTERNVL = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "template": "internvl2_5",
    "downsample_ratio": 0.5,
    "force_image_size": 448,
    "select_layer": -1,
    "ps_version": "v2",
    "llm_config": QWEN3,
    "vision_config": {**VISION, "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"},
}
_QWEN3_OMNI = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    "model_type": "qwen3_omni_moe",
    "enable_audio_output": False,
    "thinker_config": {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {**TEXT, **MROPE, "model_type": "qwen3_omni_moe_text", "num_experts": 16},
        "vision_config": {**QWEN_VISION, "model_type": "qwen3_omni_moe_vision_encoder"},
        "audio_config": {"model_type": "qwen3_omni_moe_audio_encoder", "d_model": 64, "encoder_layers": 2},
    },
}
_DEEPSEEK_VL2 = {
    "architectures": ["DeepseekVL2ForCausalLM"],
    "model_type": "deepseek_vl_v2",
    "tile_tag": "2D",
    "global_view_pos": "head",
    "candidate_resolutions": [[384, 384]],
    "language_config": {**DEEPSEEK, "model_type": "deepseek_v2", "topk_method": "greedy"},
    "vision_config": {"model_type": "vision", "layers": 2, "width": 64, "heads": 2, "patch_size": 14},
    "projector_config": {"model_type": "mlp_projector"},
}
_GLM = {
    "architectures": ["Glm4vMoeForConditionalGeneration"],
    "model_type": "glm4v_moe",
    "text_config": {**DEEPSEEK, **MROPE, "model_type": "glm4v_moe_text"},
    "vision_config": {**QWEN_VISION, "model_type": "glm4v_moe"},
}
_KIMI = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "model_type": "kimi_vl",
    "text_config": {**DEEPSEEK, **NOAUX},
    "vision_config": {**VISION, "model_type": "moonvit"},
}
_DEEPSEEK_V2 = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
_GROUPS = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "scoring_func": "softmax"}
_LOCAL = {**TEXT, "num_local_experts": 16}
_MINIMAX = {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2"}

MODELS = {
    "Qwen3-30B-A3B": QWEN3,
    "InternVL3.5-30B-A3B": _INTERNVL,
    "Qwen3-Omni-30B-A3B": _QWEN3_OMNI,
    "GLM-4.5V": _GLM,
    "Kimi-VL-A3B": _KIMI,
}
UNTESTED = {
    "DeepSeek-VL2": _DEEPSEEK_VL2,
    "MiniMax-M2": {**_LOCAL, **_MINIMAX, "scoring_func": "sigmoid", "use_routing_bias": True},
    "DeepSeek-V2": {**DEEPSEEK, **_DEEPSEEK_V2, **_GROUPS},
}
GPT_OSS = {**_LOCAL, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
REFUSED = {
    "Mixtral": ({**_LOCAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "it sums its MoE layers"),
    "gpt-oss": (GPT_OSS, "has not implemented"),
    "InternVL3.5 with gpt-oss inside": ({**_INTERNVL, "llm_config": GPT_OSS}, "GptOssForCausalLM: SGLang has not"),
}
