"""Loaders of a run: from the device's memory, or by processes."""

from pathlib import Path

import torch

from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.device_cache import DeviceLoader, choose_device_cache
from train.data.index import Data, ImageSet
from train.data.loader import Loader, PixelDataset
from train.data.pixel_cache import Entries, PixelCache, open_cache, training_entries, validation_entries
from train.distributed import Log, Ranks, max_over_ranks, on_main
from train.engine.device import free_memory
from train.shared_memory import share

VAL_WORKERS = 2  # loader processes that copy pixels as they are


def build_loaders(
    config: TrainConfig,
    stage: TrainConfig,
    data: Data,
    ranks: Ranks,
    device: torch.device,
    num_workers: int,
    log: Log,
) -> tuple[Loader, Loader]:
    """Return the loaders of training images, in the stage's view, and of validation images."""
    cache, val_cache = caches = open_caches(config, data, ranks, log)
    needed = [0 if each is None else each.bytes.size for each in caches]
    free = -max_over_ranks(-free_memory(device))
    on_device, note = choose_device_cache(config, device, needed, free)
    if note:
        log(note)
    augment, load = ImageAugment(stage), training_entries(config).load
    train = PixelDataset(data.train, config.seed, augment, load, cache)
    load, side = validation_entries(config).load, config.preprocess().size
    val = PixelDataset(data.val, config.seed, None, load, val_cache, side)
    val_workers = num_workers if val_cache is None else min(num_workers, VAL_WORKERS)

    def build(dataset: PixelDataset, resident: bool, workers: int) -> Loader:
        if resident:
            return DeviceLoader(dataset, device)
        return Loader(dataset, workers, device.type == "cuda", 60 * config.hang_minutes)

    return build(train, on_device[0], num_workers), build(val, on_device[1], val_workers)


def open_caches(
    config: TrainConfig, data: Data, ranks: Ranks, log: Log
) -> tuple[PixelCache | None, PixelCache | None]:
    """Return the pixel caches of training and validation images, None where they are decoded each time.

    Rank 0 builds them; the ranks of another machine build their own if they do not see its files.
    """
    mode = config.pixel_cache
    if mode == "off" or (mode == "auto" and config.epochs + config.retune_epochs == 1):
        return None, None
    folder = Path(config.output) / ".cache"

    def open_one(images: ImageSet, stored: Entries) -> PixelCache | None:
        def opened() -> PixelCache | None:
            return open_cache(folder, images, stored, mode, log)

        built = on_main(ranks, lambda: opened() is not None)
        return share_index(opened() if built else None, ranks, folder)

    train = open_one(data.train, training_entries(config))
    return train, open_one(data.val, validation_entries(config))


def share_index(cache: PixelCache | None, ranks: Ranks, folder: Path) -> PixelCache | None:
    """Return the cache with one copy of its index on each machine. Every rank must call it."""
    arrays = share([] if cache is None else [cache.offsets, cache.sizes], ranks, folder)
    return None if cache is None else PixelCache(cache.file, *arrays)
