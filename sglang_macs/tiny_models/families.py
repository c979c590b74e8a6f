"""Families other than Qwen3(-VL)-MoE: InternVL3.5, Kimi-VL, GLM-4.5V, Qwen3-Omni, DeepSeek-V3.

Where transformers cannot read the whole, `OUT-hfref` is the part that it can: the language model, or Omni's thinker.
"""

import json
import shutil
from pathlib import Path

import torch

from sglang_macs.cpu_compat import allow_torchvision

from .common import CHAT_TEMPLATE, SEED, SPECIAL, VOCAB, check_sizes, fresh, make_tokenizer, text_config, words_of
from .qwen3 import VISION_SPECIAL, picture_processors, vision_config
from .weights import empty, initialise, tensors_of

WEIGHTS = "model.safetensors"
VISION_WIDTH, VISION_LAYERS = 64, 2

INTERNVL_SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>")
INTERNVL_TILE = 448  # pixels, fixed in SGLang's processor
INTERNVL_PATCH = 56  # coarse, for few tokens: 16 a tile
INTERNVL_NAME = "InternVL3_5"
INTERNVL = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "torch_dtype": "bfloat16",
    "template": "internvl2_5",
    "force_image_size": INTERNVL_TILE,
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "ps_version": "v2",
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": VISION_LAYERS,
        "image_size": INTERNVL_TILE,
        "patch_size": INTERNVL_PATCH,
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_factor": 1.0,
        "use_flash_attn": False,
    },
}

KIMI_SPECIAL = ("<|media_start|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>")
KIMI_PATCH, KIMI_MERGE, KIMI_GRID = 14, 2, 16
KIMI_PROCESSOR = "processing_kimi_vl"  # a file beside this one
KIMI = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "model_type": "kimi_vl",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
    "vision_config": {
        "model_type": "moonvit",
        "patch_size": KIMI_PATCH,
        "num_attention_heads": 2,
        "num_hidden_layers": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "merge_kernel_size": [KIMI_MERGE, KIMI_MERGE],
        "init_pos_emb_height": KIMI_GRID,
        "init_pos_emb_width": KIMI_GRID,
    },
}
LATENT = 64
# What configurations on the hub say beside transformers' fields.
DEEPSEEK_HUB = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}

GLM_SPECIAL = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>")
GLM_SPECIAL += ("<|begin_of_video|>", "<|end_of_video|>", "<|video|>")
GLM_ID_FIELDS = ("image_start", "image_end", "image", "video_start", "video_end", "video")
GLM_PIXELS_PER_TOKEN = 28 * 28

AUDIO_SPECIAL = ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
OMNI_SPECIAL = (*VISION_SPECIAL, *AUDIO_SPECIAL)
OMNI_ID_FIELDS = ("vision_start", "vision_end", "image", "video", "audio_start", "audio_end", "audio")
OMNI_TOKENS = ("vision_bos", "vision_eos", "image", "video", "audio_bos", "audio_eos", "audio")  # names in transformers
OMNI_MELS = 128  # bands of a sound's spectrum
OMNI_AUDIO = {
    "num_mel_bins": OMNI_MELS,
    "d_model": VISION_WIDTH,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 2 * VISION_WIDTH,
    "downsample_hidden_size": 32,
}


def build_internvl(out: Path | str, *, seed: int = SEED, **sizes: int) -> Path:
    """Write an InternVL3.5 checkpoint with Qwen3-MoE inside to `out`, that part to `out`-hfref; returns `out`.

    The path must contain "InternVL3_5": SGLang 0.5.21 looks for a processor otherwise, and there is none.
    sizes: as of `_sizes`.
    """
    allow_torchvision()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if INTERNVL_NAME not in str(out):
        raise ValueError(f"tiny model: the folder's name must contain {INTERNVL_NAME}, got {out}; SGLang looks at it")
    tokenizer = make_tokenizer(SPECIAL + INTERNVL_SPECIAL)
    text = _sizes(tokenizer, **sizes)
    config = Qwen3MoeConfig(**text, decoder_sparse_step=1, tie_word_embeddings=False)
    model = empty(Qwen3MoeForCausalLM, _bf16(config))
    words = words_of(tokenizer, SPECIAL + INTERNVL_SPECIAL)
    llm = _with_tower(out, model, tokenizer, _internvl_tower(config.hidden_size), words, r"mlp1\.3\.bias", seed)
    return _save_config(out, {**INTERNVL, "llm_config": llm})


