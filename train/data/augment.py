"""Augmentation of training images, a function of (seed, epoch, sample or pair).

`ImageAugment` works on one image where it is decoded, `BatchAugment` and `PairMix` on whole batches on the
device that trains. A new augmentation is a method of one of the three, with random numbers under a seed of
its own purpose, so that those of the others stay as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms import v2

from serve.contract.preprocess import RESAMPLING, Preprocess
from train.config import TrainConfig
from train.data.random_numbers import seed_of, uniforms
from train.data.reading import Pixels

ERASED = (124, 116, 104)  # ImageNet's mean colour
GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow converts
TRIES = 10  # for a rectangle that fits
ASPECT = (3 / 4, 4 / 3)  # of random resized crops (arXiv 1409.4842)
ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # arXiv 1708.04896


class ImageAugment:
    """Random resized crop, flip and TrivialAugment of single images, at the epoch's size."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.trivial = v2.TrivialAugmentWide() if config.trivial_augment else None
        self.preprocess = config.preprocess()

    def __call__(self, images: Sequence[Pixels], seed: int, epoch: int, indices: Sequence[int]) -> Pixels:
        """Return uint8 [N, size, size, 3] from uint8 [H, W, 3] of any sizes."""
        size = self.size(epoch)
        whole, augmented = self.whole_view(size), np.empty((len(images), size, size, 3), np.uint8)
        cuts, flips = self.views([image.shape[1::-1] for image in images], seed, epoch, indices)
        for i, (image, index) in enumerate(zip(images, indices, strict=True)):
            if cuts is None:
                seen = whole(Image.fromarray(image))
            else:
                left, upper, width, height = cuts[i]
                crop = image[upper : upper + height, left : left + width]
                seen = resize(crop, size, self.preprocess.interpolation)
            pixels = torch.from_numpy(np.require(seen, requirements="W"))
            if flips[i]:
                pixels = pixels.flip(1)  # numpy's is ten times slower
            if self.trivial is not None:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed_of("trivial", seed, epoch, index))
                    pixels = self.trivial(pixels.permute(2, 0, 1)).permute(1, 2, 0)
            augmented[i] = pixels.numpy()
        return augmented

    def size(self, epoch: int) -> int:
        """Return the side of the epoch's images."""
        return self.config.input_size(self.config.train_size(epoch))

    def views(
        self, sizes: Sequence[Sequence[int]], seed: int, epoch: int, indices: Sequence[int]
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_]]:
        """Return the random crops [N, 4] (left, upper, width, height) of images of these (width, height),
        None without random crops, and which are flipped [N]: each in every second epoch at --flip 0.5, so
        that each two show both sides of each image (alternating flip, arXiv 2404.00498)."""
        share, area = self.config.flip, (self.config.crop_scale, 1.0)
        starts = uniforms(seed_of("flip", seed), indices, 1)[:, 0]
        flips = (starts + epoch * share) % 1 < share
        if area[0] == 1:
            return None, flips
        random = uniforms(seed_of("view", seed, epoch), indices, 4 * TRIES)
        pairs = zip(sizes, random, strict=True)
        return np.array([random_box(w, h, area, ASPECT, numbers) for (w, h), numbers in pairs]), flips

    def whole_view(self, size: int) -> Preprocess:
        """Return validation's preprocessing for images of this side: what is seen without random crops."""
        resize_size = round(self.preprocess.resize_size * size / self.preprocess.size)
        return replace(self.preprocess, size=size, resize_size=resize_size)


def random_box(
    width: int,
    height: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    random: NDArray[np.float64],
) -> tuple[int, int, int, int]:
    """Return a box (left, upper, width, height) of a uniform share of the area and a log-uniform aspect.

    When no try fits, it is the middle of the image, as wide or as high as `aspect` allows.

    Args:
        random: [4 * TRIES] uniform numbers.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for share, shape, x, y in random.reshape(-1, 4):
        pixels = width * height * (area[0] + (area[1] - area[0]) * share)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def resize(image: Pixels, size: int, interpolation: str) -> Pixels:
    """Return uint8 [size, size, 3], antialiased; within one level of Pillow's."""
    if interpolation == "lanczos":  # torch has none
        return np.asarray(Image.fromarray(image).resize((size, size), RESAMPLING[interpolation]))
    # a copy, because torch warns of read-only memory; in this order it is seen to be channels_last
    pixels = torch.from_numpy(image[None].copy()).permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


