"""HEIC, as telephones write photographs, decoded by the optional package pi-heif (libheif)."""

import io
from functools import cache

from PIL import Image

from serve.contract.errors import UserError
from serve.contract.installation import how_to_install

EXTRA = "heic"
PACKAGE = "pi-heif"
HEIC_BRANDS = (b"hei", b"hev")  # heic, heix, heim, heis, hevc, ...
GENERAL_BRANDS = (b"mif1", b"msf1")  # of HEIC or AVIF: the compatible brands decide
MAX_BRANDS_BYTES = 256


def is_heic(data: bytes) -> bool:
    """Return whether a file is HEIC by its first box, whatever its name."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), MAX_BRANDS_BYTES, len(data))
    compatible = [data[at : at + 4] for at in range(16, end - 3, 4)]
    if data[8:12] in GENERAL_BRANDS:
        return any(brand.startswith(HEIC_BRANDS) for brand in compatible)
    return data[8:12].startswith(HEIC_BRANDS)


def open_heic(data: bytes) -> Image.Image:
    """Open a HEIC file, its pixels unread. They come upright, and of more than 8 bits the top 8.

    Raises:
        UserError: pi-heif is not installed. SyntaxError: damaged.
    """
    try:
        from pi_heif.as_plugin import HeifImageFile
    except ImportError as error:
        raise UserError(
            f"not an image file of a known format but HEIC: {how_to_install(EXTRA)}, or convert it to JPEG"
        ) from error
    image: Image.Image = HeifImageFile(io.BytesIO(data))
    return image


@cache
def heic_version() -> dict[str, str]:
    """Return the version of pi-heif by its name; {} where it is not installed."""
    from importlib import metadata  # 20 ms, which a command's start does without

    try:
        return {PACKAGE: metadata.version(PACKAGE)}
    except metadata.PackageNotFoundError:
        return {}
