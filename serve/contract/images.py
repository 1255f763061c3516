"""From an image file's bytes to an upright RGB image, within limits of size: the one way in the project."""

import io
import os
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFile, PngImagePlugin

from serve.contract.archive import open_regular, read_member, split_member
from serve.contract.colours import read_as_meant, sample_bits, to_rgb
from serve.contract.doubts import BLANK, is_blank, is_one_colour
from serve.contract.errors import UserError
from serve.contract.formats import unread_format, unread_tiff
from serve.contract.heic import is_heic, open_heic
from serve.contract.jpeg import scans_and_end, without_metadata
from serve.contract.orientation import orientation, pass_over_metadata
from serve.contract.png import has_all_rows
from serve.contract.profiles import ICC_PROFILE
from serve.contract.scaling import EXTENT, turn

# Pillow's other decoders are not tried: an EPS named .jpg would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
MAX_MEGAPIXELS = 64.0  # 8000 x 8000 pixels, of which a decoded image has 4 bytes each: 256 MB
MOST_MEGAPIXELS = 1000.0  # that --max-megapixels takes
BYTES_A_PIXEL = 4
MAX_FILE_BYTES = 256 * 2**20
# The emptiest JPEG still spends about a bit on each 8x8 block. A file of fewer bytes than pixels / 1024
# ends before its picture does, and libjpeg would fill the rest with grey.
MAX_JPEG_PIXELS_PER_BYTE = 1024
# Progressive JPEGs have about ten. Each goes over all pixels again, and may be a few bytes of the file.
MAX_JPEG_SCANS = 100

# We check the size ourselves, before a pixel is decoded, with an error instead of a warning.
Image.MAX_IMAGE_PIXELS = None
# A printer's colour profile and the settings of a picture's generator have more than Pillow's 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20


def check_megapixels(limit: float) -> None:
    """Raise UserError when --max-megapixels is outside its limits."""
    if not 1 <= limit <= MOST_MEGAPIXELS:
        raise UserError(f"--max-megapixels {limit:g} is outside 1..{MOST_MEGAPIXELS:g}")


def memory_note(max_megapixels: float, at_once: int) -> str:
    """Return a line about the memory that images above the default limit may take; "" without any."""
    if max_megapixels <= MAX_MEGAPIXELS:
        return ""
    needed = max_megapixels * BYTES_A_PIXEL / 1000 * at_once
    return (
        f"--max-megapixels {max_megapixels:g}: {at_once} images may be decoded at once, which takes up to "
        f"{needed:,.1f} GB"
    )


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file, never blocking on a FIFO or a device, or a member of a tar file.

    Raises:
        UserError: not a regular file, empty, or above MAX_FILE_BYTES.
        OSError: it cannot be opened or read.
    """
    try:
        file = open_regular(path)
    except NotADirectoryError:
        inside = split_member(path)
        if inside is None:
            raise
        data = read_member(*inside, MAX_FILE_BYTES)
        check_file_size(len(data))
        return data
    with file:
        size = os.fstat(file.fileno()).st_size
        check_file_size(size)
        return file.read(size)


def size_problem(size: int) -> str:
    """Return why a file of so many bytes is no image; "" if it may be one."""
    if size > MAX_FILE_BYTES:
        return f"file of {size} bytes is over the limit of {MAX_FILE_BYTES}"
    return "" if size else "empty file (0 bytes)"


def check_file_size(size: int) -> None:
    """Raise UserError when a file has no bytes, or more than MAX_FILE_BYTES."""
    if problem := size_problem(size):
        raise UserError(problem)


def open_image(data: bytes) -> Image.Image:
    """Open an image file, its pixels unread. Metadata that Pillow cannot read costs no JPEG and no AVIF.

    Raises:
        Exception: Pillow raises nearly anything on damaged bytes.
    """
    if is_heic(data):
        return open_heic(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        read_as_meant(image, data)
        return image
    except Exception:
        if data.startswith(b"\xff\xd8\xff"):
            bare, exif = without_metadata(data)
            image = Image.open(io.BytesIO(bare), formats=("JPEG",))
            image.info["exif"] = exif
            return image
        if data[4:8] == b"ftyp" and b"Exif" in data:  # an item of unknown type is passed over
            return Image.open(io.BytesIO(data.replace(b"Exif", b"Exi\0")), formats=("AVIF",))
        raise


TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF's tags
MAKE_UP = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")  # formats whose decoders take any bytes for pixels
FILLER = 64  # bytes
GREY, OTHER = b"\x7f\x80", b"\xa5"

Decode = Callable[[Image.Image], Image.Image]


def load_whole(image: Image.Image) -> Image.Image:
    """Read all pixels of an opened file."""
    image.load()
    return image


def load_image(
    data: bytes,
    decode: Decode = load_whole,
    doubts: list[str] | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Image.Image:
    """Decode an image file to RGB, upright. `decode` reads the pixels of the opened file.

    EXIF orientation is applied; grey, palette and CMYK become RGB; transparency is laid over white;
    16-bit grey keeps its top 8 bits; of an animation the first frame is taken. An embedded colour
    profile (ICC) is in the result's `info`: Preprocess applies it. So is what a JPEG that was decoded at a
    smaller scale shows (`extent_of`).

    Args:
        doubts: takes a sentence where the picture comes out, but looks wrong.
        max_megapixels: the limit, of a million pixels each.

    Raises:
        UserError: unreadable, truncated as far as its pixels can tell (a progressive JPEG without its
            last scans cannot be told), above the limit, or of a kind without a defined white.
    """
    try:
        image, way, doubt = _decode(data, decode, doubts is not None, max_megapixels)
        if doubts is not None and doubt:
            doubts.append(doubt)
        return turn(image, way)
    except UserError:
        raise
    except MemoryError as error:
        raise UserError("out of memory while decoding") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        message = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify image file" in message:
            message = f"not an image file of a known format{unread_format(data)}"
        raise UserError(message) from error


def load_accepted(path: str | os.PathLike[str], decode: Decode = load_whole) -> Image.Image:
    """Return the image of a file that was accepted earlier, at any limit; `decode` as in `load_image`.

    Raises:
        UserError, OSError: as `read_image_file` and `load_image` do.
    """
    return load_image(read_image_file(path), decode, max_megapixels=MOST_MEGAPIXELS)


def _decode(
    data: bytes, decode: Decode, check: bool, max_megapixels: float
) -> tuple[Image.Image, int, str]:
    """Return (RGB, its orientation, what is suspicious about it)."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # by a program that calls Classifier
        raise UserError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES hides what is truncated: set it to False")
    with open_image(data) as image:
        _check_size(image, data, max_megapixels)
        bits = sample_bits(image, data)
        pass_over_metadata(image)
        mode, frame = image.mode, _first_frame(image)
        decoded = decode(image)
        if image.format == "HEIF":  # its header may say another size than its pixels have
            _check_size(image, data, max_megapixels)
        if image.format == "PNG" and not has_all_rows(data, decoded):
            raise UserError("truncated: its data end before its last row")
        if image.format in MAKE_UP and _is_made_up(data, image, decode, decoded):
            raise UserError("truncated: zeros or an end mark in place of its data")
        rgb, doubt = to_rgb(decoded, image, data, bits)
        if frame:  # outside, viewers show their background
            background = Image.new("RGB", rgb.size, "white")
            background.paste(rgb.crop(frame), frame)
            rgb = background
        rgb.info |= {key: image.info[key] for key in (ICC_PROFILE, EXTENT) if key in image.info}
        if mode in ("CMYK", "LAB"):  # a profile that fits RGB was not made for these pixels
            rgb.info.pop(ICC_PROFILE, None)
        if check and not doubt and is_one_colour(rgb) and is_blank(rgb, image, data):
            doubt = BLANK
        return rgb, orientation(image), doubt


