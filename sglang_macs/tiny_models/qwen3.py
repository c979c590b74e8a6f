"""Qwen3-MoE and Qwen3-VL-MoE.

Layout: SGLang 0.5.21 reads Qwen3-VL-MoE experts as on the hub, gate_up_proj [E, H, 2I] and down_proj [E, I, H];
transformers 5.12 writes and reads them transposed. `OUT` is for SGLang, `OUT-hfref` is the same model for transformers.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sglang_macs.cpu_compat import allow_torchvision

from .common import CHAT_TEMPLATE, SEED, SPECIAL, check_sizes, fresh, make_tokenizer, text_config, words_of
from .weights import VISUAL_PULL, empty, initialise, tensors_of

FP8_BLOCK = 128
PATCH, MERGE = 16, 2  # pixels per patch side, patches per visual token side: a visual token covers 32 x 32 pixels
PIXELS_PER_TOKEN = (PATCH * MERGE) ** 2
MIN_VISUAL_TOKENS, MAX_VISUAL_TOKENS = 16, 160  # per image; a 640 x 427 photograph becomes 150
VISION_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def build_qwen3_moe(
    out: Path | str,
    *,
    hidden: int = 128,
    layers: int = 3,
    num_experts: int = 16,
    top_k: int = 4,
    intermediate: int = 64,
    head_dim: int = 32,
    seed: int = SEED,
    fp8: bool = False,
) -> Path:
    """Write a text-only Qwen3-MoE checkpoint with its tokenizer to `out`; returns `out`.

    head_dim: SGLang's rotary kernel for GPUs takes 64 and up.
    fp8: experts in 8-bit blocks of 128 x 128, as in DeepSeek's and Qwen's FP8 checkpoints; sizes must be multiples.
    """
    allow_torchvision()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    check_sizes(hidden, layers, num_experts, top_k, min_layers=1)
    out = fresh(out)
    tokenizer = make_tokenizer(SPECIAL)
    tokenizer.save_pretrained(out)
    config = Qwen3MoeConfig(
        **text_config(tokenizer, hidden, layers, num_experts, top_k, intermediate, head_dim),
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )
    config.dtype = torch.bfloat16
    model = empty(Qwen3MoeForCausalLM, config)
    initialise(tensors_of(model), words_of(tokenizer, SPECIAL), seed)
    model.to(torch.bfloat16).save_pretrained(out)
    if fp8:
        _quantise_experts(out)
    return out


def build_qwen3_vl_moe(
    out: Path | str,
    *,
    hidden: int = 128,
    layers: int = 3,
    num_experts: int = 16,
    top_k: int = 4,
    intermediate: int = 64,
    seed: int = SEED,
    visual_pull: float = VISUAL_PULL,
    copies: int = 0,
) -> Path:
    """Write a Qwen3-VL-MoE checkpoint with tokenizer and processor to `out`, its twin to `out`-hfref; returns `out`.

    At least 3 layers: SGLang 0.5.21 adds deepstack features after layers 0, 1 and 2, whatever the config says.
    copies: so many more layers, with the last one's weights: for measurements, a deep model in little time. No twin.
    """
    allow_torchvision()
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    check_sizes(hidden, layers, num_experts, top_k, min_layers=3)
    out, twin = fresh(out), fresh(f"{Path(out)}-hfref")
    tokenizer = make_tokenizer(SPECIAL + VISION_SPECIAL)
    qwen_processor(tokenizer).save_pretrained(twin)
    text = text_config(tokenizer, hidden, layers, num_experts, top_k, intermediate)
    text["rope_parameters"] |= {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    ids = dict(zip(VISION_SPECIAL, tokenizer.convert_tokens_to_ids(list(VISION_SPECIAL)), strict=True))
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision_config(hidden),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.dtype = torch.bfloat16
    words = words_of(tokenizer, SPECIAL + VISION_SPECIAL)
    model = empty(Qwen3VLMoeForConditionalGeneration, config)
    initialise(tensors_of(model), words, seed, visual=r"merger.*linear_fc2\.bias", pull=visual_pull)
    model.to(torch.bfloat16).save_pretrained(twin)
    shutil.copytree(twin, out, dirs_exist_ok=True)
    _transpose_experts(out / "model.safetensors")
    if copies:
        _copy_last_layer(out, layers, copies)
        shutil.rmtree(twin)
    return out


def qwen_processor(tokenizer):
    """Qwen3-VL's processor around `tokenizer`."""
    from transformers import Qwen3VLProcessor

    image_processor, video_processor = picture_processors()
    return Qwen3VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=CHAT_TEMPLATE,
    )


def picture_processors() -> tuple:
    """Of pictures, `MIN_VISUAL_TOKENS` to `MAX_VISUAL_TOKENS` tokens each, and of videos."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    pixels = {
        "shortest_edge": MIN_VISUAL_TOKENS * PIXELS_PER_TOKEN,
        "longest_edge": MAX_VISUAL_TOKENS * PIXELS_PER_TOKEN,
    }  # the names are transformers'; the values are areas
    return Qwen2VLImageProcessor(**grid, size=pixels), Qwen3VLVideoProcessor(**grid)


def vision_config(hidden: int) -> dict:
    """Config fields of the vision tower: 3 blocks, each a deepstack level (SGLang 0.5.21 expects exactly 3)."""
    return {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
    }


def _transpose_experts(file: Path) -> None:
    """Rewrite the fused expert tensors of `file` from transformers' layout to the hub's."""
    from safetensors.torch import load_file, save_file

    fused = ("experts.gate_up_proj", "experts.down_proj")
    weights = load_file(file)
    turned = {n: w.transpose(1, 2).contiguous() if n.endswith(fused) else w for n, w in weights.items()}
    save_file(turned, file, metadata={"format": "pt"})


def _copy_last_layer(out: Path, layers: int, copies: int) -> None:
    """Append `copies` layers with the last one's weights to the checkpoint of `layers` at `out`, a file each."""
    from safetensors.torch import load_file, save_file

    weights, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    last = {name: weight for name, weight in weights.items() if f".layers.{layers - 1}." in name}
    places = dict.fromkeys(weights, "model.safetensors")

    def write(layer: int) -> dict[str, str]:
        copy = {name.replace(f".layers.{layers - 1}.", f".layers.{layer}."): weight for name, weight in last.items()}
        save_file(copy, out / f"layer-{layer}.safetensors", metadata={"format": "pt"})
        return dict.fromkeys(copy, f"layer-{layer}.safetensors")

    with ThreadPoolExecutor() as pool:
        for placed in pool.map(write, range(layers, layers + copies)):
            places |= placed
    config["text_config"]["num_hidden_layers"] = layers + copies
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _quantise_experts(out: Path) -> None:
    """Rewrite the expert matrices of `out` [N, K] as float8_e4m3 and `weight_scale_inv` [N / 128, K / 128] f32."""
    from safetensors.torch import load_file, save_file

    weights, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    for name in [name for name in weights if ".experts." in name]:
        rows, columns = (size // FP8_BLOCK for size in weights[name].shape)
        blocks = weights[name].float().view(rows, FP8_BLOCK, columns, FP8_BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        quantised = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name] = quantised.view(weights[name].shape)
        weights[f"{name}_scale_inv"] = scale
    attention = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(config["num_hidden_layers"]) for x in "qkvo"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": ["lm_head", *attention],
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))
