"""Training steps in bf16 on a CPU with torch's convolutions and with those of train/models/convolutions.py,
in turn, after one of each: milliseconds.

python benchmarks/convolutions.py --models resnet18 tf_efficientnet_lite0 --image-size 128 --batch-size 64
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not benchmarks/, whose train.py would hide the package

from train.engine.autotune import multiplies_bf16  # noqa: E402
from train.engine.device import keep_freed_memory  # noqa: E402
from train.models.convolutions import convolutions  # noqa: E402
from train.models.zoo import create  # noqa: E402
from train.precision import Precision  # noqa: E402


def measured(name: str, size: int, batch_size: int, turns: int) -> dict[str, list[float]]:
    """Return the milliseconds of each turn's step, torch's and ours."""
    precision, device = Precision("bfloat16"), torch.device("cpu")
    network = create(name, 2, size).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 2

    def step(compiled: bool) -> float:
        network.zero_grad()
        started = time.perf_counter()
        ways = convolutions(precision, device, compiled)  # torch's own are left to a compiler
        with torch.autocast("cpu", torch.bfloat16), ways:
            loss = F.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return 1000 * (time.perf_counter() - started)

    times: dict[str, list[float]] = {"torch's": [], "ours": []}
    for turn in range(turns + 1):
        for way, compiled in zip(times, (True, False), strict=True):
            taken = step(compiled)
            if turn:
                times[way].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "tf_efficientnet_lite0"])
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    if not multiplies_bf16(torch.device("cpu")):
        parser.error("this processor has no bf16 arithmetic: a run's convolutions are in float32 there")
    keep_freed_memory()  # as training does
    for name in args.models:
        times = measured(name, args.image_size, args.batch_size, args.turns)
        ratios = [torchs / ours for torchs, ours in zip(*times.values(), strict=True)]
        listed = ", ".join(f"{way} {statistics.median(taken):.0f} ms" for way, taken in times.items())
        print(
            f"{name}, {args.image_size} px, batch {args.batch_size}: {listed}; "
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times as fast, "
            f"n = {args.turns}",
            flush=True,
        )


if __name__ == "__main__":
    main()
