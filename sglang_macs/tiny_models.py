"""Builds tiny random Qwen3-MoE and Qwen3-VL-MoE checkpoints for tests, demos and laptops. No hub, about 5 MB each.

    python -m sglang_macs.tiny_models OUT [--kind qwen3_vl_moe|qwen3_moe] [--seed 4]

The weights are random, but not blindly so. A tiny model must show what a large one shows:

* greedy tokens that depend on the context and yet do not hinge on bfloat16 rounding: the output layer gives each word
  two possible successors, far ahead of all others, and what attention and the experts add decides between the two;
* an unequal expert load: in the VL model a direction `u` separates visual tokens from text, and the routers send what
  points along `u` to the first half of the experts, so rank 0 of two is the slow one (`VISUAL_PULL`).

Each tensor is drawn from a generator seeded by (seed, its name): same seed, same bits, whatever the order of creation.

Layout: SGLang 0.5.21 reads Qwen3-VL-MoE experts as on the hub, gate_up_proj [E, H, 2I] and down_proj [E, I, H];
transformers 5.12 writes and reads them transposed. `OUT` is for SGLang, `OUT-hfref` is the same model for transformers.
"""

import argparse
import hashlib
import json
import math
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sglang_macs.cpu_compat import allow_torchvision

VOCAB = 512
FP8_BLOCK = 128
PATCH, MERGE = 16, 2  # pixels per patch side, patches per visual token side: a visual token covers 32 x 32 pixels
PIXELS_PER_TOKEN = (PATCH * MERGE) ** 2
MIN_VISUAL_TOKENS, MAX_VISUAL_TOKENS = 16, 160  # per image; a 640 x 427 photograph becomes 150

SEED = 4  # chosen for a decisive model: tests/reference.py says how decisive

# Root mean square of what each part adds to the residual stream; embeddings count 1. See the module's docstring.
ATTENTION_GAIN = 0.7
EXPERT_GAIN = 0.7
MOOD = 4.0  # weight of the direction by which the context chooses between a word's two successors
# Standard deviation of router logits. With 3, top-4 weights are about 0.7, 0.2, 0.07, 0.03. With 1.5 the fourth gets
# 0.1, and bfloat16, which swaps the fourth and fifth expert of some tokens in a hundred, then changes the answer.
ROUTER_GAIN = 3.0
VISUAL_PULL = 0.8  # shift of a visual token's router logits: up for the first half of the experts, down for the second

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "What is in this picture? Describe the image in one sentence.",
    "a mixture of experts sends every token to a few experts and adds up what they answer",
    "the slowest rank sets the pace of the whole batch, all others wait for it",
    "hello world, how many visual tokens does a photograph of a flower have?",
)