class BatchAugment:
    """Colour jitter (brightness, contrast, saturation) and random erasing of a batch."""

    def __init__(self, config: TrainConfig):
        self.strength = 0.0 if config.trivial_augment else config.color_jitter
        self.erasing = config.random_erasing
        self.weights = torch.tensor(GREY)

    def __call__(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Return the changed images; with colour jitter in float32, whole numbers of 0..255.

        Args:
            images: uint8 [N, H, W, 3] on any device.
            indices: int64 [N] of the samples, on the CPU.
        """
        if self.strength or self.erasing:
            random = uniforms(seed_of("colour", seed, epoch), indices.numpy(), 4 + 4 * TRIES)
            if self.strength:
                images = self._jitter(images, random[:, :3])
            self._erase(images, random[:, 3:])
        return images

    def _jitter(self, images: Tensor, random: NDArray[np.float64]) -> Tensor:
        """The three are linear maps of a pixel's colour, so they are one, without rounding in between."""
        factors = np.maximum(0.0, 1 + self.strength * (2 * random - 1)).astype(np.float32)
        brightness, contrast, saturation = (
            torch.from_numpy(column).to(images.device, non_blocking=True).view(-1, 1, 1)
            for column in np.ascontiguousarray(factors.T)
        )
        self.weights = self.weights.to(images.device, non_blocking=True)  # once
        pixels = images.float()
        grey = pixels @ self.weights
        mean = grey.mean((1, 2), keepdim=True)
        # b: x -> b x; c: x -> c x + (1 - c) mean; s: x -> s x + (1 - s) grey(x), of which grey(mean) = mean
        grey.mul_(brightness * contrast * (1 - saturation)).add_(brightness * (1 - contrast) * mean)
        pixels.mul_((brightness * contrast * saturation)[..., None])
        for channel in range(3):  # one addition to all three takes twice as long on a processor
            pixels[..., channel].add_(grey)
        return pixels.clamp_(0, 255).round_()

    def _erase(self, images: Tensor, random: NDArray[np.float64]) -> None:
        height, width = images.shape[1:3]
        for i in np.flatnonzero(random[:, 0] < self.erasing).tolist():
            left, upper, w, h = random_box(width, height, ERASED_AREA, ERASED_ASPECT, random[i, 1:])
            box = images[i, upper : upper + h, left : left + w]
            for channel, value in enumerate(ERASED):
                box[..., channel] = value


class PairMix:
    """mixup and CutMix between neighbours (0, 1), (2, 3), ... of a batch; with both, each pair gets one.

    Neighbours in a shuffled order are random pairs. Unlike mixing with a rolled or reversed batch this does
    not depend on how the batch is divided over processes, as long as no pair is divided.
    """

    def __init__(self, config: TrainConfig, num_classes: int):
        self.num_classes = num_classes
        self.mixup, self.cutmix = config.mixup, config.cutmix

    def __call__(self, images: Tensor, labels: Tensor, first: int, *key: int) -> tuple[Tensor, Tensor]:
        """Return images, float32 if they are mixed, and targets float32 [N, num_classes].

        Args:
            images: uint8 or float32 [N, H, W, 3].
            labels: int64 [N], or probabilities float32 [N, num_classes].
            first: position of images[0] in the epoch; with `key` it decides the random numbers.
        """
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.num_classes).float()
        if not (self.mixup or self.cutmix):
            return images, labels
        assert len(images) % 2 == first % 2 == 0, "`check_batch_size` refuses batches that divide a pair"
        pairs = np.arange(first // 2, (first + len(images)) // 2)
        choice, share, x, y = uniforms(seed_of("mix", *key), pairs, 4).T
        cuts = choice < (0.5 if self.mixup else 1.0) if self.cutmix else np.zeros(len(pairs), bool)
        alphas = np.where(cuts, self.cutmix or 1.0, self.mixup or 1.0)
        own = betaincinv(alphas, alphas, share)  # Beta(alpha, alpha) by its inverse
        pixels = images.float().view(-1, 2, *images.shape[1:])
        blend = torch.tensor(np.where(cuts, 1.0, own), dtype=torch.float32)
        blend = blend.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        mixed = torch.empty_like(pixels)
        for one, other in ((0, 1), (1, 0)):
            torch.lerp(pixels[:, other], pixels[:, one], blend, out=mixed[:, one])
        height, width = images.shape[1:3]
        for i in np.flatnonzero(cuts).tolist():
            rows, columns = (_span(n, at, own[i]) for n, at in ((height, y[i]), (width, x[i])))
            mixed[i, :, rows, columns] = pixels[i].flip(0)[:, rows, columns]
            cut = (rows.stop - rows.start) * (columns.stop - columns.start)
            own[i] = 1 - cut / (height * width)
        shares = torch.tensor(own, dtype=torch.float32).to(images.device, non_blocking=True).view(-1, 1, 1)
        two = labels.view(-1, 2, labels.shape[1])
        targets = torch.lerp(two.flip(1), two, shares)
        return mixed.flatten(0, 1), targets.flatten(0, 1)


def _span(length: int, at: float, own: float) -> slice:
    """Return a side of CutMix's box (arXiv 1905.04899): sqrt(1 - own) of the length around a uniform
    position, cut at the edges."""
    half, centre = round(math.sqrt(1 - own) * length) // 2, int(at * length)
    return slice(max(0, centre - half), min(length, centre + half))
