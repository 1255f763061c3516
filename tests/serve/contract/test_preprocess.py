"""From an image to pixels: torchvision's numbers for every shape."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MEGABYTE, linux, resident_memory_grows_below
from numpy.typing import NDArray
from PIL import Image
from serve_model import noise
from torchvision.transforms import InterpolationMode, v2

from serve.contract.preprocess import MODES, RESAMPLING, Preprocess

shapes = st.tuples(st.integers(1, 400), st.floats(1, 8), st.booleans()).map(
    lambda s: (s[0], int(s[0] * s[1])) if s[2] else (int(s[0] * s[1]), s[0])
)


def torchvision_crop(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    interpolation = InterpolationMode(preprocess.interpolation)
    resize = v2.Resize(preprocess.resize_size, interpolation, antialias=True)
    return np.asarray(v2.CenterCrop(preprocess.size)(resize(image)))


def largest_difference(image: Image.Image, preprocess: Preprocess) -> int:
    ours = preprocess(image)
    assert ours.shape == (preprocess.size, preprocess.size, 3)
    assert ours.dtype == np.uint8
    return int(np.abs(ours.astype(int) - torchvision_crop(image, preprocess)).max())


@settings(max_examples=100, deadline=None)
@given(shape=shapes, size=st.integers(1, 256), margin=st.integers(0, 60), seed=st.integers(0, 99))
def test_crop_is_torchvisions_to_two_grey_levels(
    shape: tuple[int, int], size: int, margin: int, seed: int
) -> None:
    """On the hardest picture: every pixel differs from its neighbours."""
    assert largest_difference(noise(*shape, seed=seed), Preprocess("crop", size, size + margin)) <= 2


@pytest.mark.parametrize("shape", [(500, 374), (374, 500), (256, 256), (224, 225), (3000, 2001)])
def test_crop_of_photograph_sizes_is_torchvisions_to_one_grey_level(shape: tuple[int, int]) -> None:
    assert largest_difference(noise(*shape), Preprocess()) <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
@settings(max_examples=40, deadline=None)
@given(shape=shapes, size=st.integers(1, 256), margin=st.integers(0, 60))
def test_sharper_filters_are_torchvisions_too(
    interpolation: str, shape: tuple[int, int], size: int, margin: int
) -> None:
    """Away from black and white, where Pillow clips their overshoot, before or after the other pass."""
    image = noise(*shape).point(lambda grey: 80 + grey * 96 // 255)
    assert largest_difference(image, Preprocess("crop", size, size + margin, interpolation)) <= 2


@given(shape=shapes, size=st.integers(1, 256))
@settings(max_examples=40, deadline=None)
def test_squash_is_torchvisions_resize_bit_for_bit(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    expected = v2.Resize((size, size), antialias=True)(image)
    np.testing.assert_array_equal(Preprocess("squash", size)(image), np.asarray(expected))


@pytest.mark.parametrize(
    "shape", [(80, 60), (60, 80), (64, 64), (7, 3), (1, 1), (333, 100), (1, 900), (30000, 1)]
)
@pytest.mark.parametrize("size", [64, 65])
def test_pad_keeps_the_aspect_ratio_centred_on_black(shape: tuple[int, int], size: int) -> None:
    pixels = Preprocess("pad", size)(Image.new("RGB", shape, "white"))
    assert pixels.shape == (size, size, 3)
    rows, columns = np.flatnonzero(pixels.any((1, 2))), np.flatnonzero(pixels.any((0, 2)))
    assert (pixels[np.ix_(rows, columns)] == 255).all()
    for found, side in ((columns, shape[0]), (rows, shape[1])):
        assert len(found) == max(1, round(size * side / max(shape)))
        assert abs(found[0] - (size - 1 - found[-1])) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_pixels_do_not_depend_on_the_system_or_the_call_before(mode: str) -> None:
    """Same input, same output, and the image given is left as it was."""
    image, preprocess = noise(50, 31), Preprocess(mode, 16, 20)
    before = image.tobytes()
    first = preprocess(image)
    preprocess(noise(9, 9, seed=1))
    np.testing.assert_array_equal(preprocess(image), first)
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", MODES)
@linux
def test_a_line_of_30000_pixels_costs_no_memory(mode: str) -> None:
    """Resizing its short side to 256 first, as usual, would need gigabytes."""
    for shape in ((30000, 1), (1, 30000)):
        image = Image.new("RGB", shape, (10, 200, 30))
        with resident_memory_grows_below(20 * MEGABYTE):
            pixels = Preprocess(mode)(image)
        assert pixels.max((0, 1)).tolist() == [10, 200, 30]


preprocesses = st.builds(
    Preprocess,
    mode=st.sampled_from(MODES),
    size=st.integers(1, 4096),
    resize_size=st.integers(4096, 8192),
    interpolation=st.sampled_from(sorted(RESAMPLING)),
)


@given(preprocesses)
def test_a_dictionary_and_back(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


def test_a_dictionary_with_unknown_or_missing_fields_is_refused() -> None:
    values = Preprocess().to_dict()
    with pytest.raises(ValueError, match="'rotate'"):
        Preprocess.from_dict(values | {"rotate": 90})
    del values["interpolation"]
    with pytest.raises(ValueError, match="preprocess"):
        Preprocess.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "stretch"}, "'stretch'.*crop, squash, pad"),
        ({"interpolation": "nearest"}, "'nearest'.*bilinear, bicubic, lanczos"),
        ({"size": 0}, r"size 0 .*1\.\.4096"),
        ({"size": 5000, "mode": "pad"}, r"size 5000 .*1\.\.4096"),
        ({"size": 224, "resize_size": 223}, r"resize_size 223 .*224.*8192"),
        ({"resize_size": 9000}, "resize_size 9000 .*8192"),
    ],
)
def test_a_bad_value_is_named_with_its_limits(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**values)
