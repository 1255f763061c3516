"""From an image to pixels: the one definition in the project.

Training evaluates with it, export verifies with it, serving runs it. It needs numpy and Pillow only.

    preprocess = Preprocess(mode="crop", size=224, resize_size=256)
    pixels = preprocess(load_image(data, preprocess.decode))  # uint8 [224, 224, 3]
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import UserError
from serve.contract.profiles import to_srgb
from serve.contract.scaling import LEAST_RATIO, extent_of, load_scaled

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MODES = ("crop", "squash", "pad")
PROFILES = ("srgb", "ignored")
MOST_RATIO = 64


@dataclass(frozen=True)
class Preprocess:
    """Turns an image of any size into the network's `size` x `size` input. Plain values only."""

    mode: str = "crop"
    """crop: the short side becomes `resize_size`, then the central `size` square. squash: both sides become
    `size`. pad: the long side becomes `size`, the rest is black."""
    size: int = 224
    """Height and width of the result, in pixels."""
    resize_size: int = 256
    """Short side before the central crop, in pixels; at least `size`. Used by mode crop only."""
    interpolation: str = "bilinear"
    """bilinear, bicubic or lanczos; always antialiased."""
    profiles: str = "srgb"
    """srgb: colours are converted from the embedded profile (ICC) to sRGB, once the image has its size;
    ignored: they are taken as they are."""
    decode_ratio: int = LEAST_RATIO
    """A JPEG is decoded at a half, a quarter or an eighth of its size where this leaves so many pixels for
    each one of the resized image, on both sides. 0: in full."""

    def __post_init__(self) -> None:
        if type(self.size) is not int or type(self.resize_size) is not int:
            raise TypeError(f"preprocess sizes {self.size!r} and {self.resize_size!r}")
        if type(self.decode_ratio) is not int or not 0 <= self.decode_ratio <= MOST_RATIO:
            raise UserError(f"preprocess decode_ratio {self.decode_ratio!r} is outside 0..{MOST_RATIO}")
        if self.mode not in MODES:
            raise UserError(f"preprocess mode {self.mode!r} is none of {', '.join(MODES)}")
        if self.interpolation not in RESAMPLING:
            known = ", ".join(RESAMPLING)
            raise UserError(f"interpolation {self.interpolation!r} is none of {known}")
        if self.profiles not in PROFILES:
            raise UserError(f"profiles {self.profiles!r} is none of {', '.join(PROFILES)}")
        if not 1 <= self.size <= 4096:
            raise UserError(f"preprocess size {self.size} is outside 1..4096 pixels")
        if self.mode == "crop" and not self.size <= self.resize_size <= 8192:
            raise UserError(
                f"preprocess resize_size {self.resize_size} is outside {self.size} (size)..8192 pixels"
            )

    def decode(self, image: Image.Image) -> Image.Image:
        """Read the pixels of an opened file, for `load_image`, and no more of a JPEG than are needed."""
        side = max(image.size) if self.mode == "pad" else min(image.size)
        kept = self.resize_size if self.mode == "crop" else self.size
        return load_scaled(image, side, kept, self.decode_ratio)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return uint8 [size, size, 3] of an RGB image of any size, read in full or by `decode`."""
        out = (self.size, self.size)
        whole, box = extent_of(image)
        resample = RESAMPLING[self.interpolation]
        if self.mode == "pad":
            # not ImageOps.contain: it makes a line of 30000x1 an image of no pixels, so all would be black
            width, height = (max(1, round(side / max(whole) * self.size)) for side in whole)
            resized = self._colours(image.resize((width, height), resample, box))
            canvas = Image.new("RGB", out)
            canvas.paste(resized, ((self.size - resized.width) // 2, (self.size - resized.height) // 2))
            return np.asarray(canvas)
        if self.mode == "crop":
            left, upper, right, lower = box
            across, down = (right - left) / whole[0], (lower - upper) / whole[1]
            crop = self.crop_box(*whole)
            box = (
                left + crop[0] * across,
                upper + crop[1] * down,
                left + crop[2] * across,
                upper + crop[3] * down,
            )
        return np.asarray(self._colours(image.resize(out, resample, box)))

    def _colours(self, image: Image.Image) -> Image.Image:
        # Of the small image: of 12 megapixels it would take three times as long as decoding them.
        return to_srgb(image) if self.profiles == "srgb" else image

    def crop_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the central crop in source coordinates (left, upper, right, lower), of mode crop.

        Resizing this box in one call equals torchvision's Resize(resize_size), CenterCrop(size) to within
        two grey levels, at 1.8 times the speed, and needs no huge intermediate image for a 30000x1 one.
        Bicubic and lanczos can differ by more where they overshoot black or white: Pillow clips between
        its two passes, and since version 13 chooses their order by the sizes of the call.
        """
        short = min(width, height)
        resized_w = int(self.resize_size * width / short)
        resized_h = int(self.resize_size * height / short)
        left = round((resized_w - self.size) / 2)
        upper = round((resized_h - self.size) / 2)
        scale_x, scale_y = width / resized_w, height / resized_h
        return (
            left * scale_x,
            upper * scale_y,
            min((left + self.size) * scale_x, width),
            min((upper + self.size) * scale_y, height),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values. Raises UserError on an unknown or missing field."""
        fields = set(cls.__dataclass_fields__)
        if set(values) != fields:
            raise UserError(f"preprocess fields {sorted(values)} are not {sorted(fields)}")
        return cls(**values)
