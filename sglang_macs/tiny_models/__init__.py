"""Builds tiny random checkpoints for tests, demos and laptops. No hub, about 5 MB each.

    python -m sglang_macs.tiny_models OUT [--kind KIND] [--seed 4]

The weights are random, but not blindly so. A tiny model must show what a large one shows:

* greedy tokens that depend on the context and yet do not hinge on bfloat16 rounding: the output layer gives each word
  two possible successors, far ahead of all others, and what attention and the experts add decides between the two;
* an unequal expert load: in a model with pictures a direction `u` separates visual tokens from text, and the routers
  send what points along `u` to the first half of the experts, so rank 0 of two is the slow one (`VISUAL_PULL`).
"""

import hashlib
import json
from pathlib import Path

from .common import CHAT_TEMPLATE, SEED
from .families import build_deepseek_v3, build_glm4v_moe, build_internvl, build_kimi_vl, build_qwen3_omni
from .qwen3 import PIXELS_PER_TOKEN, build_qwen3_moe, build_qwen3_vl_moe
from .qwen3_5 import build_qwen3_5_moe
from .weights import VISUAL_PULL

__all__ = [
    "BUILDERS",
    "CHAT_TEMPLATE",
    "PICTURE_SLOTS",
    "PIXELS_PER_TOKEN",
    "SEED",
    "VIDEO_SLOTS",
    "VISUAL_PULL",
    "build_deepseek_v3",
    "build_glm4v_moe",
    "build_internvl",
    "build_kimi_vl",
    "build_qwen3_5_moe",
    "build_qwen3_moe",
    "build_qwen3_omni",
    "build_qwen3_vl_moe",
    "ensure",
    "reference_path",
]

BUILDERS = {
    "qwen3_moe": build_qwen3_moe,
    "qwen3_vl_moe": build_qwen3_vl_moe,
    "internvl": build_internvl,
    "kimi_vl": build_kimi_vl,
    "glm4v_moe": build_glm4v_moe,
    "qwen3_omni": build_qwen3_omni,
    "qwen3_5_moe": build_qwen3_5_moe,
    "deepseek_v3": build_deepseek_v3,
}

_QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
PICTURE_SLOTS = {  # what stands for a picture in a prompt, by kind; the others take none
    "qwen3_vl_moe": _QWEN_SLOT,
    "internvl": "<image>",
    "kimi_vl": "<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
    "glm4v_moe": "<|begin_of_image|><|image|><|end_of_image|>",
    "qwen3_omni": _QWEN_SLOT,
    "qwen3_5_moe": _QWEN_SLOT,
}
VIDEO_SLOTS = {  # the same for a video
    "qwen3_vl_moe": "<|vision_start|><|video_pad|><|vision_end|>",
    "internvl": "<video>",
    "glm4v_moe": "<|begin_of_video|><|video|><|end_of_video|>",
    "qwen3_omni": "<|vision_start|><|video_pad|><|vision_end|>",
}


def reference_path(path: Path | str) -> Path:
    """Where transformers finds the model at `path`: its `-hfref` twin, or `path` itself where one layout serves all."""
    twin = Path(f"{Path(path)}-hfref")
    return twin if twin.exists() else Path(path)


def ensure(out: Path | str, kind: str = "qwen3_vl_moe", **options) -> Path:
    """Build the model at `out` unless it is there already, made by this very code with these options; returns `out`."""
    out = Path(out)
    stamp = out / "built_from.json"
    wanted = {"builder": _sources(), "kind": kind, **options}
    if not (stamp.exists() and json.loads(stamp.read_text()) == wanted):
        BUILDERS[kind](out, **options)
        stamp.write_text(json.dumps(wanted))  # last: an interrupted build has none
    return out


def _sources() -> str:
    """Digest of this package's files."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
