"""Draws batches of pictures on any device: digits in colour on a plain, noisy or photographed background.

All shapes depend on sizes alone, so that a training step with its pictures fits into one CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lab.lab_material import GLYPH, Material

PATCH, MERGE = 8, 2
TOKEN = PATCH * MERGE  # pixels per side of a visual token
CELL = 32  # pixels per side of the cell that one digit moves in
COLOURS = {
    "red": (235, 45, 45),
    "green": (40, 205, 70),
    "blue": (80, 110, 255),
    "yellow": (240, 225, 45),
    "white": (255, 255, 255),
}
BACKGROUNDS = ("nothing", "noise", "temple", "flower")
BACKGROUND_ODDS = (0.4, 0.2, 0.2, 0.2)


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, multiples of 16, of so many pictures a request; digits lie in cells of `CELL`."""

    height: int
    width: int
    pictures: int = 1

    @property
    def cells(self) -> tuple[int, int]:
        return self.height // CELL, self.width // CELL

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // PATCH, self.width // PATCH

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return (self.height // TOKEN) * (self.width // TOKEN)


@dataclass(frozen=True)
class Scene:
    """What is in n pictures: digit, colour and cell [n, N] i64 of up to N digits, which of them are `on` [n, N] bool,
    and the background [n] i64.
    """

    digit: Tensor
    colour: Tensor
    row: Tensor
    column: Tensor
    on: Tensor
    background: Tensor


def draw_background(n: int, device: torch.device | str) -> Tensor:
    """[n] i64 into `BACKGROUNDS`."""
    u, kind, below = torch.rand(n, device=device), torch.zeros(n, dtype=torch.long, device=device), 0.0
    for odds in BACKGROUND_ODDS[:-1]:
        below += odds
        kind = kind + (u >= below)
    return kind


def join(scenes: list[Scene]) -> Scene:
    """Scenes of the same N, one after another."""
    return Scene(*(torch.cat([getattr(s, name) for s in scenes]) for name in Scene.__dataclass_fields__))


def paint(scene: Scene, size: Size, material: Material) -> Tensor:
    """The pictures [n, 3, height, width] f32, whole numbers in 0..255."""
    device, (n, slots) = scene.digit.device, scene.digit.shape
    background = _backgrounds(scene.background, size, material)
    of_digit = material.of_class[scene.digit]  # [n, N, variants]
    pick = torch.randint(of_digit.shape[-1], (n, slots, 1), device=device)
    side = torch.randint(len(material.glyphs), (n, slots), device=device)
    alpha = material.glyphs[side, of_digit.gather(2, pick)[..., 0]] * scene.on[..., None, None]  # [n, N, 24, 24]

    jitter = CELL - GLYPH + 1
    y = scene.row * CELL + torch.randint(jitter, (n, slots), device=device)
    x = scene.column * CELL + torch.randint(jitter, (n, slots), device=device)
    step = torch.arange(GLYPH, device=device)
    rows = (y[..., None] + step).clamp(max=size.height - 1)
    columns = (x[..., None] + step).clamp(max=size.width - 1)
    where = (rows[..., :, None] * size.width + columns[..., None, :]).flatten(1)  # [n, N * 24 * 24]
    rgb = torch.stack([_column(device, [c[i] for c in COLOURS.values()]) for i in range(3)])  # [3, colours]
    ink = torch.zeros(n, 4, size.height * size.width, device=device)
    shades = torch.cat([rgb[:, scene.colour].transpose(0, 1), torch.ones(n, 1, slots, device=device)], 1)  # [n, 4, N]
    ink.scatter_add_(2, where[:, None].expand(-1, 4, -1), (shades[..., None, None] * alpha[:, None]).flatten(2))
    ink = ink.view(n, 4, size.height, size.width)
    return (background * (1 - ink[:, 3:]) + ink[:, :3]).round_().clamp_(0, 255)


def patches(pictures: Tensor) -> Tensor:
    """[n, P, 3 * 8 * 8]: normalised patches in the processor's order, merge block by merge block; of u8 or f32."""
    n, _, height, width = pictures.shape
    x = (pictures.float() / 255 - 0.5) / 0.5
    x = x.view(n, 3, height // TOKEN, MERGE, PATCH, width // TOKEN, MERGE, PATCH)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n, -1, 3 * PATCH * PATCH)


def _column(device, values: list[float]) -> Tensor:
    """A small constant made on the device: a copy from the host would not go into a CUDA graph."""
    return torch.cat([torch.full((1,), float(v), device=device) for v in values])


def _backgrounds(kind: Tensor, size: Size, material: Material) -> Tensor:
    """[n, 3, height, width]; dark enough for the digits to stand out."""
    n, device, (height, width) = kind.shape[0], kind.device, (size.height, size.width)
    kind = kind[:, None, None, None]
    plain = torch.rand(n, 3, 1, 1, device=device) * 60
    coarse = torch.rand(n, 3, height // 8, width // 8, device=device) * 60
    noise = coarse[:, :, :, None, :, None].expand(-1, -1, -1, 8, -1, 8).reshape(n, 3, height, width)
    noise = noise + torch.rand(n, 3, height, width, device=device) * 30
    return torch.where(kind == 0, plain, torch.where(kind == 1, noise, _crops(kind[:, 0, 0, 0], size, material)))


def _crops(kind: Tensor, size: Size, material: Material) -> Tensor:
    """Random crops of the photographs, at 40 % of their brightness."""
    n, device = kind.shape[0], kind.device
    count, _, tall, wide = material.photographs.shape
    which = (kind - 2).clamp(0, count - 1)
    top = torch.randint(tall - size.height + 1, (n, 1), device=device) + torch.arange(size.height, device=device)
    left = torch.randint(wide - size.width + 1, (n, 1), device=device) + torch.arange(size.width, device=device)
    index = (which[:, None, None], slice(None), top[:, :, None], left[:, None, :])
    return 0.4 * material.photographs[index].permute(0, 3, 1, 2)
