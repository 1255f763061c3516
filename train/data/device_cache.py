"""Device cache: decoded images in the memory of the device that trains, cut and resized there.

Boxes and flips are those of `ImageAugment`, sample by sample. Pixels are within one of its 256 levels; a
few differ by more where bicubic interpolation of whole images overshoots black or white, which Pillow clips
in an order of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.loader import Batch, Loader, PixelDataset
from train.data.pixel_cache import PixelCache
from train.data.sampler import Key
from train.models.subject_crop.crop import in_float32, interpolation, triangle

SHARE = 0.2  # of a GPU's free memory, which --pixel-cache auto may fill
COPIED = 2**26  # bytes at a time, into the device's memory
CUT = 2**23  # pixels that are cut out at a time
ROUND = 32  # to multiples of which the sides of what is cut out are enlarged: few shapes, few allocations


def why_on_cpu(config: TrainConfig) -> str:
    """Return what of the settings needs the CPU to make training images; "" if nothing does."""
    preprocess = config.preprocess()
    if config.trivial_augment:
        return "--trivial-augment changes images one by one"
    if preprocess.interpolation not in KERNELS:
        return f"--interpolation {preprocess.interpolation} is not made for it"
    if preprocess.mode == "pad" and (config.crop_scale == 1 or config.retune_epochs):
        return "--resize-mode pad is not made for it"
    return ""


def choose_device_cache(
    config: TrainConfig, device: torch.device, needed: Sequence[int], free: float
) -> tuple[list[bool], str]:
    """Choose the caches to copy into the device's memory, training images first, and return a line for the
    user. `needed`: bytes of each; 0: no cache. With auto, only a GPU is used.

    Raises:
        UserError: --pixel-cache device, and the memory is too small.
    """
    mode, listed = config.pixel_cache, f"{sum(needed) / 1e6:,.1f} MB of decoded images"
    if mode == "device":
        if sum(needed) > free:
            raise UserError(
                f"--pixel-cache device: {listed} exceed the {free / 1e6:,.1f} MB free on {device}; "
                "lower --cache-size, or use --pixel-cache on"
            )
        return [size > 0 for size in needed], f"{listed} in the memory of {device}, cut and resized there"
    # in deterministic mode free memory must not decide a result
    if mode != "auto" or device.type != "cuda" or config.deterministic or not any(needed):
        return [False for _ in needed], ""
    reason, rest, chosen = why_on_cpu(config), SHARE * free, []
    for number, size in enumerate(needed):
        chosen.append(0 < size <= rest and not (number == 0 and reason))
        rest -= size * chosen[-1]
    there = sum(size for size, taken in zip(needed, chosen, strict=True) if taken)
    note = f"{there / 1e6:,.1f} MB of decoded images in the memory of {device}, cut and resized there"
    if there == sum(needed):
        return chosen, f"{note} (--pixel-cache on leaves them on disk)"
    which = "training" if not chosen[0] and needed[0] else "validation"
    limit = f"{listed} are more than {SHARE:.0%} of the {free / 1e6:,.1f} MB free on {device}"
    left = f"{which} images are loaded by processes: {(which == 'training' and reason) or limit}"
    return chosen, f"{note}; {left}" if there else left


def cubic(distance: Tensor) -> Tensor:
    """Return the weights of bicubic interpolation with a = -0.5, as Pillow and torch have it."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


KERNELS = {"bilinear": triangle, "bicubic": cubic}