def reference_path(path: Path | str) -> Path:
    """Where transformers finds the model at `path`: its `-hfref` twin, or `path` itself where one layout serves all."""
    twin = Path(f"{Path(path)}-hfref")
    return twin if twin.exists() else Path(path)


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

    _check(hidden, layers, num_experts, top_k, min_layers=1)
    out = _fresh(out)
    tokenizer = _tokenizer(SPECIAL)
    tokenizer.save_pretrained(out)
    config = Qwen3MoeConfig(
        **_text_config(tokenizer, hidden, layers, num_experts, top_k, intermediate, head_dim),
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )
    config.dtype = torch.bfloat16
    model = _initialise(_empty(Qwen3MoeForCausalLM, config), _words(tokenizer, SPECIAL), seed, visual=False)
    model.save_pretrained(out)
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

    _check(hidden, layers, num_experts, top_k, min_layers=3)
    out, twin = _fresh(out), _fresh(f"{Path(out)}-hfref")
    tokenizer = _tokenizer(SPECIAL + VISION_SPECIAL)
    _processor(tokenizer).save_pretrained(twin)
    text = _text_config(tokenizer, hidden, layers, num_experts, top_k, intermediate)
    text["rope_parameters"] |= {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    ids = dict(zip(VISION_SPECIAL, tokenizer.convert_tokens_to_ids(list(VISION_SPECIAL)), strict=True))
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=_vision_config(hidden),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.dtype = torch.bfloat16
    words = _words(tokenizer, SPECIAL + VISION_SPECIAL)
    model = _empty(Qwen3VLMoeForConditionalGeneration, config)
    model = _initialise(model, words, seed, visual=True, pull=visual_pull)
    model.save_pretrained(twin)
    shutil.copytree(twin, out, dirs_exist_ok=True)
    _transpose_experts(out / "model.safetensors")
    if copies:
        _copy_last_layer(out, layers, copies)
        shutil.rmtree(twin)
    return out


BUILDERS = {"qwen3_moe": build_qwen3_moe, "qwen3_vl_moe": build_qwen3_vl_moe}


def ensure(out: Path | str, kind: str = "qwen3_vl_moe", **options) -> Path:
    """Build the model at `out` unless it is there already, made by this very file with these options; returns `out`."""
    out = Path(out)
    stamp = out / "built_from.json"
    wanted = {"builder": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "kind": kind, **options}
    if not (stamp.exists() and json.loads(stamp.read_text()) == wanted):
        BUILDERS[kind](out, **options)
        stamp.write_text(json.dumps(wanted))  # last: an interrupted build has none
    return out


def _check(hidden: int, layers: int, num_experts: int, top_k: int, *, min_layers: int) -> None:
    """Refuse what SGLang or the routers' construction cannot take."""
    if hidden % 64:
        raise ValueError(f"tiny model: hidden must be a multiple of 64 (4 heads of 32), got {hidden}; try 128")
    if layers < min_layers:
        raise ValueError(f"tiny model: layers must be at least {min_layers}, got {layers}; see the builder's docstring")
    if num_experts % 2 or not 0 < top_k <= num_experts // 2:
        raise ValueError(
            f"tiny model: num_experts must be even and top_k at most half of it, got {num_experts} and {top_k}; "
            "try 16 and 4"
        )


def _fresh(path: Path | str) -> Path:
    """An empty folder at `path`; only a folder that holds a checkpoint, or nothing, is cleared."""
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / "config.json").exists():
        raise FileExistsError(f"tiny model: {path} exists and holds no checkpoint; remove it or choose another folder")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _tokenizer(special: tuple[str, ...]):
    """Byte-level BPE with `VOCAB` ids at most, trained on `CORPUS`: any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _words(tokenizer, special: tuple[str, ...]) -> range:
    """Ids of the ordinary tokens: the trainer numbers the special ones first."""
    return range(len(special), len(tokenizer))


def _processor(tokenizer):
    """Qwen3-VL's processor around `tokenizer`, with `MIN_VISUAL_TOKENS` to `MAX_VISUAL_TOKENS` tokens per image."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    pixels = {
        "shortest_edge": MIN_VISUAL_TOKENS * PIXELS_PER_TOKEN,
        "longest_edge": MAX_VISUAL_TOKENS * PIXELS_PER_TOKEN,
    }  # the names are transformers'; the values are areas
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid),
        chat_template=CHAT_TEMPLATE,
    )


def _text_config(
    tokenizer, hidden: int, layers: int, num_experts: int, top_k: int, intermediate: int, head_dim: int = 32
) -> dict:
    """Config fields of the language model, shared by both kinds."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _vision_config(hidden: int) -> dict:
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


def _empty(kind, config):
    """A model without values: `_initialise` sets every parameter, and transformers would draw them all before."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return kind(config)


def _initialise(model, words: range, seed: int, *, visual: bool, pull: float = 0.0):
    """Set every parameter of `model`; `words` are the ids it may generate; returns it in bf16."""
    parameters = dict(model.named_parameters())
    with ThreadPoolExecutor() as pool:  # a generator draws on one thread; every parameter has its own
        values = pool.map(lambda item: _draw(*item, seed), parameters.items())
        for parameter, value in zip(parameters.values(), values, strict=True):
            parameter.data = value
    embed = _one(parameters, "embed_tokens.weight")
    if visual:
        _pull_visual_tokens(parameters, embed, pull, seed)
    _map_to_successors(embed, _one(parameters, "lm_head.weight"), words, seed)
    return model.to(torch.bfloat16)


