"""Draws charts, tables and text with matplotlib's renderer straight in pixels: its axes, layout and text objects cost
tens of milliseconds a picture.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path as File

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import get_font
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

Colour = Sequence[float]  # red, green and blue in 0..1
DPI = 72  # so that a point is a pixel
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")  # they ship with matplotlib
COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.15, 0.30, 0.85),
    "orange": (0.95, 0.55, 0.05),
    "purple": (0.55, 0.20, 0.70),
    "black": (0.05, 0.05, 0.05),
}
PAPERS = ((1.0, 1.0, 1.0), (0.98, 0.96, 0.90), (0.92, 0.95, 0.98), (0.94, 0.94, 0.94))
INK, GREY = (0.1, 0.1, 0.1), (0.75, 0.75, 0.75)


@functools.lru_cache(maxsize=8192)
def _glyph(font: str, pixels: int, character: str) -> tuple[np.ndarray, int, int, float]:
    """Coverage [h, w] f32 in 0..1, its left and its top above the baseline, and the advance; all in pixels."""
    face = get_font(str(File(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"))
    face.set_size(pixels, DPI)
    glyph = face.load_char(ord(character))
    left, bottom = (math.floor(side / 64) for side in glyph.bbox[:2])
    face.set_text(character)
    face.draw_glyphs_to_bitmap()
    coverage = np.asarray(face.get_image()).astype(np.float32) / 255  # with a row to spare below
    return coverage, left, len(coverage) - 1 + bottom, glyph.linearHoriAdvance / 65536


def text_width(words: str, font: str, pixels: int) -> float:
    return sum(_glyph(font, pixels, c)[3] for c in words)


class Canvas:
    """A picture of `width` x `height` pixels, the origin at its top left. Text comes over all shapes."""

    def __init__(self, width: int, height: int, paper: Colour = PAPERS[0]):
        self.width, self.height = width, height
        self.renderer = RendererAgg(width, height, DPI)
        self.flip = Affine2D().scale(1, -1).translate(0, height)
        self.words: list[tuple[float, float, str, str, int, Colour]] = []
        self.box(0, 0, width, height, paper)

    def picture(self) -> np.ndarray:
        """[3, height, width] u8."""
        image = np.asarray(self.renderer.buffer_rgba())[..., :3].astype(np.float32)
        for x, y, words, font, pixels, colour in self.words:
            for character in words:
                coverage, left, top, advance = _glyph(font, pixels, character)
                _blend(image, coverage, round(x) + left, round(y) - top, colour)
                x += advance
        return image.round().astype(np.uint8).transpose(2, 0, 1)

    def text(
        self, x: float, y: float, words: str, font: str, pixels: int, align: str = "left", colour: Colour = INK
    ) -> None:
        """y: of the capitals' middle; align: which part of the words is at x, or "center"."""
        shift = {"left": 0.0, "center": 0.5, "right": 1.0}[align]
        x -= shift * text_width(words, font, pixels)
        self.words.append((x, y + 0.36 * pixels, words, font, pixels, colour))

    def box(self, x: float, y: float, width: float, height: float, fill: Colour | None, edge: Colour | None = None):
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        self._draw(Path(corners), fill, edge)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour = INK, width: float = 1.0) -> None:
        self._draw(Path(points), None, colour, width)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        self._draw(Path([*points, points[0]]), fill, None)

    def circle(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self._draw(Path.unit_circle().transformed(Affine2D().scale(radius).translate(x, y)), fill, None)

    def wedge(self, x: float, y: float, radius: float, start: float, stop: float, fill: Colour) -> None:
        """Between two angles, in degrees, clockwise from the right."""
        self._draw(Path.wedge(start, stop).transformed(Affine2D().scale(radius).translate(x, y)), fill, PAPERS[0])

    def _draw(self, path: Path, fill: Colour | None, edge: Colour | None, width: float = 1.0) -> None:
        context = self.renderer.new_gc()
        context.set_linewidth(width if edge else 0.0)
        context.set_foreground((*(edge or INK), 1.0), isRGBA=True)
        self.renderer.draw_path(context, path, self.flip, None if fill is None else (*fill, 1.0))
        context.restore()


def _blend(image: np.ndarray, coverage: np.ndarray, x: int, y: int, colour: Colour) -> None:
    """Ink on `image` [height, width, 3]; what lies outside is cut off."""
    height, width = coverage.shape
    top, left = max(0, -y), max(0, -x)
    bottom, right = min(height, image.shape[0] - y), min(width, image.shape[1] - x)
    if bottom <= top or right <= left:
        return
    part = image[y + top : y + bottom, x + left : x + right]
    ink = coverage[top:bottom, left:right, None]
    part += ink * (np.array(colour, dtype=np.float32) * 255 - part)
