"""Augmentation is a function of (seed, epoch, sample); without it, pixels are those of serving."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from serve.contract.preprocess import RESAMPLING
from train.config import TrainConfig
from train.data.augment import (
    ASPECT,
    TRIES,
    BatchAugment,
    ImageAugment,
    PairMix,
    random_box,
    resize,
)

STRONG = {"crop_scale": 0.3, "flip": 0.5, "color_jitter": 0.5, "random_erasing": 0.8}
OFF = {"crop_scale": 1.0, "flip": 0.0, "color_jitter": 0.0, "random_erasing": 0.0}


class Augment:
    """All augmentation of one image, in one call."""

    def __init__(self, config: TrainConfig):
        self.image, self.batch = ImageAugment(config), BatchAugment(config)

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> np.ndarray:
        augmented = torch.from_numpy(self.image([np.asarray(image)], seed, epoch, [index]))
        changed = self.batch(augmented, torch.tensor([index]), seed, epoch)[0].numpy()
        assert (changed == changed.astype(np.uint8)).all(), "whole numbers of 0..255"
        return changed.astype(np.uint8)


def picture(size: tuple[int, int] = (50, 37), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def batch(n: int = 8, num_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 12, 12, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, num_classes, (n,), generator=generator)


@pytest.mark.parametrize("trivial", [False, True])
def test_pixels_depend_on_the_key_alone(trivial: bool) -> None:
    config = TrainConfig(image_size=32, trivial_augment=trivial, **STRONG)
    augment = Augment(config)
    first = augment(picture(), 1, 2, 3)
    for key in ((9, 9, 9), (0, 0, 1)):
        augment(picture(seed=1), *key)
    torch.manual_seed(99)
    np.random.seed(99)
    assert np.array_equal(augment(picture(), 1, 2, 3), first)
    assert np.array_equal(Augment(config)(picture(), 1, 2, 3), first)


def test_each_of_seed_epoch_and_sample_changes_the_pixels() -> None:
    augment = Augment(TrainConfig(image_size=32, **STRONG))
    keys = itertools.product(range(3), repeat=3)
    assert len({augment(picture(), *key).tobytes() for key in keys}) == 27


def test_an_image_is_cut_differently_in_each_epoch() -> None:
    augment, images = ImageAugment(TrainConfig(crop_scale=0.3)), range(20)
    cuts = {str(augment.views([(50, 37)] * 20, 1, e, images)[0]) for e in range(4)}
    assert len(cuts) == 4


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Augment(TrainConfig(image_size=32, trivial_augment=True, **STRONG))(picture(), 1, 2, 3)
    PairMix(TrainConfig(mixup=0.2, cutmix=1.0), 3)(*batch(), 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(50, 37), (1, 1), (3, 200), (16, 16)])
@pytest.mark.parametrize(
    "changes",
    [
        OFF,
        STRONG,
        {**STRONG, "trivial_augment": True},
        {**OFF, "random_erasing": 1.0},
        {**OFF, "flip": 1.0, "resize_mode": "pad"},
        {**STRONG, "interpolation": "bicubic"},
        {**STRONG, "interpolation": "lanczos"},
        {"color_jitter": 1.0, "crop_scale": 0.01},
    ],
)
def test_the_result_is_uint8_of_the_input_size_for_all_settings(
    changes: dict, size: tuple[int, int]
) -> None:
    augment = Augment(TrainConfig(image_size=16, **changes))
    for index in range(8):
        pixels = augment(picture(size), 0, 0, index)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_without_augmentation_training_sees_the_pixels_that_serving_sees(mode: str) -> None:
    config = TrainConfig(image_size=24, resize_mode=mode, **OFF)
    served = config.preprocess()(picture())
    assert np.array_equal(Augment(config)(picture(), 0, 1, 2), served)


def test_a_certain_flip_mirrors_the_picture() -> None:
    config = TrainConfig(image_size=24, **{**OFF, "flip": 1.0})
    assert np.array_equal(Augment(config)(picture(), 0, 0, 0), config.preprocess()(picture())[:, ::-1])


@pytest.mark.parametrize(("flip", "every"), [(0.0, 0), (0.25, 4), (0.5, 2), (1.0, 1)])
def test_an_image_is_mirrored_in_its_share_of_any_epochs_in_a_row(flip: float, every: int) -> None:
    """And about that share of all images in each epoch."""
    augment, images = ImageAugment(TrainConfig(flip=flip)), range(400)
    epochs = [augment.views([(50, 37)] * 400, 1, e, images)[1].tolist() for e in range(8)]
    counts = np.array(epochs).astype(int)
    for first in range(5):
        assert (counts[first : first + 4].sum(0) == (4 // every if every else 0)).all()
    assert np.abs(counts.mean(1) - flip).max() < 0.1


def test_erasing_fills_a_rectangle_with_the_mean_colour() -> None:
    config = TrainConfig(image_size=24, **{**OFF, "random_erasing": 1.0})
    changed = (Augment(config)(picture(), 0, 0, 0) != config.preprocess()(picture())).any(axis=2)
    rows, columns = changed.any(axis=1), changed.any(axis=0)
    assert changed[np.ix_(rows, columns)].all()
    assert (Augment(config)(picture(), 0, 0, 0)[changed] == [124, 116, 104]).all()


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))],
)
def test_where_no_box_fits_it_is_the_middle_as_long_as_the_aspect_allows(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    assert random_box(width, height, (0.9, 1.0), ASPECT, np.full(4 * TRIES, 0.5)) == box


def mixers() -> list[TrainConfig]:
    return [TrainConfig(mixup=0.4), TrainConfig(cutmix=1.0), TrainConfig(mixup=0.4, cutmix=1.0)]


@pytest.mark.parametrize("config", mixers())
@pytest.mark.parametrize("parts", [2, 4])
def test_mixing_does_not_depend_on_how_a_batch_is_divided(config: TrainConfig, parts: int) -> None:
    mix = PairMix(config, 3)
    images, labels = batch(8)
    whole_images, whole_targets = mix(images, labels, 40, 7, 1)
    n = 8 // parts
    divided = [mix(images[i : i + n], labels[i : i + n], 40 + i, 7, 1) for i in range(0, 8, n)]
    assert torch.equal(torch.cat([part[0] for part in divided]), whole_images)
    assert torch.equal(torch.cat([part[1] for part in divided]), whole_targets)


def black_and_white(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 is black and class 2 white, so that the brightness of a mixture is its share of class 2."""
    labels = torch.tensor([0, 2] * pairs)
    return (labels * 127.5).byte().view(-1, 1, 1, 1).expand(-1, 20, 24, 3).contiguous(), labels


