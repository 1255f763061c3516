"""The same training run with 1, 2 and 4 processes: is it the same, and how fast?

    python benchmarks/processes.py --data data/sample/train

Two parts. Sameness: one epoch in float32 of a network without batch norm; reports the number of validation
images and the largest difference of a weight from the run with one process, with SGD and with AdamW
(which divides each gradient by its own size: the rounding of one near 0 becomes as large as a step).
Speed: epochs of simple_cnn, the process counts in turn (1 2 4 1 2 4 ...); the median images/s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.checkpoint import load_checkpoint  # noqa: E402

SAME = [
    *("--model", "squeezenet1_1", "--dropout", "0", "--image-size", "64", "--batch-size", "64"),
    *("--precision", "fp32", "--deterministic", "--mixup", "0.2", "--epochs", "1"),
]
OPTIMIZERS = {
    "sgd": ["--optimizer", "sgd", "--lr", "0.02"],
    "adamw": ["--optimizer", "adamw", "--lr", "1e-3"],
}
FAST = ["--model", "simple_cnn", "--image-size", "64", "--precision", "bf16", "--channels-last", "true"]


def train(processes: int, data: Path, folder: Path, name: str, arguments: list[str]) -> Path:
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        *("--standalone", f"--nproc_per_node={processes}", str(ROOT / "train" / "main.py")),
        *("--data", str(data.resolve()), "--track", "false", "--name", name, *arguments),
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "runs" / name


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/sample/train"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of each timed run; the first is not counted")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("| optimizer | processes | validation images | largest weight difference from 1 process |")
        print("|---|---|---|---|")
        for optimizer, settings in OPTIMIZERS.items():
            weights = {}
            for count in args.processes:
                run = train(count, args.data, folder, f"{optimizer}{count}", [*SAME, *settings])
                weights[count] = load_checkpoint(run / "checkpoints" / "last.pt")["model"]
                num_val = len((run / "val_predictions.csv").read_text().splitlines()) - 1
                difference = largest_difference(weights[args.processes[0]], weights[count])
                print(f"| {optimizer} | {count} | {num_val} | {difference:.1e} |", flush=True)

        rates: dict[int, list[float]] = {count: [] for count in args.processes}
        for repeat in range(args.repeats):
            for count in args.processes:
                name = f"fast{count}-{repeat}"
                run = train(count, args.data, folder, name, [*FAST, "--epochs", str(args.epochs)])
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                rates[count].append(statistics.median(row["images_per_second"] for row in rows[1:]))
        print("\n| processes | images/s, median | lowest | highest | n |\n|---|---|---|---|---|")
        for count, values in rates.items():
            middle, low, high = statistics.median(values), min(values), max(values)
            print(f"| {count} | {middle:.0f} | {low:.0f} | {high:.0f} | {len(values)} |")


if __name__ == "__main__":
    main()
