"""Which way up a picture is stored, as the tag beside its pixels says.

Only the tag is read, by hand: Pillow's ImageOps.exif_transpose also writes the whole EXIF block again. That
fails for one odd tag anywhere in it, and would cost the photograph.
"""

import re
import struct

from PIL import Image

ORIENTATION = 0x0112
SHORT = 3  # the only type that the standard has for it, and that browsers read
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
IN_XMP = re.compile(r"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\b""")
PNG_TEXT = "Raw profile type exif"  # where PNGs had their EXIF block before there was a chunk for it


def orientation(image: Image.Image) -> int:
    """Return 1 (upright) to 8, of an opened file whose pixels have been read: a PNG's EXIF may follow them.

    EXIF decides, and XMP where there is none: programs that turn the pixels take the tag out of EXIF and
    leave XMP's. A tag of another type, count or value than the standard's is ignored, as by browsers. A
    TIFF and a HEIC are 1: their decoders have turned them. An AVIF has its own rotation, handed over as
    EXIF.
    """
    if image.format in ("TIFF", "HEIF"):
        return 1
    if image.format == "AVIF":
        exif = Image.Exif()  # Image.getexif would look into XMP, too
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION, 1))
    block = _exif_block(image)
    return (_in_exif(block) if block else _in_xmp(image)) or 1


def on_its_side(image: Image.Image) -> bool:
    """Return whether width and height of the opened file are height and width of the picture."""
    if image.format == "TIFF":  # its size is the upright one already, unless only XMP turns it
        return ORIENTATION not in image.tag_v2 and _in_xmp(image) >= 5  # type: ignore[attr-defined]
    if image.format == "PNG":
        image.load()
    return orientation(image) >= 5


def pass_over_metadata(image: Image.Image) -> None:
    """Keep Pillow from reading what no pixel of a TIFF needs: it fails on odd values."""
    if image.format == "TIFF":
        image.is_animated = True  # type: ignore[attr-defined]  # else it reads the EXIF and GPS directories
    if not isinstance(image.info.get("xmp", b""), bytes):
        del image.info["xmp"]


def _exif_block(image: Image.Image) -> bytes:
    block = image.info.get("exif", b"")
    if not block and PNG_TEXT in image.info:
        try:
            block = bytes.fromhex("".join(image.info[PNG_TEXT].split("\n")[3:]))
        except ValueError:
            return b""
    return block.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0") if isinstance(block, bytes) else b""


def _in_exif(block: bytes) -> int:
    """Return the first readable tag of the first directory; 0: none."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return 0
    at = struct.unpack_from(f"{order}I", block, 4)[0]
    entries = block[at + 2 :]
    count = struct.unpack_from(f"{order}H", block, at)[0] if len(block) >= at + 2 else 0
    for start in range(0, min(12 * count, len(entries) - 11), 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", entries, start)
        if tag == ORIENTATION and kind == SHORT and values == 1 and 1 <= value <= 8:
            return int(value)
    return 0


def _in_xmp(image: Image.Image) -> int:
    """Return the tag; 0: none."""
    text = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or ""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    found = IN_XMP.search(text) if isinstance(text, str) else None
    return int(found[1]) if found else 0
