"""Training-time augmentation. Every draw is a function of (seed, epoch, sample or pair)."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from serve.preprocess import Preprocess
from train.config import TrainConfig

ERASED = [124.0, 116.0, 104.0]  # ImageNet's mean colour
INTERPOLATION = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
    "lanczos": v2.InterpolationMode.LANCZOS,
}


def seed_of(purpose: str, *key: int) -> int:
    """A 64-bit seed that is a function of purpose and key; neighbouring keys give unrelated seeds."""
    entropy = (zlib.crc32(purpose.encode()), len(key), *key)  # SeedSequence takes (1,) and (1, 0) for one
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@contextmanager
def randomness(purpose: str, *key: int) -> Iterator[None]:
    """Inside, torch's CPU generator is a function of the key; outside, it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(purpose, *key))
        yield


class Augment:
    """RGB image of any size -> uint8 [size, size, 3], randomly changed; the size is the epoch's."""

    def __init__(self, config: TrainConfig):
        self.config = config
        color: list[v2.Transform] = []
        if config.trivial_augment:
            color.append(v2.TrivialAugmentWide())
        elif config.color_jitter:
            strength = config.color_jitter
            color.append(v2.ColorJitter(strength, strength, strength))
        self.on_image = v2.Compose([v2.RandomHorizontalFlip(config.flip), *color])
        self.erase = v2.RandomErasing(config.random_erasing, value=ERASED, inplace=True)
        sizes = {self._size(epoch) for epoch in range(config.epochs)}
        self.views = {size: self._view(size) for size in sizes}

    def _size(self, epoch: int) -> int:
        return self.config.input_size(self.config.train_size(epoch))

    def _view(self, size: int) -> Callable[[Image.Image], Image.Image]:
        """Cuts the square that is seen."""
        if self.config.crop_scale < 1:
            interpolation = INTERPOLATION[self.config.preprocess().interpolation]
            crop: Callable[[Image.Image], Image.Image] = v2.RandomResizedCrop(
                size, scale=(self.config.crop_scale, 1.0), interpolation=interpolation
            )
            return crop
        evaluated = self.config.preprocess()
        resize_size = round(evaluated.resize_size * size / evaluated.size)
        return WholeView(replace(evaluated, size=size, resize_size=resize_size))

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> NDArray[np.uint8]:
        with randomness("augment", seed, epoch, index):
            view = self.views[self._size(epoch)]
            pixels = np.array(self.on_image(view(image)))
            self.erase(torch.from_numpy(pixels).permute(2, 0, 1))  # a view: erased in place
        return pixels


@dataclass(frozen=True)
class WholeView:
    """What evaluation sees of an image."""

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(self.preprocess(image))


class PairMix:
    """mixup and CutMix between neighbours (0, 1), (2, 3), ... of a batch.

    Neighbours in a shuffled order are random pairs. Unlike mixing with a rolled or reversed batch this
    does not depend on how the batch is divided over processes, as long as no pair is divided.
    """

    def __init__(self, config: TrainConfig, num_classes: int):
        self.num_classes = num_classes
        choices: list[v2.Transform] = []
        if config.mixup:
            choices.append(v2.MixUp(alpha=config.mixup))
        if config.cutmix:
            choices.append(v2.CutMix(alpha=config.cutmix))
        self.mix = v2.RandomChoice(choices) if choices else None

    def __call__(self, images: Tensor, labels: Tensor, first: int, *key: int) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: uint8 [N, H, W, 3].
            labels: int64 [N], or probabilities float32 [N, num_classes].
            first: place of images[0] in the epoch; with `key` it decides what is drawn.

        Returns:
            images as they were, or float32 [N, H, W, 3] when mixed; targets float32 [N, num_classes].

        Raises:
            ValueError: a pair would be divided over processes or accumulation steps.
        """
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.num_classes).float()
        if self.mix is None:
            return images, labels
        if len(images) % 2 or first % 2:
            raise ValueError(
                f"mixup and cutmix need an even number of images in each forward pass, and there are "
                f"{len(images)}: choose another --batch_size, --accumulation or number of processes"
            )
        channels_first = images.permute(0, 3, 1, 2).float()
        mixed, targets = [], []
        for i in range(0, len(images), 2):
            with randomness("mix", *key, first + i):
                pair, target = self.mix(channels_first[i : i + 2], labels[i : i + 2])
            mixed.append(pair)
            targets.append(target)
        return torch.cat(mixed).permute(0, 2, 3, 1), torch.cat(targets)