def build_kimi_vl(out: Path | str, *, seed: int = SEED, latent: int = LATENT, **sizes: int) -> Path:
    """Write a Kimi-VL checkpoint to `out`, its language model, DeepSeek-V3's, to `out`-hfref; returns `out`.

    Serve it with --trust-remote-code: the processor is code in the checkpoint. latent: width of latent keys and values;
    sizes: as of `_sizes`.
    """
    allow_torchvision()
    from transformers import DeepseekV3ForCausalLM

    tokenizer = make_tokenizer(SPECIAL + KIMI_SPECIAL)
    config = _deepseek_config(_sizes(tokenizer, **sizes), latent, n_group=1, topk_group=1)
    model = empty(DeepseekV3ForCausalLM, config)
    words = words_of(tokenizer, SPECIAL + KIMI_SPECIAL)
    tower, visual = _moonvit_tower(config.hidden_size), r"projector\.linear_2\.bias"
    text = _with_tower(out, model, tokenizer, tower, words, visual, seed) | DEEPSEEK_HUB
    text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    _save_kimi_processor(Path(out))
    image_id = tokenizer.convert_tokens_to_ids(KIMI_SPECIAL[-1])
    return _save_config(out, {**KIMI, "media_placeholder_token_id": image_id, "text_config": text})


def build_glm4v_moe(out: Path | str, *, seed: int = SEED, **sizes: int) -> Path:
    """Write a GLM-4.5V checkpoint with tokenizer and processor to `out`; returns `out`. sizes: as of `_sizes`."""
    allow_torchvision()
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    out, tokenizer = fresh(out), make_tokenizer(SPECIAL + GLM_SPECIAL)
    text = _sizes(tokenizer, **sizes)
    text["n_routed_experts"] = text.pop("num_experts")
    text |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "attention_bias": True}
    text["rope_parameters"] |= {"mrope_section": _mrope_section(text["head_dim"], 0.5), "partial_rotary_factor": 0.5}
    vision = {"depth": VISION_LAYERS, "hidden_size": VISION_WIDTH, "num_heads": 2, "image_size": 336, "patch_size": 14}
    vision |= {"out_hidden_size": text["hidden_size"], "intermediate_size": text["intermediate_size"]}
    ids = tokenizer.convert_tokens_to_ids(list(GLM_SPECIAL))
    special = {f"{name}_token_id": i for name, i in zip(GLM_ID_FIELDS, ids, strict=True)}
    config = Glm4vMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    model = empty(Glm4vMoeForConditionalGeneration, _bf16(config))
    initialise(tensors_of(model), words_of(tokenizer, SPECIAL + GLM_SPECIAL), seed)
    model.to(torch.bfloat16).save_pretrained(out)
    _glm_processor(tokenizer).save_pretrained(out)
    return out


def build_qwen3_omni(out: Path | str, *, seed: int = SEED, **sizes: int) -> Path:
    """Write a Qwen3-Omni checkpoint without a voice of its own to `out`, its thinker to `out`-hfref; returns `out`.

    sizes: as of `_sizes`; at least 3 layers, as for Qwen3-VL-MoE.
    """
    allow_torchvision()
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    out, twin = fresh(out), fresh(f"{Path(out)}-hfref")
    names = {f"{name}_token": token for name, token in zip(OMNI_TOKENS, OMNI_SPECIAL, strict=True)}
    tokenizer = make_tokenizer(SPECIAL + OMNI_SPECIAL, names)
    text = _sizes(tokenizer, **sizes)
    text["rope_parameters"] |= {"mrope_section": _mrope_section(text["head_dim"]), "mrope_interleaved": True}
    ids = tokenizer.convert_tokens_to_ids(list(OMNI_SPECIAL))
    thinker = {f"{name}_token_id": i for name, i in zip(OMNI_ID_FIELDS, ids, strict=True)}
    thinker |= {"text_config": text, "vision_config": vision_config(text["hidden_size"])}
    thinker |= {"audio_config": {**OMNI_AUDIO, "output_dim": text["hidden_size"]}}
    config = _bf16(Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False))
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    model = empty(Qwen3OmniMoeThinkerForConditionalGeneration, _bf16(config.thinker_config))
    words = words_of(tokenizer, SPECIAL + OMNI_SPECIAL)
    initialise(tensors_of(model), words, seed, visual=r"visual\.merger.*mlp\.2\.bias")
    model.to(torch.bfloat16).save_pretrained(twin)
    _copy_weights(twin / WEIGHTS, "thinker.", out / WEIGHTS)
    config.save_pretrained(out)
    for folder in (out, twin):
        _omni_processor(tokenizer).save_pretrained(folder)
    return out


