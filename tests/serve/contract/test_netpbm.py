"""Files of unusual maxima come out as the decoder of Pillow makes them, pixel for pixel."""

import numpy as np
import pytest

from serve.contract import images
from serve.contract.images import load_image
from serve.contract.netpbm import to_eight_bits


@pytest.mark.parametrize(
    ("kind", "maximum", "bands"),
    [(b"P5", 100, 1), (b"P5", 4095, 1), (b"P6", 254, 3), (b"P6", 1023, 3), (b"P6", 65535, 3)],
)
def test_pixels_are_those_of_pillow(
    kind: bytes, maximum: int, bands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = np.dtype(np.uint8 if maximum < 256 else ">u2")
    values = np.random.default_rng(0).integers(0, maximum + 1, (7, 9, bands)).astype(sample)
    data = b"%s # 12 bits\n9 7\n%d\n" % (kind, maximum) + values.tobytes()
    assert to_eight_bits(data) != data
    quick = np.asarray(load_image(data))
    monkeypatch.setattr(images, "to_eight_bits", lambda unchanged: unchanged)
    np.testing.assert_array_equal(quick, np.asarray(load_image(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"P5 2 2 255 abcd",
        b"P5 2 2 65535 abcdefgh",
        b"P6 2 2 100 abc",
        b"P5 2 2 0 abcd",
        b"P5 2",
        b"\xff\xd8\xff",
    ],
)
def test_other_files_stay_as_they_are(data: bytes) -> None:
    assert to_eight_bits(data) is data
