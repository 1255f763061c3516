"""Read an image file again before believing that it is gone or broken: file systems have bad moments."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import PIL
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.images import load_image, read_image_file

DECODER = f"2, Pillow {PIL.__version__}"
"""In every key under which something decoded is kept. Count up where `load_image` decodes otherwise."""
PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and last attempt


class ChangedError(UserError):
    """The file is not the one that was scanned."""


def read_image(
    path: Path, decode: Callable[[Image.Image], Image.Image] | None = None, sha256: str = ""
) -> Image.Image:
    """RGB, upright; makes four attempts. `decode` as in `load_image`; `sha256` is the bytes', if known.

    Raises:
        OSError, ValueError: what the last attempt raised. ChangedError: other bytes.
    """

    def attempt() -> Image.Image:
        data = read_image_file(path)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ChangedError(f"{path} has changed since it was scanned")
        return load_image(data) if decode is None else load_image(data, decode)

    for pause in PAUSES:
        try:
            return attempt()
        except (OSError, ValueError):
            time.sleep(pause)
    return attempt()
