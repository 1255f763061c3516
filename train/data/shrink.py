"""Make large images smaller before random crops are cut from them, and decode no more of a JPEG than that
takes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.orientation import on_its_side
from serve.contract.preprocess import RESAMPLING

Size = tuple[int, int]  # width, height

FILTER = "lanczos"
LEAST_RATIO = 3  # of what is decoded to what is kept
SCALES = (8, 4, 2)  # by which libjpeg can leave pixels out


@dataclass(frozen=True)
class Shrunk:
    """Images with a longer shorter side than that are made smaller."""

    short_side: int

    def size(self, original: Size) -> Size:
        width, height = original
        if min(original) <= self.short_side:
            return original
        scale = self.short_side / min(original)
        return max(self.short_side, round(width * scale)), max(self.short_side, round(height * scale))

    def decode(self, image: Image.Image) -> Image.Image:
        """Read the pixels of an opened file; for `load_image`.

        A JPEG is decoded at an eighth, a quarter or half of its size where that is still three times as
        large as what is kept, and then made so small. From what whole decoding gives, that is 0.4 of 255
        levels off in the mean and 12 at most (100 photographs; another filter is 2 off in the mean). 12
        megapixels take a third to a seventh of the time.
        """
        width, height = image.size
        scale = next((s for s in SCALES if min(image.size) >= s * LEAST_RATIO * self.short_side), 1)
        if scale == 1 or image.format not in ("JPEG", "MPO"):
            image.load()
            return image
        lying = on_its_side(image)
        smaller = self.size((height, width) if lying else (width, height))
        image.draft(None, (width // scale, height // scale))
        scale = round(width / image.width)  # as libjpeg has it
        # the last row and column of pixels reach beyond the edge when the sides cannot be divided
        box = (0.0, 0.0, width / scale, height / scale)
        return image.resize(smaller[::-1] if lying else smaller, RESAMPLING[FILTER], box=box)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB, upright -> uint8 [H, W, 3]."""
        smaller = self.size(image.size)
        return np.asarray(image if smaller == image.size else image.resize(smaller, RESAMPLING[FILTER]))
