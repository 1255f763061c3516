"""From pixels of any kind to RGB: grey of more than 8 bits, and transparency."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImagePalette

from serve.contract.doubts import BANDS, CLEAR, FADED, NARROW, NEARLY, is_one_colour, varies_by
from serve.contract.errors import UserError

STRIP_PIXELS = 1 << 20  # laid over white at once
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa")
PNG_DEPTH = 24  # byte with the bits a sample in a PNG
PNG_GREY, PNG_RGB = 0, 2
BMP_DEPTH = 28  # byte with the bits a pixel in a bitmap
BLACK_AND_WHITE = b"\0\0\0\xff\xff\xff"
COLOUR_MAP = 320  # TIFF's tag
GEOGRAPHIC = (33550, 34264)  # scale and transformation, of which a GeoTIFF has one


def read_as_meant(image: Any, data: bytes) -> None:
    """Let Pillow read the pixels of an opened file, which are unread, as other decoders do."""
    if image.format == "WEBP" and image.mode == "RGB" and image.n_frames > 1:
        # libwebp clears what the first frame leaves out, which would be black without its alpha
        image._mode = image.rawmode = "RGBA"
    elif image.format == "BMP" and image.mode == "1" and data[BMP_DEPTH] > 1:
        # whose palette is black and white: Pillow would read one bit a pixel
        rawmode = "P" if data[BMP_DEPTH] == 8 else f"P;{data[BMP_DEPTH]}"
        image._mode, image.palette = "P", ImagePalette.raw("RGB", BLACK_AND_WHITE)
        image.tile = [tile._replace(args=(rawmode, *tile.args[1:])) for tile in image.tile]
    elif image.format == "TIFF" and image.palette and max(image.tag_v2[COLOUR_MAP]) < 256:
        # colours of 8 bits: Pillow would take the upper 8 of 16, which are black
        image.palette = ImagePalette.raw("RGB;L", image.tag_v2[COLOUR_MAP])


def sample_bits(image: Image.Image, data: bytes) -> int:
    """Return how many bits a sample has in the opened file, before its pixels are read."""
    if image.format == "PNG":
        return data[PNG_DEPTH]
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(258, (1,))))  # type: ignore[attr-defined]
    if image.format == "PPM":  # other maxima are scaled to 16 bits while the pixels are read
        how = str(image.tile[0][3])  # type: ignore[attr-defined]
        return 16 if ";16" in how or "65535" in how else 8
    return 8


def to_rgb(decoded: Image.Image, opened: Image.Image, data: bytes, bits: int) -> tuple[Image.Image, str]:
    """Return RGB, and what is suspicious about it or "".

    Args:
        decoded: the pixels of `opened`, perhaps made smaller.
        bits: a sample, as `sample_bits` says.

    Raises:
        UserError: pixels without a defined white.
    """
    deep = opened.mode.startswith("I;16") or (opened.format == "PPM" and opened.mode == "I")
    if deep:
        inverted = getattr(opened, "tag_v2", {}).get(262) == 0  # TIFF's white is zero
        return _eight_bits(decoded, bits, inverted)
    if decoded.mode in ("I", "F"):
        raise UserError(f"pixels of mode {decoded.mode!r} have no defined white; save 8 bits")
    if decoded.mode == "La":  # the one mode with alpha that Pillow makes no RGBA of
        decoded = decoded.convert("LA")
    if opened.format == "PNG" and "transparency" in decoded.info:
        decoded = _whole_transparent_colour(decoded, data)
    doubt = NARROW if bits == 16 and 0 < varies_by(decoded) < NEARLY else ""
    if decoded.mode in WITH_ALPHA or "transparency" in decoded.info:
        image, faded = _over_white(decoded)
        return image, doubt or faded or _fourth_band(decoded, opened)
    return decoded if decoded.mode == "RGB" else decoded.convert("RGB"), doubt


def _fourth_band(decoded: Image.Image, opened: Image.Image) -> str:
    """Return what is suspicious about the alpha of a map, most of which is neither clear nor opaque: GDAL
    calls the fourth of four bands alpha, whatever it is."""
    tags = getattr(opened, "tag_v2", {})
    if decoded.mode != "RGBA" or not any(tag in tags for tag in GEOGRAPHIC):
        return ""
    counts = decoded.getchannel("A").histogram()
    return BANDS if 2 * sum(counts[1:255]) > sum(counts) else ""


def _eight_bits(image: Image.Image, bits: int, inverted: bool) -> tuple[Image.Image, str]:
    """Convert grey of more bits to RGB; `inverted`: 0 is white.

    12 bits in a TIFF that declares them are 12 bits. 10 or 12 in a file that declares 16 may as well be a
    dark picture: guessing by the brightest pixel would make dark ones of a data set bright, and others not.
    """
    levels = np.asarray(image).astype(np.uint16)
    grey = (levels >> (4 if bits == 12 else 8)).astype(np.uint8)  # convert("RGB") would clip at 255
    if inverted:
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):
        grey[levels == image.info["transparency"]] = 255
    doubt = NARROW if bits == 16 and 0 < np.ptp(levels) < NEARLY << 8 else ""
    return Image.fromarray(grey).convert("RGB"), doubt


def _whole_transparent_colour(image: Image.Image, data: bytes) -> Image.Image:
    """Bring a PNG's transparent colour, which Pillow leaves at the file's depth, to that of the pixels."""
    depth, kind, clear = data[PNG_DEPTH], data[PNG_DEPTH + 1], image.info["transparency"]
    if kind == PNG_GREY and depth in (2, 4):
        top = (1 << depth) - 1
        image.info["transparency"] = (clear & top) * (255 // top)
    elif kind == PNG_RGB and depth == 16:
        high, low = np.asarray(image), _low_bytes(data)
        colour = np.array(clear)
        hidden = (high == colour >> 8).all(2) & (low == colour & 255).all(2)
        alpha = np.where(hidden, 0, 255).astype(np.uint8)
        return Image.fromarray(np.dstack([high, alpha]))
    return image


def _low_bytes(data: bytes) -> NDArray[np.uint8]:
    """Return those of a PNG's 16-bit RGB samples, uint8 [H, W, 3], read as if their bytes were swapped."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        codec, box, offset, _ = image.tile[0]
        image.tile = [type(image.tile[0])(codec, box, offset, "RGB;16L")]
        return np.asarray(image)


def _over_white(image: Image.Image) -> tuple[Image.Image, str]:
    """Return RGB, and what is suspicious about it or "".

    An alpha channel of zeros that hides a picture means nothing, as in many Windows bitmaps: it is ignored.

    In strips: whole images in several modes at once would take five times their memory.
    """
    result = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    opaque = False
    for upper in range(0, image.height, rows):
        strip = image.crop((0, upper, image.width, min(upper + rows, image.height)))
        strip.info = image.info  # crop keeps it, but for the transparent colour of some modes
        rgba = strip.convert("RGBA")
        opaque = opaque or rgba.getchannel("A").getbbox() is not None
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, upper))
    if opaque and not is_one_colour(result):
        return result, ""
    plain = image if image.mode == "RGBA" else image.convert("RGBA")  # which would be a copy
    varies = varies_by(plain) >= NEARLY
    if opaque:
        return result, FADED if varies else ""
    return (plain.convert("RGB"), "") if varies else (result, CLEAR)