def _one(parameters: dict, suffix: str) -> torch.nn.Parameter:
    """The only parameter whose name ends in `suffix`."""
    found = [name for name in parameters if name.endswith(suffix)]
    if len(found) != 1:
        raise KeyError(f"tiny model: expected one parameter ending in {suffix!r}, got {found}; was it renamed?")
    return parameters[found[0]]


def _generator(seed: int, name: str) -> torch.Generator:
    """CPU generator for one tensor."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _draw(name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Initial value of one parameter: norms 1, biases 0, others normal with unit output times the part's gain."""
    if parameter.ndim == 1:
        return torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
    value = torch.randn(parameter.shape, generator=_generator(seed, name))
    if name.endswith(("embed_tokens.weight", "pos_embed.weight")):
        return value
    # Expert tensors are [E, out, in]; the patch convolution is [out, ...in]; all others [out, in].
    fan_in = math.prod(parameter.shape[1:]) if "patch_embed" in name else parameter.shape[-1]
    return value.mul_(_gain(name) / math.sqrt(fan_in))


def _gain(name: str) -> float:
    """Output scale of a weight matrix by its role."""
    if name.endswith("o_proj.weight"):
        return ATTENTION_GAIN
    if "experts" in name and "down_proj" in name:
        return 2.0 * EXPERT_GAIN  # silu(gate) * up of unit normals has a root mean square of about 0.5
    if name.endswith("mlp.gate.weight"):
        return ROUTER_GAIN
    return 1.0


def _pull_visual_tokens(parameters: dict, embed: torch.nn.Parameter, pull: float, seed: int) -> None:
    """Give visual tokens a common direction `u [H]`, text none of it, and let the routers see it.

    The mergers' bias adds `u` times sqrt(H), i.e. unit root mean square, to every visual token and every deepstack
    addition. A router row of the first half of the experts then gains about `pull` on visual tokens, one of the second
    half loses as much.
    """
    hidden = embed.shape[1]
    u = torch.randn(hidden, generator=_generator(seed, "visual direction"))
    u /= u.norm()
    embed.data -= embed.data @ u[:, None] * u
    for name, parameter in parameters.items():
        if name.endswith("linear_fc2.bias") and "merger" in name:
            parameter.data = u * math.sqrt(hidden)
        if name.endswith("mlp.gate.weight"):
            half = parameter.shape[0] // 2
            side = torch.cat([torch.ones(half), -torch.ones(half)])
            parameter.data -= parameter.data @ u[:, None] * u
            parameter.data += pull / math.sqrt(hidden) * side[:, None] * u


def _map_to_successors(embed: torch.nn.Parameter, head: torch.nn.Parameter, words: range, seed: int) -> None:
    """Set the output layer so that every word has two possible successors, and the context decides between them.

    Half of the words have `+MOOD * d [H]` in their row, the others `-MOOD * d`. Embeddings have no part along `d`:
    its sign comes from attention and experts alone. Each half covers all words: a row is the sum of two embeddings.
    All other rows are 0: no special token is ever generated, so an answer always has the requested length.
    """
    hidden = embed.shape[1]
    d = torch.randn(hidden, generator=_generator(seed, "mood direction"))
    d /= d.norm()
    embed.data -= embed.data @ d[:, None] * d
    half = len(words) // 2
    order = words.start + torch.randperm(2 * half, generator=_generator(seed, "successor"))
    head.data.zero_()
    for sign, rows in ((1.0, order[:half]), (-1.0, order[half:])):
        before = words.start + torch.randperm(2 * half, generator=_generator(seed, f"predecessors {sign}"))
        pair = embed.data[before[:half]] + embed.data[before[half:]]
        head.data[rows] = pair / math.sqrt(hidden) + sign * MOOD * d


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


def main() -> None:
    """Command line: build one model and print where it is and how large."""
    parser = argparse.ArgumentParser(prog="python -m sglang_macs.tiny_models", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=sorted(BUILDERS), default="qwen3_vl_moe")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=SEED)
    options = vars(parser.parse_args())
    out = BUILDERS[options.pop("kind")](options.pop("out"), **options)
    size = sum(f.stat().st_size for f in out.iterdir())
    print(json.dumps({"model": str(out), "reference": str(reference_path(out)), "megabytes": round(size / 1e6, 1)}))


if __name__ == "__main__":
    main()