def _first_frame(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box of an opaque GIF's first frame, if it does not fill the picture."""
    if image.format != "GIF" or "transparency" in image.info:
        return None
    box: tuple[int, int, int, int] = image.tile[0][1]  # type: ignore[attr-defined]
    return None if box == (0, 0, *image.size) else box


def _is_made_up(data: bytes, image: Image.Image, decode: Decode, decoded: Image.Image) -> bool:
    """Return whether pixels come from what is not their data: they change with other bytes in its place.

    That is a run of equal bytes, as an interrupted copy or erased memory leaves it, which decoders take for
    pixels, or the end mark of a JPEG, behind which libjpeg leaves grey.
    """
    last = decoded.crop((decoded.width - 1, decoded.height - 1, *decoded.size)).tobytes()
    if data[-FILLER:] == data[-1:] * FILLER:
        end = len(data.rstrip(data[-1:])) + FILLER // 4  # zeros behind the last box are a box to the end
        other = data[:end].ljust(len(data), OTHER)
    elif image.format in ("JPEG", "MPO") and not last.strip(GREY):
        end = scans_and_end(data)[1] - 2
        other = data[:end] + OTHER * FILLER + data[end:]
    else:
        return False
    try:
        with open_image(other) as opened:
            return decode(opened).tobytes() != decoded.tobytes()
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return True


def _check_tiff(image: Any, max_megapixels: float) -> None:
    tags = image.tag_v2
    tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    if tile > max_megapixels * 1e6:
        raise UserError(f"tiles of {tile} pixels are over the limit of {max_megapixels:g} megapixels")
    if problem := unread_tiff(tags):
        raise UserError(problem)


def _check_size(image: Image.Image, data: bytes, max_megapixels: float) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise UserError(
            f"{width}x{height} pixels are over the limit of {max_megapixels:g} megapixels: scale it down "
            "or raise --max-megapixels"
        )
    if image.format == "TIFF":
        _check_tiff(image, max_megapixels)
    if image.format in ("JPEG", "MPO"):  # MPO: with a second picture behind it, as telephones write them
        if width * height > MAX_JPEG_PIXELS_PER_BYTE * len(data):
            raise UserError(f"claims {width}x{height} pixels in {len(data)} bytes: truncated")
        # Counting marks is quick, and counts those of thumbnails and videos too.
        if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
            scans, _ = scans_and_end(data)
            if scans > MAX_JPEG_SCANS:
                raise UserError(f"{scans} scans are over the limit of {MAX_JPEG_SCANS}; save it anew")
