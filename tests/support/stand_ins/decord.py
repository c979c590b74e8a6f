"""What SGLang asks of decord, for animated pictures that Pillow can read: the real one needs FFmpeg."""

import numpy as np
from PIL import Image, ImageSequence


class Frames:
    def __init__(self, shown: np.ndarray) -> None:
        self.shown = shown

    def asnumpy(self) -> np.ndarray:
        return self.shown


class VideoReader:
    """Frames [H, W, 3] u8 of an animated picture."""

    def __init__(self, path: str, ctx: object = None) -> None:
        picture = Image.open(path)
        self.shown = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])
        self.per_second = 1000 / picture.info["duration"]

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, index: int) -> Frames:
        return Frames(self.shown[index])

    def get_avg_fps(self) -> float:
        return self.per_second

    def get_batch(self, indices: list[int]) -> Frames:
        return Frames(self.shown[list(indices)])


def cpu(number: int) -> None:
    """The device, of which there is one."""
