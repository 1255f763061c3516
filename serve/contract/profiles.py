"""Embedded colour profiles (ICC): from an image's own colours to sRGB, by Pillow's LittleCMS."""

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from PIL import ImageCms

ICC_PROFILE = "icc_profile"  # in Image.info
MAX_PROFILE_BYTES = 4 << 20
COLOUR_SPACE = slice(16, 20)  # of a profile's header
KEPT = 32  # transforms with their profiles, of which a data set has few; one is made in 7 ms
STEPS = 17  # levels of each band that decide whether a profile is sRGB
SAME = 1  # grey levels


def to_srgb(image: Image.Image) -> Image.Image:
    """Return RGB pixels in sRGB; as they are without a profile for RGB, or with sRGB's or a damaged one."""
    profile = image.info.get(ICC_PROFILE)
    if not isinstance(profile, bytes):
        return image
    transform = _transform(profile)
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=KEPT)
def _transform(profile: bytes) -> "ImageCms.ImageCmsTransform | None":
    """Return the transform to sRGB; None for a profile that changes nothing or cannot be used."""
    if len(profile) > MAX_PROFILE_BYTES or profile[COLOUR_SPACE] != b"RGB ":
        return None
    from PIL import ImageCms  # 7 ms, for pictures with a profile alone

    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), "RGB", "RGB")
        levels = np.linspace(0, 255, STEPS).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        changed = np.asarray(transform.apply(Image.fromarray(grid)))
    except (OSError, ImageCms.PyCMSError):
        return None
    return transform if np.abs(changed.astype(int) - grid).max() > SAME else None
