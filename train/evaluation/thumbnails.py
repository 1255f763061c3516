"""Thumbnails of images for a report, and how each image looks: size and brightness."""

import base64
import io
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from serve.contract.images import MOST_MEGAPIXELS, load_image, read_image_file
from serve.contract.profiles import to_srgb
from serve.contract.scaling import extent_of
from serve.processors import available_processors
from train.data.reading import Shrink

THUMBNAIL = (120, 96)  # pixels; whole images, not what the network sees of them
QUALITY = 60  # of JPEG: 2 to 4 kB an image
FEW_PIXELS = Shrink(THUMBNAIL[1])  # JPEGs need not be decoded whole


class Seen(NamedTuple):
    """An upright image as a report shows it."""

    width: int
    height: int
    brightness: float
    """Mean of the grey levels, 0 to 255."""
    jpeg: bytes
    """Empty where only the looks were wanted."""

    @property
    def uri(self) -> str:
        """The thumbnail as a data URI."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def see_image(data: bytes, shown: bool) -> Seen:
    """Raises UserError for a file that cannot be decoded."""
    image = load_image(data, FEW_PIXELS.decode, max_megapixels=MOST_MEGAPIXELS)
    width, height = extent_of(image).size
    image.thumbnail(THUMBNAIL)
    image, file = to_srgb(image), io.BytesIO()
    if shown:
        Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=QUALITY)  # without metadata
    return Seen(width, height, float(np.asarray(image.convert("L")).mean()), file.getvalue())


def see_images(files: Mapping[int, Path], shown: Collection[int]) -> dict[int, Seen]:
    """Read images in threads, with thumbnails of `shown`; those that cannot be read are left out."""

    def see(i: int) -> Seen | None:
        try:
            return see_image(read_image_file(files[i]), i in shown)
        except (OSError, ValueError):
            return None

    with ThreadPoolExecutor(available_processors()) as pool:
        found = dict(zip(files, pool.map(see, files), strict=True))
    return {i: seen for i, seen in found.items() if seen}
