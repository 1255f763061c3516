"""How images look as a set, apart from their content: short side, aspect, share of grey ones."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

BINS_TO_AN_OCTAVE = 4  # a bin is 19 % wide
GREY_LEVELS = 3  # by which the channels of a grey image may differ, as after a lossy format
SAMPLES = 8  # rows and columns of pixels that are looked at


class Look(NamedTuple):
    """Of one upright image."""

    short_side: int
    aspect: float
    """Width by height."""
    is_grey: bool


def look_of(size: tuple[int, int], pixels: NDArray[np.uint8]) -> Look:
    """Return the look of an image of this width and height, whose preprocessed pixels are [H, W, 3]."""
    width, height = size
    step = max(1, len(pixels) // SAMPLES)
    differences = np.ptp(pixels[::step, ::step], axis=2)
    return Look(min(size), width / height, bool(differences.max() <= GREY_LEVELS))


@dataclass
class Looks:
    """Counts of a set of images, which add up over its parts."""

    num_images: int = 0
    grey: int = 0
    short_side: Counter[int] = field(default_factory=Counter)
    """Bin -> images; a bin is a quarter of an octave of pixels."""
    aspect: Counter[int] = field(default_factory=Counter)

    def add(self, look: Look) -> None:
        self.num_images += 1
        self.grey += look.is_grey
        self.short_side[_bin(look.short_side)] += 1
        self.aspect[_bin(look.aspect)] += 1

    def join(self, other: "Looks") -> None:
        self.num_images += other.num_images
        self.grey += other.grey
        self.short_side.update(other.short_side)
        self.aspect.update(other.aspect)

    @property
    def grey_share(self) -> float:
        return self.grey / self.num_images if self.num_images else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; bins become texts, as JSON demands."""
        sides, aspects = ({str(b): n for b, n in sorted(c.items())} for c in (self.short_side, self.aspect))
        return {
            "num_images": self.num_images,
            "grey": self.grey,
            "short_side_quantiles": quantiles(self.short_side),
            "aspect_quantiles": quantiles(self.aspect),
            "short_side_bins": sides,
            "aspect_bins": aspects,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what `to_dict` did not make."""
        sides, aspects = (
            Counter({int(b): int(n) for b, n in values[key].items()})
            for key in ("short_side_bins", "aspect_bins")
        )
        return cls(int(values["num_images"]), int(values["grey"]), sides, aspects)


def _bin(value: float) -> int:
    return round(BINS_TO_AN_OCTAVE * math.log2(value))


def quantiles(bins: Counter[int], shares: Iterable[float] = (0.05, 0.5, 0.95)) -> list[float]:
    """Return the values below which these shares lie, to the width of a bin; [] of no images."""
    ordered = sorted(bins)
    if not ordered:
        return []
    sums = np.cumsum([bins[position] for position in ordered])
    found = [ordered[int(np.searchsorted(sums, share * sums[-1]))] for share in shares]
    return [float(f"{2 ** (position / BINS_TO_AN_OCTAVE):.3g}") for position in found]


def distance(one: Mapping[Any, int], other: Mapping[Any, int], ordered: bool = True) -> float:
    """Return how far two distributions are apart, 0 to 1.

    Of `ordered` values it is the largest difference of cumulative shares (Kolmogorov-Smirnov), of others
    the share that would have to move (total variation).
    """
    n, m = sum(one.values()), sum(other.values())
    if not (n and m):
        return 0.0
    keys = set(one) | set(other)
    gaps = [one.get(k, 0) / n - other.get(k, 0) / m for k in (sorted(keys) if ordered else keys)]
    return float(np.abs(np.cumsum(gaps)).max() if ordered else np.abs(gaps).sum() / 2)
