"""Training-time augmentation. Every draw is a function of (seed, epoch, sample or pair)."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

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
    """RGB image of any size -> uint8 [size, size, 3], randomly changed."""

    def __init__(self, config: TrainConfig):
        steps: list[v2.Transform] = []
        if config.crop_scale < 1:
            steps.append(
                v2.RandomResizedCrop(
                    config.image_size,
                    scale=(config.crop_scale, 1.0),
                    interpolation=INTERPOLATION[config.interpolation],
                )
            )
        steps.append(v2.RandomHorizontalFlip(config.flip))
        if config.trivial_augment:
            steps.append(v2.TrivialAugmentWide())
        elif config.color_jitter:
            strength = config.color_jitter
            steps.append(v2.ColorJitter(strength, strength, strength))
        self.on_image = v2.Compose(steps)
        self.erase = v2.RandomErasing(config.random_erasing, value=ERASED, inplace=True)
        self.preprocess = config.preprocess()
        self.crops = config.crop_scale < 1

    def __call__(self, image: Image.Image, *key: int) -> NDArray[np.uint8]:
        with randomness("augment", *key):
            if not self.crops:  # the whole view that evaluation has
                image = Image.fromarray(self.preprocess(image))
            pixels = np.array(self.on_image(image))
            self.erase(torch.from_numpy(pixels).permute(2, 0, 1))  # a view: erased in place
        return pixels


class PairMix:
    """mixup and CutMix between neighbours (0, 1), (2, 3), ... of a batch.

    Neighbours in a shuffled order are random pairs. Unlike mixing with a rolled or reversed batch this
    does not depend on how the batch is divided over processes, as long as no pair is divided.
    """

    def __init__(self, config: TrainConfig, num_classes: int):
        self.num_classes = num_classes
        choices: list[v2.Transform] = []
        if config.mixup:
            choices.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
        if config.cutmix:
            choices.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(choices) if choices else None

    def __call__(self, images: Tensor, labels: Tensor, first: int, *key: int) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: uint8 [N, H, W, 3].
            labels: int64 [N].
            first: place of images[0] in the epoch; with `key` it decides what is drawn.

        Returns:
            images as they were, or float32 [N, H, W, 3] when mixed; targets float32 [N, num_classes].

        Raises:
            ValueError: a pair would be divided over processes or accumulation steps.
        """
        if self.mix is None:
            return images, F.one_hot(labels, self.num_classes).float()
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
