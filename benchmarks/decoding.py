"""Large photographs decoded in full and at a smaller scale, in turn: images a second and core, and pixels.

    python benchmarks/decoding.py --images photographs/ --megapixels 12

Small photographs are tiled to large ones, which are as sharp as the small ones: harder than a camera's.
Seconds are those of one thread's processor.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from serve.contract.images import load_image, read_image_file
from serve.contract.preprocess import Preprocess

SIZES = ((128, 146), (224, 256), (336, 384))
TILE = (500, 375)
QUALITY = 90


def tiled(photographs: Sequence[Path], megapixels: float) -> bytes:
    """Return a JPEG with sides of 4:3 that is made of these photographs, again and again."""
    width, height = TILE
    across = max(1, round((megapixels * 1e6 / (width * height)) ** 0.5))
    image = Image.new("RGB", (across * width, across * height))
    for i in range(across * across):
        tile = load_image(read_image_file(photographs[i % len(photographs)])).resize(TILE)
        image.paste(tile, (i % across * width, i // across * height))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--count", type=int, default=6, help="large photographs")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    found = sorted(args.images.glob("*.jpg"))
    files = [tiled(found[64 * i % len(found) :], args.megapixels) for i in range(args.count)]
    for size, resize_size in SIZES:
        scaled = Preprocess("crop", size, resize_size)
        speeds: dict[int, list[float]] = {0: [], scaled.decode_ratio: []}
        full = replace(scaled, decode_ratio=0)
        for _ in range(args.repeats):
            for preprocess in (full, scaled):
                started = time.thread_time()
                for data in files:
                    preprocess(load_image(data, preprocess.decode, []))
                speeds[preprocess.decode_ratio].append(len(files) / (time.thread_time() - started))
        whole, less = (
            np.array([scaled(load_image(data, decode)).astype(int) for data in files])
            for decode in (full.decode, scaled.decode)
        )
        difference = np.abs(whole - less)
        print(f"{size} px: {difference.mean():.3f} levels off in the mean, {difference.max()} at most")
        for ratio, values in speeds.items():
            print(f"  decode_ratio {ratio}: {', '.join(f'{v:.1f}' for v in values)} images a second")


if __name__ == "__main__":
    main()
