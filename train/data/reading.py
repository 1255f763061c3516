"""Reading of image files for training: again after a bad moment of the file system, and made smaller."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.heic import heic_version
from serve.contract.images import MOST_MEGAPIXELS, load_image, load_whole, read_image_file
from serve.contract.orientation import on_its_side
from serve.contract.preprocess import RESAMPLING
from serve.contract.profiles import to_srgb

Pixels = NDArray[np.uint8]  # [H, W, 3]
Size = tuple[int, int]  # width, height

DECODER = ", ".join([f"2, Pillow {PIL.__version__}", *map(" ".join, heic_version().items())])
"""Part of every key of a cache of decoded images. Count up where `load_image` decodes otherwise."""
PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and last attempt
FILTER = "lanczos"
LEAST_RATIO = 3  # of what is decoded to what is kept
SCALES = (8, 4, 2)  # by which libjpeg can leave pixels out


class ChangedError(UserError):
    """The file is not the one that was scanned."""


def read_image(
    path: Path, decode: Callable[[Image.Image], Image.Image] = load_whole, sha256: str = ""
) -> Image.Image:
    """Return the image in RGB, upright, after at most four attempts.

    Args:
        decode: as in `load_image`.
        sha256: of the file's bytes, if known.

    Raises:
        OSError, ValueError: of the last attempt. ChangedError: the bytes have another hash.
    """

    def attempt() -> Image.Image:
        data = read_image_file(path)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ChangedError(f"{path} has changed since it was scanned")
        return load_image(data, decode, max_megapixels=MOST_MEGAPIXELS)  # the scan has accepted it

    for pause in PAUSES:
        try:
            return attempt()
        except (OSError, ValueError):
            time.sleep(pause)
    return attempt()


@dataclass(frozen=True)
class Shrink:
    """Makes images smaller whose shorter side is longer than `short_side`."""

    short_side: int

    def size(self, original: Size) -> Size:
        """Return an image's size after shrinking."""
        width, height = original
        if min(original) <= self.short_side:
            return original
        scale = self.short_side / min(original)
        return max(self.short_side, round(width * scale)), max(self.short_side, round(height * scale))

    def decode(self, image: Image.Image) -> Image.Image:
        """Read the pixels of an opened file, for `load_image`, and no more of a JPEG than is needed.

        A JPEG is decoded at an eighth, a quarter or half of its size where that is still three times as
        large as what is kept. The result differs from that of decoding all by 0.4 of 255 levels in the mean
        and by 12 at most (100 photographs); 12 megapixels take a third to a seventh of the time.
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

    def __call__(self, image: Image.Image) -> Pixels:
        """Return the pixels of an upright RGB image, in sRGB."""
        smaller = self.size(image.size)
        resized = image if smaller == image.size else image.resize(smaller, RESAMPLING[FILTER])
        return np.asarray(to_srgb(resized))
