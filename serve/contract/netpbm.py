"""Binary PGM and PPM of unusual maxima (12-bit cameras), which Pillow reads pixel by pixel, in Python."""

import re

import numpy as np

BETWEEN = rb"(?:\s|#[^\r\n]*[\r\n])+"
HEADER = re.compile(rb"P([56])" + 3 * (BETWEEN + rb"(\d{1,9})") + rb"\s")
GREY = b"5"


def to_eight_bits(data: bytes) -> bytes:
    """Return the file with a maximum of 255 and the values that Pillow and `to_rgb` would make; as it is
    where Pillow is quick, or the file is too short."""
    found = HEADER.match(data)
    if found is None:
        return data
    kind, (width, height, maximum) = found[1], map(int, found.groups()[1:])
    if maximum == 255 or not 0 < maximum <= 65535 or (kind == GREY and maximum == 65535):
        return data
    count = width * height * (1 if kind == GREY else 3)
    sample = np.dtype(np.uint8 if maximum < 256 else ">u2")
    if len(data) - found.end() < count * sample.itemsize:
        return data
    deep = kind == GREY and maximum > 255  # of 16 bits the top 8 are kept
    highest = 65535 if deep else 255
    levels = np.minimum(np.rint(np.arange(1 << 8 * sample.itemsize) / maximum * highest), highest)
    table = (levels.astype(np.uint16) >> (8 if deep else 0)).astype(np.uint8)
    pixels: bytes = table[np.frombuffer(data, sample, count, found.end())].tobytes()
    return b"P%s %d %d 255\n" % (kind, width, height) + pixels
