"""The tiny checkpoint of each family as its server wants it: layout, flags, and how a prompt marks pictures."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.serving import CPU_ARGS, EP2_ARGS, photograph_files
from sglang_macs import tiny_models

MODELS = Path(__file__).resolve().parents[2] / "build" / "models"
ATTENTION_TP = ("--tp", "2", "--ep-size", "2", *CPU_ARGS)


@dataclass(frozen=True)
class Family:
    """One kind of `tiny_models.BUILDERS`.

    kind: the builder's name; folder: below build/models.
    around: what a picture leaves in a prompt beside its visual tokens.
    video: visual tokens of `animation()`, 0 where SGLang takes no videos for it.
    decisive: texts to which the two best logits of transformers' answer stay 0.4 apart, so that bfloat16 does not
    decide it.
    """

    kind: str
    folder: str
    decisive: tuple[str, ...]
    around: str = ""
    video: int = 0
    layout: tuple[str, ...] = tuple(EP2_ARGS)

    @property
    def slot(self) -> str:
        """What stands for a picture in a prompt."""
        return tiny_models.PICTURE_SLOTS.get(self.kind, "")

    def build(self) -> Path:
        return tiny_models.ensure(MODELS / self.folder, self.kind)

    def prompt(self, text: str, pictures: int = 0) -> str:
        """One user turn, the pictures behind the text: prompts that differ in it share no prefix with a picture."""
        return f"<|im_start|>user\n{text}{self.slot * pictures}<|im_end|>\n<|im_start|>assistant\n"

    def about_video(self, text: str) -> str:
        """One user turn about one video."""
        return f"<|im_start|>user\n{text}{tiny_models.VIDEO_SLOTS[self.kind]}<|im_end|>\n<|im_start|>assistant\n"

    def around_pictures(self, text: str, pictures: int) -> str:
        """`prompt` without its visual tokens."""
        return self.prompt(text, pictures).replace(self.slot, self.around) if pictures else self.prompt(text)


FAMILIES = {
    "Qwen3-MoE": Family("qwen3_moe", "tiny-qwen3-moe", ("hello world", "Why is the sky blue?")),
    "Qwen3-VL-MoE": Family(
        "qwen3_vl_moe",
        "tiny-qwen3-vl-moe",
        ("hello world", "Why is the sky blue?"),
        around="<|vision_start|><|vision_end|>",
        video=200,
    ),
    # InternViT sums over all ranks, so none of them may be without the picture.
    "InternVL3.5": Family(
        "internvl",
        "tiny-InternVL3_5",
        ("Why is the sky blue?", "Once upon a time"),
        around="<img></img>",
        video=512,  # SGLang shows it 32 frames, whatever the video has
        layout=ATTENTION_TP,
    ),
    "Kimi-VL": Family(
        "kimi_vl",
        "tiny-kimi-vl",
        ("Why do birds sing?", "Write a poem."),
        around="<|media_start|>image<|media_content|><|media_end|>",
        layout=(*EP2_ARGS, "--trust-remote-code"),
    ),
    "GLM-4.5V": Family(
        "glm4v_moe",
        "tiny-glm4v-moe",
        ("Who waits for whom?", "List the planets."),
        around="<|begin_of_image|><|end_of_image|>",
        video=128,
        layout=(*EP2_ARGS, "--mm-enable-dp-encoder"),
    ),
    # The tower of sounds sums over all ranks, as InternViT does.
    "Qwen3-Omni": Family(
        "qwen3_omni",
        "tiny-qwen3-omni",
        ("Why is the sky blue?", "hello world"),
        around="<|vision_start|><|vision_end|>",
        video=200,
        layout=ATTENTION_TP,
    ),
    "DeepSeek-V3": Family("deepseek_v3", "tiny-deepseek-v3", ("How far is the moon?", "How does a mill work?")),
}


@functools.cache
def animation(frames: int = 4, side: int = 224, per_second: int = 2) -> bytes:
    """A square that wanders over both photographs, as an animated PNG."""
    shown = []
    for i in range(frames):
        content = list(photograph_files().values())[i % 2]
        photograph = Image.open(io.BytesIO(content))
        shown.append(photograph.crop((8 * i, 8 * i, 8 * i + side, 8 * i + side)))
    file = io.BytesIO()
    shown[0].save(file, "PNG", save_all=True, append_images=shown[1:], duration=1000 // per_second)
    return file.getvalue()