def build_deepseek_v3(out: Path | str, *, seed: int = SEED, latent: int = LATENT, **sizes: int) -> Path:
    """Write a text-only DeepSeek-V3 checkpoint, which routes within 2 of 4 groups of experts, to `out`; returns it.

    latent: width of latent keys and values; sizes: as of `_sizes`.
    """
    allow_torchvision()
    from transformers import DeepseekV3ForCausalLM

    out, tokenizer = fresh(out), make_tokenizer(SPECIAL)
    config = _deepseek_config(_sizes(tokenizer, **sizes), latent, n_group=4, topk_group=2)
    model = empty(DeepseekV3ForCausalLM, config)
    initialise(tensors_of(model), words_of(tokenizer, SPECIAL), seed)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return _save_config(out, json.loads((out / "config.json").read_text()) | DEEPSEEK_HUB)


def _sizes(
    tokenizer,
    hidden: int = 128,
    layers: int = 3,
    num_experts: int = 16,
    top_k: int = 4,
    intermediate: int = 64,
    head_dim: int = 32,
) -> dict:
    """`text_config` of sizes that can be built; at least 2 layers, of which the first is dense in some families.

    head_dim: SGLang's kernels for GPUs take 64 and up.
    """
    check_sizes(hidden, layers, num_experts, top_k, min_layers=2)
    return text_config(tokenizer, hidden, layers, num_experts, top_k, intermediate, head_dim)