@pytest.mark.parametrize("config", mixers())
def test_targets_are_the_shares_that_are_seen_of_each_image_of_a_pair(config: TrainConfig) -> None:
    mixed, targets = PairMix(config, 3)(*black_and_white(50), 0, 7, 1)
    white = mixed.mean((1, 2, 3)) / 255
    assert torch.allclose(targets, torch.stack([1 - white, torch.zeros(100), white], 1), atol=1e-5)
    assert targets[:, 2].view(50, 2)[:, 0].unique().numel() > 25, "each pair has its own share"


def test_cutmix_alone_never_blends_and_with_mixup_about_half_of_the_pairs_are_cut() -> None:
    def cut(**changes: float) -> int:
        """Pairs of which every pixel is one image's."""
        mixed, _ = PairMix(TrainConfig(**changes), 3)(*black_and_white(200), 0, 7, 1)
        return int(((mixed == 0) | (mixed == 255)).view(200, -1).all(1).sum())

    assert cut(cutmix=1.0) == 200
    assert cut(mixup=1.0) == 0
    assert 80 < cut(mixup=1.0, cutmix=1.0) < 120


def test_cutmix_cuts_anywhere() -> None:
    """Not only along a diagonal."""
    mixed, _ = PairMix(TrainConfig(cutmix=1.0), 3)(*black_and_white(200), 0, 7, 1)
    boxes = [torch.nonzero(image[..., 0]).double() for image in mixed[::2]]
    rows, columns = torch.stack([box.mean(0) for box in boxes if len(box)]).T
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2
    assert rows.max() - rows.min() > 14
    assert columns.max() - columns.min() > 17


def test_mixing_differs_for_each_epoch_and_position() -> None:
    mix = PairMix(TrainConfig(mixup=1.0), 3)
    images, labels = batch(2)
    mixed = {
        mix(images, labels, first, 0, epoch)[0].numpy().tobytes() for first in (0, 2) for epoch in (0, 1)
    }
    assert len(mixed) == 4


def test_without_mixing_images_are_untouched_and_targets_one_hot() -> None:
    images, labels = batch(5)
    same, targets = PairMix(TrainConfig(), 3)(images, labels, 0, 0, 0)
    assert same is images
    assert targets.argmax(1).tolist() == labels.tolist()
    assert targets.sum().item() == 5


@pytest.mark.parametrize("crop_scale", [0.5, 1.0])
def test_the_size_is_the_epochs(crop_scale: float) -> None:
    config = TrainConfig(image_size=48, start_size=24, eval_size=64, epochs=4, crop_scale=crop_scale)
    shapes = [Augment(config)(picture(), 0, epoch, 0).shape for epoch in range(4)]
    assert shapes == [(24, 24, 3), (32, 32, 3), (40, 40, 3), (48, 48, 3)]


def test_images_are_larger_where_a_subject_is_cut_from_them() -> None:
    """So that the network's input grows as it does without."""
    config = TrainConfig(image_size=48, start_size=24, epochs=4, subject_crop="cam", subject_zoom=1.5)
    shapes = [Augment(config)(picture(), 0, epoch, 0).shape for epoch in range(4)]
    assert shapes == [(36, 36, 3), (48, 48, 3), (60, 60, 3), (72, 72, 3)]


def test_without_crops_every_size_shows_the_part_that_evaluation_shows() -> None:
    smooth = Image.linear_gradient("L").resize((80, 60)).convert("RGB")
    config = TrainConfig(image_size=40, start_size=24, eval_size=56, resize_size=60, epochs=4, **OFF)
    seen = config.preprocess()(smooth)
    for epoch in range(4):
        pixels = Augment(config)(smooth, 0, epoch, 0)
        assert abs(int(pixels[0, 0, 0]) - int(seen[0, 0, 0])) < 8
        assert abs(int(pixels[-1, 0, 0]) - int(seen[-1, 0, 0])) < 8


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_made_smaller_as_pillow_makes_them_smaller(interpolation: str) -> None:
    """Antialiased, as validation and serving do: without it noise keeps its contrast."""
    image = picture((160, 120))
    expected = np.asarray(image.resize((32, 32), RESAMPLING[interpolation])).astype(int)
    assert np.abs(resize(np.asarray(image), 32, interpolation).astype(int) - expected).max() <= 2


def test_a_box_of_an_aspect_above_1_is_wider_than_high() -> None:
    random = np.full(4 * TRIES, 0.5)
    left, upper, width, height = random_box(400, 300, (0.1, 0.1), (2.0, 2.0), random)
    assert width == pytest.approx(2 * height, abs=2)
    assert width * height == pytest.approx(0.1 * 400 * 300, rel=0.02)
    assert left + width <= 400
    assert upper + height <= 300
