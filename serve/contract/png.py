"""PNG files whose data end well and hold fewer rows than the header says: Pillow leaves the rest black."""

import io

from PIL import Image


def has_all_rows(data: bytes, decoded: Image.Image) -> bool:
    """Return whether the data of a PNG reach its last row; `decoded` are its pixels.

    A picture that ends black is decoded again, into memory that is not black. The last rows are two: the
    last pass of an interlaced picture fills every second one.
    """
    width, height = decoded.size
    ends = (0, max(0, height - 2), width, height)
    last = [decoded.crop((0, row, width, row + 1)) for row in range(ends[1], height)]
    if all(row.getbbox(alpha_only=False) for row in last):
        return True
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.im = Image.new(image.mode, image.size, 1).im
        image.load()
        return image.crop(ends).tobytes() == decoded.crop(ends).tobytes()
