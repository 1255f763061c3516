"""Two designs of batch scoring, in turn: which is faster, with what network?

    python benchmarks/pipelines.py --model model.onnx --images photographs/ --batch-sizes 4 8

pool: threads decode into one of two batches while a session with a thread a processor runs the other.
workers: what serve/batch.py does; each thread decodes a small batch and runs a one-thread session on it.
Ratios of the same round are reported, for a machine that is busy with other things.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from serve.batch import score  # noqa: E402
from serve.contract.images import load_image, read_image_file  # noqa: E402
from serve.contract.listing import list_images  # noqa: E402
from serve.inputs.inventory import Entry  # noqa: E402
from serve.predictor import Predictor  # noqa: E402
from serve.processors import available_processors  # noqa: E402


def with_pool(predictor: Predictor, root: Path, paths: list[str], batch_size: int) -> None:
    size = predictor.metadata.preprocess.size
    buffers = [np.empty((batch_size, size, size, 3), np.uint8) for _ in range(2)]

    def decode(target: NDArray[np.uint8], path: str) -> None:
        target[...] = predictor.preprocess(load_image(read_image_file(root / path), predictor.decode))

    with ThreadPoolExecutor(available_processors()) as pool:

        def submit(first: int) -> list[Future[None]]:
            pixels = buffers[first // batch_size % 2]
            chunk = enumerate(paths[first : first + batch_size])
            return [pool.submit(decode, pixels[i], path) for i, path in chunk]

        first, decoding = 0, submit(0)
        while decoding:
            for future in decoding:
                future.result()
            following = submit(first + batch_size)
            predictor.predict(buffers[first // batch_size % 2][: len(decoding)])
            first, decoding = first + batch_size, following


def with_workers(predictor: Predictor, root: Path, paths: list[str], batch_size: int) -> None:
    entries = (Entry(path) for path in paths)
    rows = score(predictor, entries, lambda e: read_image_file(os.path.join(root, e.name)), batch_size)
    assert not any(row.error for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="images in a round")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4], help="of the workers")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    paths = list_images(args.images).paths[: args.limit]
    many = Predictor(args.model, "cpu")
    one = Predictor(args.model, "cpu", threads=1)
    designs: dict[str, Callable[[], None]] = {"pool, 64": lambda: with_pool(many, args.images, paths, 64)}
    for batch_size in args.batch_sizes:
        designs[f"workers, {batch_size}"] = lambda b=batch_size: with_workers(one, args.images, paths, b)
    seconds: dict[str, list[float]] = {name: [] for name in designs}
    for _ in range(args.repeats):
        for name, run in designs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    baseline = seconds["pool, 64"]
    print(
        "| design, batch | speed relative to pool, 64: median | lowest | highest | n |\n"
        "|---|---|---|---|---|"
    )
    for name, values in seconds.items():
        ratios = [before / after for before, after in zip(baseline, values, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"| {name} | {middle:.2f} | {low:.2f} | {high:.2f} | {len(ratios)} |")


if __name__ == "__main__":
    main()
