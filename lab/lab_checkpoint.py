"""The lab's checkpoint on disk: a folder that transformers and SGLang load, and that `lab_model` reads back.

    python lab/lab_checkpoint.py OUT     # all but the weights: configuration, tokenizer, processor

The repository holds one copy, in the hub's layout (SGLang reads experts as [E, in, out]); `LabModel` and transformers
want [E, out, in]. `twin` makes the folder for transformers.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from lab_model import Architecture, LabModel
from lab_pictures import MERGE, PATCH, TOKEN
from lab_tokens import END, IMAGE, PAD, SPECIAL, START, VIDEO, VISION_END, VISION_START, VOCAB, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "models" / "lab-vl-moe"
TOKENS = (16, 1024)  # visual tokens per picture that the processor leaves as they are
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def config_json(arch: Architecture) -> dict:
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
        "rms_norm_eps": 1e-6,
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


def write_skeleton(out: Path, arch: Architecture) -> None:
    """Everything but the weights, through transformers' own classes."""
    from sglang_macs.cpu_compat import allow_torchvision
    from sglang_macs.tiny_models import CHAT_TEMPLATE

    allow_torchvision()
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLMoeConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    grid |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    area = TOKEN**2
    pixels = {"shortest_edge": TOKENS[0] * area, "longest_edge": TOKENS[1] * area}  # areas, whatever the names say
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    Qwen3VLMoeConfig(**config_json(arch)).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config_json(arch), indent=1) + "\n")
    (out / "lab.json").write_text(json.dumps({"architecture": arch.to_json()}, indent=1) + "\n")


def architecture(path: Path) -> Architecture:
    """Of the checkpoint at `path`."""
    fields = json.loads((Path(path) / "lab.json").read_text())["architecture"]
    return Architecture(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def save_weights(model: LabModel, path: Path) -> None:
    """model.safetensors in bf16 and the hub's layout."""
    from safetensors.torch import save_file

    state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(_turned(state), str(Path(path) / "model.safetensors"), metadata={"format": "pt"})


def load(path: Path | str = CHECKPOINT, device: torch.device | str = "cpu") -> LabModel:
    """The model at `path`, f32 copies of its bf16 weights."""
    from safetensors.torch import load_file

    model = LabModel(architecture(Path(path)))
    model.load_state_dict({k: v.float() for k, v in _turned(load_file(Path(path) / "model.safetensors")).items()})
    return model.to(device).eval()


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
    write_skeleton(parser.parse_args().out, Architecture())


if __name__ == "__main__":
    main()
