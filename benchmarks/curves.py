"""Do fast and slow paths learn the same? Loss curves side by side.

    python benchmarks/curves.py --data photographs/

The same run without the pixel cache and with it; in bf16; from images at their own size, where usually they
are made no larger than random crops need; and with another seed, which shows how far apart runs are that
differ by chance alone. Processors without bf16 arithmetic emulate it: slowly, but with the same roundings.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = "no cache, fp32"
FP32, BF16 = ["--precision", "fp32"], ["--precision", "bf16"]
CACHE = ["--pixel-cache", "on"]
RUNS = {
    FIRST: ["--pixel-cache", "off", *FP32],
    "cache, fp32": [*CACHE, *FP32],
    "cache, bf16": [*CACHE, *BF16],
    "whole images, fp32": [*CACHE, "--cache-size", "4096", *FP32],
    "cache, fp32, seed 1": [*CACHE, *FP32, "--seed", "1"],
}
METRICS = ("train/loss", "val/log_loss", "val/accuracy")


def train(data: Path, folder: Path, name: str, arguments: list[str]) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        *("--standalone", "--nproc_per_node=1", str(ROOT / "train" / "main.py"), "--data", str(data)),
        *("--output", str(folder), "--name", name, "--track", "false", "--channels-last", "true"),
        *arguments,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def table(metric: str, curves: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"| {metric}, epoch | " + " | ".join(curves) + " |", "|---" * (1 + len(curves)) + "|"]
    for epoch, rows in enumerate(zip(*curves.values(), strict=True), start=1):
        lines.append(f"| {epoch} | " + " | ".join(f"{row[metric]:.4f}" for row in rows) + " |")
    largest = (
        max(abs(a[metric] - b[metric]) for a, b in zip(curves[FIRST], other, strict=True))
        for other in curves.values()
    )
    lines.append(
        "| largest difference | " + " | ".join(f"{difference:.2g}" for difference in largest) + " |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="flat folder of label.number.jpg")
    parser.add_argument("--model", default="simple_cnn")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, default=3000, help="images")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        data, runs = Path(temporary) / "data", Path(temporary) / "runs"
        data.mkdir()
        files = sorted(args.data.iterdir())
        for path in files[:: max(1, len(files) // args.limit)][: args.limit]:
            os.symlink(path.resolve(), data / path.name)
        common = ["--model", args.model, "--epochs", str(args.epochs), "--near-duplicates", "false"]
        common += ["--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
        curves = {}
        for number, (name, arguments) in enumerate(RUNS.items()):
            curves[name] = train(data, runs, f"run{number}", [*common, *arguments])
            print(f"{name}: {curves[name][-1]['images_per_second']:.0f} images/s", flush=True)
    for metric in METRICS:
        print("\n" + table(metric, curves), flush=True)


if __name__ == "__main__":
    main()
