"""Bare training steps on the CPU with torch's gradients of depthwise weights and with ours, in turn.

    python benchmarks/depthwise.py --models mobilenet_v3_small tf_efficientnet_lite0 --image-size 128

Float32, channels_last, noise for images; train/engine/depthwise.py says where the two differ.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.engine.depthwise import quicken_depthwise
from train.engine.device import keep_freed_memory
from train.models.zoo import create


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v3_small"])
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    keep_freed_memory()
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (args.batch_size,))
    for name in args.models:
        networks = {}
        for way in ("torch", "ours"):
            networks[way] = create(name, 2, args.image_size).train().to(memory_format=torch.channels_last)
        quicken_depthwise(networks["ours"])
        seconds: dict[str, list[float]] = {way: [] for way in networks}
        for number in range(args.rounds + 1):
            for way, network in networks.items():
                started = time.perf_counter()
                F.cross_entropy(network(images), labels).backward()
                network.zero_grad()
                if number:  # the first one warms up
                    seconds[way].append(time.perf_counter() - started)
        ratio = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["ours"], strict=True))
        times = ", ".join(
            f"{way} {statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}] s"
            for way, values in seconds.items()
        )
        print(f"{name} at {args.image_size} px: {times}; {ratio:.2f} times as fast, n = {args.rounds}")


if __name__ == "__main__":
    main()
