"""What the lab's pictures are made of: scikit-learn's handwritten digits and its two photographs.

    python -m lab.lab_material OUT.npz     # for a machine without scikit-learn

A quarter of the digits is held out: no picture that a model is judged on shows a digit that it was trained on. Digits
that a cross-validated classifier misreads are left out of both parts, since nobody can say what they are.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GLYPH = 24  # pixels per side of a digit's window
SIZES = (16, 24)  # sides to which the 8 x 8 digits are scaled
HELD_OUT = 4  # every 4th digit of a class
PHOTOGRAPHS = ("temple", "flower")  # china.jpg shows the Summer Palace's temple
SEED = 20


@dataclass(frozen=True)
class Material:
    """Glyphs of one part and the photographs, on one device.

    glyphs [2, V, 24, 24] f32: alpha in [0, 1], by size and variant; of_class [10, n] i64: variants of a digit;
    photographs [2, 3, 427, 640] f32 in 0..255.
    """

    glyphs: Tensor
    of_class: Tensor
    photographs: Tensor


def read(path: Path | str | None = None) -> dict[str, np.ndarray]:
    """digits [N, 8, 8] u8 (0..16), classes [N], photographs [2, 427, 640, 3] u8, from scikit-learn or from `path`."""
    if path is not None:
        return dict(np.load(path))
    from sklearn.datasets import load_digits, load_sample_image
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    digits = load_digits()
    legible = cross_val_predict(SVC(gamma=0.001, C=10), digits.data, digits.target, cv=10) == digits.target
    return {
        "digits": digits.images[legible].astype(np.uint8),
        "classes": digits.target[legible],
        "photographs": np.stack([load_sample_image(f"{name}.jpg") for name in ("china", "flower")]),
    }


def load(part: str, device: torch.device | str = "cpu", path: Path | str | None = None, variants: int = 16) -> Material:
    """The digits of one `part`, "train" (with `variants` distortions of each) or "held_out" (as they are)."""
    raw = read(path)
    digits, classes = torch.from_numpy(raw["digits"]).float() / 16, torch.from_numpy(raw["classes"]).long()
    chosen = [_part_of(torch.nonzero(classes == c)[:, 0], part) for c in range(10)]
    fewest = min(map(len, chosen))
    images = torch.stack([digits[index[:fewest]] for index in chosen]).to(device)  # [10, n, 8, 8]
    flat = images.flatten(0, 1)
    if part == "train":
        flat = _distort(flat.repeat_interleave(variants, 0))
    glyphs = torch.stack([_window(flat, side) for side in SIZES])
    of_class = torch.arange(flat.shape[0], device=device).view(10, -1)
    photographs = torch.from_numpy(raw["photographs"]).permute(0, 3, 1, 2).float().contiguous().to(device)
    return Material(glyphs, of_class, photographs)


def _part_of(index: Tensor, part: str) -> Tensor:
    held_out = torch.arange(len(index)) % HELD_OUT == HELD_OUT - 1
    return index[held_out if part == "held_out" else ~held_out]


def _window(images: Tensor, side: int) -> Tensor:
    """[n, 8, 8] -> [n, 24, 24]: scaled to `side`, in the window's middle."""
    scaled = F.interpolate(images[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]
    pad = (GLYPH - side) // 2
    return F.pad((1.4 * scaled).clamp(0, 1), (pad, pad, pad, pad))


def _distort(images: Tensor) -> Tensor:
    """[n, 8, 8], each slightly turned, sheared, scaled and moved; the same for the same number of images."""
    generator = torch.Generator().manual_seed(SEED)
    n = images.shape[0]

    def draw(spread: float) -> Tensor:
        return ((torch.rand(n, generator=generator) * 2 - 1) * spread).to(images.device)

    angle, shear, scale = draw(0.17), draw(0.15), 1 + draw(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin + shear, draw(0.1), sin, cos, draw(0.1)], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, 8, 8), align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    np.savez_compressed(parser.parse_args().out, **read())


if __name__ == "__main__":
    main()