class DeviceLoader(Loader):
    """Loader whose images are on the device from the beginning: no processes, and nothing to wait for.

    Args:
        dataset: with a cache.
        pixels: uint8 [pixels of all images, 3]; copied to the device if not given.
    """

    def __init__(self, dataset: PixelDataset, device: torch.device, pixels: Tensor | None = None):
        super().__init__(dataset, 0, pin_memory=False)
        assert dataset.cache is not None
        self.cache = dataset.cache
        self.pixels = to_device(self.cache, device) if pixels is None else pixels

    def __call__(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """Yield the batches of these keys, with images on the device and all else on the CPU."""
        for keys in batches:
            epochs, indices, _ = zip(*keys, strict=True)
            yield self.dataset.batch(keys, self._load(epochs[0], indices), {})

    def with_augment(self, augment: ImageAugment) -> "DeviceLoader":
        """Return a loader of the same images in the same memory, augmented in another way."""
        return DeviceLoader(replace(self.dataset, augment=augment), self.pixels.device, self.pixels)

    def _load(self, epoch: int, indices: Sequence[int]) -> Tensor:
        augment, chosen = self.dataset.augment, np.array(indices)
        firsts, sizes = self.cache.offsets[chosen] // 3, self.cache.sizes[chosen].astype(np.int64)
        if augment is None:
            width, height = sizes[0].tolist()
            rows = torch.from_numpy(firsts // (width * height)).to(self.pixels.device, non_blocking=True)
            return self.pixels.view(-1, height, width, 3)[rows]
        size = augment.size(epoch)
        cuts, flips = augment.views(sizes.tolist(), self.dataset.seed, epoch, indices)
        corners, whole = np.zeros_like(sizes), augment.whole_view(size)
        # of each image the window that may be read, and the box in it that is resized
        windows = np.hstack([corners, sizes]) if cuts is None else cuts
        boxes = np.hstack([corners, windows[:, 2:]]).astype(np.float32)
        if cuts is None and whole.mode == "crop":
            boxes = np.array([whole.crop_box(*each) for each in sizes.tolist()], np.float32)
        starts = firsts + windows[:, 1] * sizes[:, 0] + windows[:, 0]
        cut = np.column_stack([starts, sizes[:, 0], windows[:, 2:], flips])
        most = max(1, CUT // int(windows[:, 2:].max(0).prod()))
        kernel = KERNELS[augment.preprocess.interpolation]
        parts = [
            cut_and_resize(self.pixels, cut[i : i + most], boxes[i : i + most], size, kernel)
            for i in range(0, len(cut), most)
        ]
        return torch.cat(parts)


def to_device(cache: PixelCache, device: torch.device) -> Tensor:
    """Return all pixels of the cache's file, uint8 [pixels, 3], in the memory of the device."""
    flat = torch.empty(cache.bytes.size, dtype=torch.uint8, device=device)
    for first in range(0, len(flat), COPIED):
        part = cache.bytes[first : first + COPIED]
        flat[first : first + COPIED].copy_(torch.from_numpy(part.copy()))  # torch warns of read-only memory
    return flat[: len(flat) // 3 * 3].view(-1, 3)


def cut_and_resize(
    pixels: Tensor,
    cut: NDArray[np.int64],
    boxes: NDArray[np.float32],
    size: int,
    kernel: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return uint8 [N, size, size, 3] of windows of images that lie one after the other.

    Args:
        pixels: uint8 [pixels, 3].
        cut: [N, 5] first pixel of the window, width of its image, width and height of the window, flip.
        boxes: [N, 4] left, upper, right, lower in the window.
    """
    device = pixels.device
    width, height = (ROUND * -(-int(longest) // ROUND) for longest in cut[:, 2:4].max(0))
    first, stride, w, h, flip = torch.from_numpy(cut.T.copy()).to(device, non_blocking=True)
    left, upper, right, lower = torch.from_numpy(boxes.T.copy()).to(device, non_blocking=True)
    rows = torch.minimum(torch.arange(height, device=device), h[:, None] - 1)
    columns = torch.minimum(torch.arange(width, device=device), w[:, None] - 1)
    at = first[:, None, None] + rows[:, :, None] * stride[:, None, None] + columns[:, None]
    window = pixels[at].permute(0, 3, 1, 2).float()
    with in_float32(pixels):
        across = interpolation(left / width, right / width, width, size, kernel, w)
        across = torch.where(flip[:, None, None] > 0, across.flip(1), across)
        down = interpolation(upper / height, lower / height, height, size, kernel, h)
        # first across, and within the levels before it goes down, as torch and Pillow do
        resized = (window @ across[:, None].transpose(2, 3)).clamp_(0, 255)
        resized = (down[:, None] @ resized).round_().clamp_(0, 255)
    return resized.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)
