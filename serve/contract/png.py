"""The compressed data of a PNG, which may end well and hold fewer rows than its header says."""

import zlib
from collections.abc import Iterator

PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of an interlaced picture: first column and row, and the distances to the next ones."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
AT_ONCE = 1 << 20  # bytes inflated at a time


def has_all_rows(data: bytes) -> bool:
    """Return whether the data inflate to as many bytes as the header demands. Pillow leaves the rest black,
    libpng reports "Not enough image data"."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    bits = data[24] * CHANNELS[data[25]]
    parts = [(width, height)]
    if data[28]:
        parts = [((width - x + dx - 1) // dx, (height - y + dy - 1) // dy) for x, y, dx, dy in PASSES]
    wanted = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in parts if columns and rows)
    inflate, held = zlib.decompressobj(), 0
    for part in _image_data(data):
        while part and held < wanted and not inflate.eof:
            held += len(inflate.decompress(part, AT_ONCE))
            part = inflate.unconsumed_tail
    return held >= wanted


def _image_data(data: bytes) -> Iterator[bytes]:
    """Yield the bodies of IDAT chunks."""
    at = 8
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IDAT":
            yield data[at + 8 : at + 8 + size]
        at += 12 + size
