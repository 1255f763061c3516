"""Read an image file again before believing that it is gone or broken: file systems have bad moments."""

import time
from pathlib import Path

from PIL import Image

from serve.preprocess import load_image, read_image_file

PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and last attempt


def read_image(path: Path) -> Image.Image:
    """RGB, upright; makes four attempts.

    Raises:
        OSError, ValueError: what the last attempt raised.
    """
    for pause in PAUSES:
        try:
            return load_image(read_image_file(path))
        except (OSError, ValueError):
            time.sleep(pause)
    return load_image(read_image_file(path))
