"""Qwen3.5-MoE: three layers in four with linear attention, for which SGLang has GPU kernels alone."""

import json
import re
from pathlib import Path

import torch

from sglang_macs.cpu_compat import allow_torchvision

from .common import SEED, SPECIAL, check_sizes, fresh, make_tokenizer, text_config, words_of
from .qwen3 import VISION_SPECIAL, qwen_processor, vision_config
from .weights import empty, initialise, tensors_of

FULL_ATTENTION_EVERY = 4
# Norms whose weights are what is added to one; that of linear attention is not one of them.
ADDED_TO_ONE = re.compile(r"language_model\.(norm|.*(layernorm|[qk]_norm))\.weight")


def build_qwen3_5_moe(
    out: Path | str,
    *,
    hidden: int = 128,
    layers: int = FULL_ATTENTION_EVERY,
    num_experts: int = 16,
    top_k: int = 4,
    intermediate: int = 64,
    head_dim: int = 64,
    seed: int = SEED,
) -> Path:
    """Write a Qwen3.5-MoE checkpoint with tokenizer and processor to `out`; returns `out`."""
    allow_torchvision()
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    check_sizes(hidden, layers, num_experts, top_k, min_layers=FULL_ATTENTION_EVERY)
    out, tokenizer = fresh(out), make_tokenizer(SPECIAL + VISION_SPECIAL)
    text = text_config(tokenizer, hidden, layers, num_experts, top_k, intermediate, head_dim)
    text |= {"shared_expert_intermediate_size": intermediate}
    text |= {"linear_key_head_dim": head_dim // 2, "linear_value_head_dim": head_dim // 2}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    section = [head_dim // 16, head_dim // 32, head_dim // 32]  # a quarter of a head is rotated, in pairs
    text["rope_parameters"] |= {"mrope_section": section, "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    vision = vision_config(hidden)
    del vision["deepstack_visual_indexes"]  # it has none
    names = ("vision_start", "vision_end", "image", "video")
    ids = tokenizer.convert_tokens_to_ids(list(VISION_SPECIAL))
    special = {f"{name}_token_id": i for name, i in zip(names, ids, strict=True)}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    config.dtype = torch.bfloat16
    model = empty(Qwen3_5MoeForConditionalGeneration, config)
    tensors = tensors_of(model)
    initialise(tensors, words_of(tokenizer, SPECIAL + VISION_SPECIAL), seed, visual=r"merger.*linear_fc2\.bias")
    for name in filter(ADDED_TO_ONE.search, tensors):
        tensors[name].data.zero_()
    model.to(torch.bfloat16).save_pretrained(out)
    _keep_interval(out / "config.json")
    qwen_processor(tokenizer).save_pretrained(out)
    return out


def _keep_interval(path: Path) -> None:
    """Published checkpoints say where full attention is, and SGLang 0.5.23 reads nothing else; transformers writes the
    layers' types alone.
    """
    config = json.loads(path.read_text())
    config["text_config"]["full_attention_interval"] = FULL_ATTENTION_EVERY
    path.write_text(json.dumps(config, indent=1))
