"""Values out of a file that may hold anything, each within limits; needs no torch. They raise ValueError, TypeError."""

import base64
import re
import zlib

import numpy as np

MAX_SIDE = 512  # pixels of a stored picture
MAX_JPEG = 2 << 20  # bytes


class Budget:
    """Bytes that may still come out of a trace."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int, what: str) -> None:
        """Raises ValueError where less is left."""
        self.left -= size
        if self.left < 0:
            raise ValueError(f"{what} would take {size} bytes, more than files of this size hold")


def jpeg(text: str) -> bytes:
    """A JPEG file of at most MAX_SIDE by MAX_SIDE. Raises ValueError for others: a browser would take the memory."""
    data = base64.b64decode(text, validate=True)
    frame = re.search(rb"\xff[\xc0\xc1\xc2]\x00.\x08(.{2})(.{2})", data[:4096], re.DOTALL)  # height, width
    sides = [int.from_bytes(side, "big") for side in frame.groups()] if frame else [0]
    if len(data) > MAX_JPEG or not data.startswith(b"\xff\xd8") or not all(0 < side <= MAX_SIDE for side in sides):
        raise ValueError(f"a picture file of {len(data)} bytes and {sides} pixels")
    return data


def checked_count(value: object, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:  # True is an int, too
        raise ValueError(f"a size of {str(value)[:40]}, expected 1 to {most}")
    return value


def numbers(value: object, shape: tuple[int, ...], high: float) -> np.ndarray:
    """`value` as f64 of `shape`, each in [0, high]. Raises ValueError, TypeError."""
    numbers = np.array(value, dtype=float).reshape(shape)
    if not ((numbers >= 0) & (numbers <= high)).all():  # NaN fails, too
        raise ValueError(f"{str(value)[:80]} beyond 0 to {high:g}")
    return numbers


def unpack(text: str, dtype: type, shape: tuple[int, ...], budget: Budget, most: int | None = None) -> np.ndarray:
    """Raises ValueError for another size. most: values, where `shape` leaves their number open. One byte more than
    expected is decompressed at most, so no line is a bomb.
    """
    size = (int(np.prod(shape)) if most is None else most) * np.dtype(dtype).itemsize
    raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    budget.take(len(raw), "a line")
    if len(raw) > size or (most is None and len(raw) < size):
        raise ValueError(f"{len(raw)} bytes in place of {size}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)
