"""Kimi-VL's processor, which is no part of transformers: checkpoints carry it as remote code, the tiny one this file.

Square patches of `patch_size` pixels, `MERGE` x `MERGE` of them to a visual token. SGLang reads `pixel_values`
[patches, 3, patch_size, patch_size] and `image_grid_hws` [pictures, 2], in patches.
"""

import math

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

MERGE = 2
IMAGE_TOKEN = "<|media_pad|>"


class KimiVLImageProcessor(BaseImageProcessor):
    """Resizes a picture to whole visual tokens, `max_patches` patches at most."""

    model_type = "kimi_vl"

    def __init__(self, patch_size: int = 14, max_patches: int = 640, **kwargs) -> None:
        super().__init__(**kwargs)
        self.patch_size, self.max_patches = patch_size, max_patches

    def __call__(self, images, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        images = images if isinstance(images, list | tuple) else [images]
        pictures = [self._patches(image.convert("RGB")) for image in images]
        pixels, grids = zip(*pictures, strict=True)
        return BatchFeature({"pixel_values": torch.cat(pixels), "image_grid_hws": torch.tensor(grids)})

    def _patches(self, image) -> tuple[torch.Tensor, tuple[int, int]]:
        """[patches, 3, P, P] in [-1, 1], and their rows and columns."""
        size, step = self.patch_size, self.patch_size * MERGE
        shrink = min(1.0, math.sqrt(self.max_patches * size * size / (image.width * image.height)))
        width, height = (max(1, int(side * shrink) // step) * step for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height)))).float() / 127.5 - 1  # [height, width, 3]
        rows, columns = height // size, width // size
        patches = pixels.view(rows, size, columns, size, 3).permute(0, 2, 4, 1, 3)
        return patches.reshape(rows * columns, 3, size, size), (rows, columns)


class KimiVLProcessor(ProcessorMixin):
    """Puts as many image tokens into the text as the pictures have visual ones."""

    attributes = ("image_processor", "tokenizer")
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs) -> None:
        self.image_token = IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, return_tensors=None, **kwargs) -> BatchFeature:
        texts = [text] if isinstance(text, str) else list(text)
        features = dict(self.image_processor(images)) if images else {}
        tokens = iter(math.prod(grid) // MERGE**2 for grid in features.get("image_grid_hws", torch.zeros(0)).tolist())
        for i, one in enumerate(texts):
            before, *after = one.split(IMAGE_TOKEN)
            texts[i] = before + "".join(IMAGE_TOKEN * next(tokens) + rest for rest in after)
        return BatchFeature({**self.tokenizer(texts, return_tensors="pt"), **features})