def _mrope_section(head_dim: int, partial: float = 1.0) -> list[int]:
    """Of the rotated pairs of a head, those for time, height and width."""
    pairs = int(head_dim * partial) // 2
    return [pairs // 2, pairs // 4, pairs // 4]


def _bf16(config):
    config.dtype = torch.bfloat16
    return config


def _deepseek_config(sizes: dict, latent: int, *, n_group: int, topk_group: int):
    """transformers' configuration of a DeepSeek-V3: latent attention, one dense layer, one shared expert."""
    from transformers import DeepseekV3Config

    sizes = dict(sizes)
    experts, head_dim = sizes.pop("num_experts"), sizes.pop("head_dim")
    sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = DeepseekV3Config(
        **sizes,
        n_routed_experts=experts,
        n_shared_experts=1,
        n_group=n_group,
        topk_group=topk_group,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        q_lora_rank=None,
        kv_lora_rank=latent,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=max(32, head_dim // 2),  # DeepSeek's own are 128 and 64
        v_head_dim=head_dim,
        tie_word_embeddings=False,
    )
    return _bf16(config)


def _with_tower(
    out: Path | str, model, tokenizer, tower: dict[str, tuple[int, ...]], words: range, visual: str, seed: int
) -> dict:
    """Write the weights of `model` together with a vision tower to `out`, `model` alone to `out`-hfref.

    tower: shapes by name; visual: as in `initialise`. Returns the configuration of `model`, as it is written.
    """
    out, twin = fresh(out), fresh(f"{Path(out)}-hfref")
    added = {name: torch.empty(shape) for name, shape in tower.items()}
    prefixed = {f"language_model.{name}": tensor for name, tensor in tensors_of(model).items()}
    initialise(prefixed | added, words, seed, visual=visual)
    for name in added:
        if name.endswith((".ls1", ".ls2")):
            added[name].fill_(1.0)
    model.to(torch.bfloat16).save_pretrained(twin)
    for folder in (out, twin):
        tokenizer.save_pretrained(folder)
    _copy_weights(twin / WEIGHTS, "language_model.", out / WEIGHTS, added)
    return json.loads((twin / "config.json").read_text())


def _copy_weights(source: Path, prefix: str, target: Path, added: dict[str, torch.Tensor] | None = None) -> None:
    """Write the weights of one file under longer names to another, with others `added` to them."""
    from safetensors.torch import load_file, save_file

    weights = {prefix + name: weight for name, weight in load_file(source).items()}
    weights |= {name: weight.to(torch.bfloat16) for name, weight in (added or {}).items()}
    save_file(weights, target, metadata={"format": "pt"})


def _save_config(out: Path | str, config: dict) -> Path:
    (Path(out) / "config.json").write_text(json.dumps(config, indent=1))
    return Path(out)


def _biased(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weight and bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _internvl_tower(hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of InternViT and of what turns four of its outputs into a visual token."""
    width, patch = VISION_WIDTH, INTERNVL_PATCH
    embeddings = "vision_model.embeddings"
    shapes = {
        f"{embeddings}.class_embedding": (1, 1, width),
        f"{embeddings}.position_embedding": (1, (INTERNVL_TILE // patch) ** 2 + 1, width),
        **_biased(f"{embeddings}.patch_embedding", width, 3, patch, patch),
        **_biased("mlp1.0", 4 * width),
        **_biased("mlp1.1", hidden, 4 * width),
        **_biased("mlp1.3", hidden, hidden),
    }
    for i in range(VISION_LAYERS):
        layer = f"vision_model.encoder.layers.{i}"
        shapes |= {f"{layer}.ls1": (width,), f"{layer}.ls2": (width,)}
        shapes |= _biased(f"{layer}.norm1", width) | _biased(f"{layer}.norm2", width)
        shapes |= _biased(f"{layer}.attn.qkv", 3 * width, width) | _biased(f"{layer}.attn.proj", width, width)
        shapes |= _biased(f"{layer}.mlp.fc1", 2 * width, width) | _biased(f"{layer}.mlp.fc2", width, 2 * width)
    return shapes


def _moonvit_tower(hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of MoonViT and of the projector behind it."""
    width, patch = VISION_WIDTH, KIMI_PATCH
    merged = width * KIMI_MERGE**2
    shapes = {
        **_biased("vision_tower.patch_embed.proj", width, 3, patch, patch),
        "vision_tower.patch_embed.pos_emb.weight": (KIMI_GRID, KIMI_GRID, width),
        **_biased("vision_tower.encoder.final_layernorm", width),
        **_biased("multi_modal_projector.pre_norm", width),
        **_biased("multi_modal_projector.linear_1", merged, merged),
        **_biased("multi_modal_projector.linear_2", hidden, merged),
    }
    for i in range(VISION_LAYERS):
        block = f"vision_tower.encoder.blocks.{i}"
        shapes |= _biased(f"{block}.norm0", width) | _biased(f"{block}.norm1", width)
        shapes |= _biased(f"{block}.wqkv", 3 * width, width) | _biased(f"{block}.wo", width, width)
        shapes |= _biased(f"{block}.mlp.fc0", 2 * width, width) | _biased(f"{block}.mlp.fc1", width, 2 * width)
    return shapes


def _save_kimi_processor(out: Path) -> None:
    """The processor's code and the files that name it."""
    shutil.copy(Path(__file__).with_name(f"{KIMI_PROCESSOR}.py"), out)
    image, whole = f"{KIMI_PROCESSOR}.KimiVLImageProcessor", f"{KIMI_PROCESSOR}.KimiVLProcessor"
    auto = {"auto_map": {"AutoImageProcessor": image, "AutoProcessor": whole}, "patch_size": KIMI_PATCH}
    (out / "preprocessor_config.json").write_text(json.dumps(auto | {"image_processor_type": "KimiVLImageProcessor"}))
    processor = {"auto_map": {"AutoProcessor": whole}, "processor_class": "KimiVLProcessor"}
    (out / "processor_config.json").write_text(json.dumps(processor))


def _glm_processor(tokenizer):
    from transformers import Glm4vImageProcessor, Glm4vProcessor
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor

    # Areas over two frames, of which a picture is both.
    pixels = {"shortest_edge": 16 * GLM_PIXELS_PER_TOKEN, "longest_edge": 320 * GLM_PIXELS_PER_TOKEN}
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _omni_processor(tokenizer):
    from transformers import Qwen3OmniMoeProcessor, WhisperFeatureExtractor

    image_processor, video_processor = picture_processors()
    return Qwen3OmniMoeProcessor(
        image_processor=image_processor,
        video_processor=video_processor,
        feature_extractor=WhisperFeatureExtractor(feature_size=OMNI_MELS),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
