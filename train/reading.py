"""Read an image file again before believing that it is gone or broken: file systems have bad moments."""

import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from serve.preprocess import load_image, read_image_file

PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and last attempt


def read_image(path: Path, decode: Callable[[Image.Image], Image.Image] | None = None) -> Image.Image:
    """RGB, upright; makes four attempts. `decode` as in `load_image`.

    Raises:
        OSError, ValueError: what the last attempt raised.
    """

    def attempt() -> Image.Image:
        data = read_image_file(path)
        return load_image(data) if decode is None else load_image(data, decode)

    for pause in PAUSES:
        try:
            return attempt()
        except (OSError, ValueError):
            time.sleep(pause)
    return attempt()
