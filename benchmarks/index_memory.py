"""Memory of each training process by the number of images in the index: its own, not what it shares.

    python benchmarks/index_memory.py --images 10000 1000000

Two ranks under torchrun with two loader processes each index that many names (all of the same few pictures,
so that neither disk nor decoding matters), share the index, and load batches in the order of an epoch with
the functions that training uses. "own" is unique set size: what would be free if the process ended. Rank 0
makes the index from Python lists, as it does after a scan.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch

from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.index import Data, ImageSet
from train.data.loader import Loader, PixelDataset
from train.data.pixel_cache import PixelCache, training_entries
from train.data.sampler import EpochPlan
from train.distributed import gather_list, on_main, process_group, ranks_from_environment
from train.engine.device import keep_freed_memory
from train.engine.loaders import share_index

SIDE, BATCH, STEPS = 64, 64, 50


def index(count: int) -> Data:
    """As a scan leaves it: a string for each path and each hash."""
    names = [f"class{i % 10}/photograph-number-{i:09d}.jpg" for i in range(count)]
    hashes = [f"{i:064x}" for i in range(count)]
    classes = tuple(f"class{i}" for i in range(10))
    images = ImageSet(Path("photographs"), names, np.arange(count) % 10, classes, hashes)
    return Data(images, images.take(np.arange(10)), {}, "", [])


def own_megabytes(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss) / 2**20


def child(count: int, folder: Path) -> None:
    """One rank; rank 0 prints a line for each process."""
    ranks = ranks_from_environment()
    keep_freed_memory()
    torch.set_num_threads(1)
    config = TrainConfig(image_size=32)
    with process_group(ranks, torch.device("cpu")):
        data = on_main(ranks, lambda: index(count)).shared(ranks, folder)
        gc.collect()
        pixels = folder / "pixels.u8"
        on_main(ranks, lambda: pixels.write_bytes(bytes(3 * SIDE * SIDE)))
        entries = np.zeros(count, np.int64), np.full((count, 2), SIDE, np.int32)
        cache = share_index(PixelCache(pixels, *entries), ranks, folder)
        del entries
        plan = EpochPlan(len(data.train), BATCH, 0, ranks.rank, ranks.world_size)
        load = training_entries(config).load
        dataset = PixelDataset(data.train, 0, ImageAugment(config), load, cache)
        loader = Loader(dataset, 2, pin_memory=False)
        batches = loader(plan.batches(0))
        for _ in islice(batches, STEPS):
            pass
        me = psutil.Process()
        mine = [(f"rank {ranks.rank}", own_megabytes(me))]
        mine += [(f"its loader {i}", own_megabytes(p)) for i, p in enumerate(me.children())]
        for part in gather_list(mine, ranks):
            if ranks.is_main:
                print(json.dumps(part), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of one rank
    args = parser.parse_args()
    if args.folder:
        child(args.images[0], args.folder)
        return
    columns: dict[str, list[float]] = {}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    for count in args.images:
        with tempfile.TemporaryDirectory() as folder:
            command = [*torchrun, __file__, "--images", str(count), "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
        for rank, part in enumerate(ranks):
            for name, megabytes in part:
                key = name if name.startswith("rank") else f"{name} of rank {rank}"
                columns.setdefault(key, []).append(megabytes)
    print("| own memory, MiB | " + " | ".join(f"{count:,} images" for count in args.images) + " |")
    print("|---|" + "---|" * len(args.images))
    for name, values in columns.items():
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in values) + " |")


if __name__ == "__main__":
    main()
