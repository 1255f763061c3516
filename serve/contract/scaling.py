"""JPEGs decoded at a half, a quarter or an eighth of their size, and what such an image shows.

libjpeg then transforms fewer frequencies of each block of 8 x 8 pixels. Only work on pixels is saved: the
file is still read to its end, so a truncated one is found as before.
"""

from typing import NamedTuple

from PIL import Image

from serve.contract.orientation import TURNS

Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, upper, right, lower

LEAST_RATIO = 3
"""Pixels that are decoded, for each one that is kept, on a side."""
SCALES = (8, 4, 2)
EXTENT = "purebred.extent"  # in Image.info
FROM_THE_RIGHT = (2, 3, 6, 7)  # orientations whose first column or row of pixels is at the right
FROM_THE_BOTTOM = (3, 4, 7, 8)


class Extent(NamedTuple):
    """What a decoded image shows."""

    size: Size
    """Of the whole picture, in its own pixels."""
    box: Box
    """Where it is in the decoded image, whose outermost row or column reaches beyond the picture when the
    picture's side cannot be divided."""


def extent_of(image: Image.Image) -> Extent:
    """Return what an image shows: all of it, at its size, unless `load_scaled` has read it."""
    found = image.info.get(EXTENT)
    return found if isinstance(found, Extent) else Extent(image.size, (0.0, 0.0, *image.size))


def load_scaled(image: Image.Image, decoded: int, kept: int, ratio: int) -> Image.Image:
    """Read the pixels of an opened file, of a JPEG at the smallest scale that leaves enough of them.

    Args:
        decoded: a side of the image in pixels, which becomes `kept` pixels.
        ratio: of pixels that are decoded to those that are kept; 0: the image is decoded in full.
    """
    scale = next((scale for scale in SCALES if ratio and decoded >= scale * ratio * kept), 1)
    # a lossless JPEG, which has no quantization tables, has one scale only
    if scale > 1 and image.format in ("JPEG", "MPO") and image.quantization:  # type: ignore[attr-defined]
        size = image.size
        drafted = image.draft(None, (max(1, size[0] // scale), max(1, size[1] // scale)))
        if drafted is not None:
            image.info[EXTENT] = Extent(size, drafted[1])
    image.load()
    return image


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image upright, of an orientation of 1 to 8."""
    if orientation not in TURNS:
        return image
    turned = image.transpose(TURNS[orientation])
    if EXTENT in image.info:
        (width, height), (_, _, right, lower) = extent_of(image)
        if orientation >= 5:
            (width, height), (right, lower) = (height, width), (lower, right)
        left = turned.width - right if orientation in FROM_THE_RIGHT else 0.0
        upper = turned.height - lower if orientation in FROM_THE_BOTTOM else 0.0
        box = (left, upper, left + right, upper + lower)
        turned.info[EXTENT] = Extent((width, height), box)
    return turned
