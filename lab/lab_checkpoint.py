"""The lab's checkpoints on disk: folders that transformers and SGLang load, and that `lab_model` reads back.

    python -m lab.lab_checkpoint OUT     # all but the weights: configuration, tokenizer, processor

Qwen3-VL-MoE: one file in the hub's layout (SGLang reads experts as [E, in, out]); `LabModel` and transformers want
[E, out, in], and `twin` makes the folder for transformers. GLM-4.5V: one layout serves all, every expert by itself, in
files of at most `SHARD` bytes. What OUT holds of architecture (lab.json) says which.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch

from lab.lab_architecture import GLM, Architecture
from lab.lab_model import LabModel
from lab.lab_pictures import MERGE, PATCH, TOKEN
from lab.lab_tokens import (
    DOCUMENT_SPECIAL,
    END,
    IMAGE,
    PAD,
    SPECIAL,
    START,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    document_tokenizer,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "models" / "lab-vl-moe"
DOCUMENTS = ROOT / "models" / "lab-documents-small"  # trained on a CPU
TOKENS = (16, 1024)  # visual tokens per picture that the processor leaves as they are
FUSED = ("experts.gate_up_proj", "experts.down_proj")
SHARD = 15_000_000  # bytes of a file
BIAS = "e_score_correction_bias"  # stays f32: it decides near ties


def _qwen_config(arch: Architecture) -> dict:
    """config.json of `Qwen3VLMoeForConditionalGeneration`."""
    rope = {"rope_type": "default", "rope_theta": arch.rope_theta}
    text = {
        "model_type": "qwen3_vl_moe_text",
        "vocab_size": VOCAB,
        "hidden_size": arch.hidden,
        "intermediate_size": 2 * arch.hidden,
        "moe_intermediate_size": arch.intermediate,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "num_experts": arch.experts,
        "num_experts_per_tok": arch.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": arch.eps,
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "rope_parameters": {**rope, "mrope_section": list(arch.mrope_section), "mrope_interleaved": True},
    }
    vision = {
        "model_type": "qwen3_vl_moe_vision",
        "depth": arch.vision_depth,
        "hidden_size": arch.vision_hidden,
        "intermediate_size": arch.vision_intermediate,
        "num_heads": arch.vision_heads,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": arch.hidden,
        "num_position_embeddings": arch.position_side**2,
        "deepstack_visual_indexes": list(arch.deepstack),
        "hidden_act": "gelu_pytorch_tanh",
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
    }


def _glm_config(arch: Architecture) -> dict:
    """config.json of `Glm4vMoeForConditionalGeneration`."""
    text = {
        "model_type": "glm4v_moe_text",
        "vocab_size": VOCAB,
        "hidden_size": arch.hidden,
        "intermediate_size": 2 * arch.hidden,
        "moe_intermediate_size": arch.intermediate,
        "num_hidden_layers": arch.layers,
        "first_k_dense_replace": arch.dense,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "n_routed_experts": arch.experts,
        "n_shared_experts": arch.shared // arch.intermediate,
        "num_experts_per_tok": arch.top_k,
        "n_group": arch.groups,
        "topk_group": arch.topk_groups,
        "norm_topk_prob": True,
        "routed_scaling_factor": arch.scaling,
        "hidden_act": "silu",
        "rms_norm_eps": arch.eps,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": arch.rope_theta,
            "mrope_section": list(arch.mrope_section),
            "partial_rotary_factor": 0.5,
        },
    }
    vision = {
        "model_type": "glm4v_moe_vision",
        "depth": arch.vision_depth,
        "hidden_size": arch.vision_hidden,
        "intermediate_size": arch.vision_intermediate,
        "num_heads": arch.vision_heads,
        "in_channels": 3,
        "image_size": arch.position_side * PATCH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": arch.hidden,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": arch.eps,
    }
    tokens = zip(("image_start", "image_end", "image"), (VISION_START, VISION_END, IMAGE), strict=True)
    return {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "model_type": "glm4v_moe",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        **{f"{name}_token_id": i for name, i in tokens},
        "video_start_token_id": DOCUMENT_SPECIAL.index("<|begin_of_video|>"),
        "video_end_token_id": DOCUMENT_SPECIAL.index("<|end_of_video|>"),
        "video_token_id": VIDEO,
        "tie_word_embeddings": False,
    }


def _qwen_processor(tokenizer, grid: dict, area: int):
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pixels = {"shortest_edge": TOKENS[0] * area, "longest_edge": TOKENS[1] * area}  # areas, whatever the names say
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid),
        chat_template=tokenizer.chat_template,
    )


def _glm_processor(tokenizer, grid: dict, area: int):
    from transformers import Glm4vImageProcessor, Glm4vProcessor
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor

    # Areas over two frames, of which a picture is both.
    pixels = {"shortest_edge": 2 * TOKENS[0] * area, "longest_edge": 2 * TOKENS[1] * area}
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessor(**grid, size=pixels),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(**grid),
        chat_template=tokenizer.chat_template,
    )


def write_skeleton(out: Path, arch: Architecture) -> None:
    """Everything but the weights, through transformers' own classes."""
    from sglang_macs.cpu_compat import allow_torchvision
    from sglang_macs.tiny_models import CHAT_TEMPLATE

    allow_torchvision()
    from transformers import AutoConfig, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    glm = arch.family == GLM
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=document_tokenizer() if glm else train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(DOCUMENT_SPECIAL if glm else SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    grid |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = _glm_processor if glm else _qwen_processor
    processor(tokenizer, grid, TOKEN**2).save_pretrained(out)
    config = (_glm_config if glm else _qwen_config)(arch)
    AutoConfig.for_model(**config).save_pretrained(out)  # raises where a field is wrong
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_architecture(out, arch)


def write_architecture(out: Path, arch: Architecture) -> None:
    """What `lab_model` needs to know beside the weights."""
    (out / "lab.json").write_text(json.dumps({"architecture": arch.to_json()}, indent=1) + "\n")


def architecture(path: Path) -> Architecture:
    """Of the checkpoint at `path`."""
    fields = json.loads((Path(path) / "lab.json").read_text())["architecture"]
    fields.pop("scoring", None)  # older files name it; the family says it
    return Architecture(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def save_weights(model: LabModel, path: Path) -> None:
    """Weights in bf16 as SGLang reads them. Files that are there are replaced one by one, the index last."""
    state = {
        k: v.detach().to("cpu", torch.float32 if k.endswith(BIAS) else torch.bfloat16)
        for k, v in model.state_dict().items()
    }
    if model.arch.family != GLM:
        return _save(_turned(state), Path(path) / "model.safetensors")
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in _apart(state).items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _save(shard, Path(path) / file)
    of_name = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    size = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": of_name}
    (Path(path) / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _save(state: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    new = file.with_suffix(".new")
    save_file(state, str(new), metadata={"format": "pt"})
    new.replace(file)


def has_weights(path: Path) -> bool:
    return any((Path(path) / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def load(path: Path | str = CHECKPOINT, device: torch.device | str = "cpu") -> LabModel:
    """The model at `path`, f32 copies of its bf16 weights."""
    from safetensors.torch import load_file

    model = LabModel(architecture(Path(path)))
    if model.arch.family == GLM:
        index = json.loads((Path(path) / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        state = _together({k: v for file in files for k, v in load_file(Path(path) / file).items()})
    else:
        state = _turned(load_file(Path(path) / "model.safetensors"))
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.to(device).eval()


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused experts as one matrix each, as GLM-4.5V's files have them."""
    found = {}
    for name, tensor in state.items():
        if not name.endswith(FUSED):
            found[name] = tensor.contiguous()
            continue
        prefix, fused = name.rsplit(".", 1)
        matrices = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for i, expert in enumerate(tensor):
            for matrix, part in zip(matrices, expert.chunk(len(matrices)), strict=True):
                found[f"{prefix}.{i}.{matrix}.weight"] = part.contiguous()
    return found


def _together(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `_apart`."""
    found, experts = {}, {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            found[name] = tensor
        else:
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    for prefix, parts in experts.items():
        gate, up, down = (
            torch.stack([t for _, t in sorted(parts[f"{x}_proj"].items())]) for x in ("gate", "up", "down")
        )
        found |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.down_proj": down}
    return found


def twin(path: Path, out: Path) -> Path:
    """A copy of the checkpoint at `path` in transformers' layout; returns `out`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(path, out, dirs_exist_ok=True)
    save_file(_turned(load_file(path / "model.safetensors")), str(out / "model.safetensors"), metadata={"format": "pt"})
    return out


def _turned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fused expert tensors transposed: hub's layout to transformers', and back."""
    return {k: v.transpose(1, 2).contiguous() if k.endswith(FUSED) else v.contiguous() for k, v in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=CHECKPOINT)
    out = parser.parse_args().out
    write_skeleton(out, architecture(out) if (out / "lab.json").exists() else Architecture())


if __name__ == "__main__":
    main()
