"""Pictures that come out, but look wrong: they are scored and trained on, and named."""

import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from PIL import Image

EXAMPLES = 3  # names of files for each reason
NEARLY = 16  # grey levels: what varies by less is nearly one colour

NARROW = (
    "16-bit values that span less than a sixteenth of their range (10 or 12 bits stored as 16?) come out "
    "as nearly one colour; scale them to 0..65535, or save 8 bits"
)
CLEAR = "every pixel is transparent, so all are white"
FADED = "over white, nearly one colour is left; save it on a background of another colour"
BANDS = (
    "the fourth band of a map is taken for transparency; if it is near infrared, save three bands "
    "(gdal_translate -b 1 -b 2 -b 3)"
)
BLANK = "nearly all pixels have one colour, but the file holds much more; it may be damaged"


class Doubts:
    """Counts pictures by what is suspicious about them, and keeps the first names."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, name: str, doubt: str) -> None:
        self._counts[doubt] += 1
        names = self._names.setdefault(doubt, [])
        if len(names) < EXAMPLES:
            names.append(name)

    def lines(self) -> Iterator[str]:
        """Yield one line for each reason, the commonest first."""
        for doubt, count in self._counts.most_common():
            names = ", ".join(map(repr, self._names[doubt])) + (", ..." if count > EXAMPLES else "")
            pictures = "picture looks" if count == 1 else "pictures look"
            yield f"{count} {pictures} wrong ({names}): {doubt}"


def is_one_colour(image: Image.Image) -> bool:
    """Return whether RGB pixels are nearly one colour; a look at a few ends it for most pictures."""
    width, height = image.size
    seen: list[tuple[int, ...]] = []
    for x, y in ((4, 4), (2, 2), (6, 6), (2, 6), (6, 2), (4, 1), (4, 7), (1, 4), (7, 4)):
        seen.append(image.getpixel((x * width // 8, y * height // 8)))  # type: ignore[arg-type]
        if any(max(band) - min(band) >= NEARLY for band in zip(*seen, strict=True)):
            return False
    return varies_by(image) < NEARLY


def is_blank(image: Image.Image, opened: Image.Image, data: bytes) -> bool:
    """Return whether RGB pixels of one colour are much less than their file holds, its metadata aside.

    JPEGs are left out: what their decoder made up is an error.
    """
    if opened.format in ("JPEG", "MPO"):
        return False
    tags = getattr(opened, "tag_v2", {}).values()
    texts = [value for value in (*opened.info.values(), *tags) if isinstance(value, bytes | str)]
    held = len(zlib.compress(data, 1)) - sum(map(len, texts))  # a bitmap is as large whatever it shows
    return held > max(4096 + image.width * image.height // 16, 2 * len(zlib.compress(image.tobytes(), 1)))


def varies_by(image: Image.Image) -> int:
    """Return the range of grey levels in the band that varies most."""
    extremes: Any = image.getextrema()
    bands = extremes if isinstance(extremes[0], tuple) else [extremes]
    return int(max(high - low for low, high in bands))
