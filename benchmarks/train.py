"""Epochs of training, data included: purebred against the loops that people write, in turn.

    python benchmarks/train.py --data photographs/ --models resnet18 simple_cnn mobilenet_v3_small

The same network, image size, batch size and files; every loop in a process of its own, started as its users
start it (benchmarks/training_loops.py says how). purebred is its own command; the epoch after the first is
counted. Ratios are of the same turn, so that other work on the machine falls on all of them alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.engine.autotune import cpu_has_bf16  # noqa: E402

BASELINE = "tutorial"
OTHERS = ("tutorial", "references", "timm_like", *(["timm_like_bf16"] if cpu_has_bf16() else []))
PUREBRED = {
    "purebred": (1, ()),
    "purebred, no cache": (1, ("--pixel-cache", "off")),
    "purebred, 2 processes": (2, ()),
    "purebred, fp32": (1, ("--precision", "fp32")),
}


def common(args: argparse.Namespace, model: str) -> list[str]:
    return ["--model", model, "--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]


def run_other(loop: str, data: Path, args: argparse.Namespace, model: str) -> tuple[float, float]:
    """(images/s, share of waiting for data, here unknown)"""
    command = [sys.executable, str(ROOT / "benchmarks" / "training_loops.py"), loop]
    command += [*common(args, model), "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{loop}: {done.stderr}")
    values = json.loads(done.stdout.splitlines()[-1])
    return values["images"] / values["seconds"], float("nan")


def run_purebred(
    processes: int, flags: Sequence[str], data: Path, folder: Path, args: argparse.Namespace, model: str
) -> tuple[float, float]:
    """(images/s, share of waiting for data) of the second epoch."""
    name = f"run{len(list(folder.iterdir()))}"
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train" / "main.py"), *common(args, model), "--data", str(data), *flags]
    command += ["--output", str(folder), "--name", name, "--epochs", "2", "--track", "false"]
    command += ["--optimizer", "adamw"]  # the tutorial's, and the nearest to the others' work
    command += ["--val-fraction", "0.02", "--near-duplicates", "false"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return rows[1]["images_per_second"], rows[1]["data_share"]


def middle(values: Sequence[float]) -> str:
    """Median [lowest, highest]"""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(name: str, speeds: dict[str, list[tuple[float, float]]]) -> str:
    best_other = [max(turn) for turn in zip(*([s for s, _ in speeds[o]] for o in OTHERS[1:]), strict=True)]
    header = "| loop | images/s | times tutorial | times the best of references and timm | data share |"
    lines = [f"### {name}", "", header, "|---|---|---|---|---|"]
    for loop, turns in speeds.items():
        values = [speed for speed, _ in turns]
        first = middle([v / base for v, (base, _) in zip(values, speeds[BASELINE], strict=True)])
        second = middle([v / base for v, base in zip(values, best_other, strict=True)])
        share = statistics.median(share for _, share in turns)
        shown = "" if share != share else f"{share:.1%}"
        lines.append(f"| {loop} | {statistics.median(values):.0f} | {first} | {second} | {shown} |")
    return "\n".join(lines) + f"\n\nn = {len(speeds[BASELINE])}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="flat folder of label.number.jpg")
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=2000, help="images")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()

    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            data, runs = Path(folder) / "data", Path(folder) / "runs"
            data.mkdir()
            runs.mkdir()
            files = sorted(args.data.iterdir())
            for path in files[:: max(1, len(files) // args.limit)][: args.limit]:
                os.symlink(path.resolve(), data / path.name)
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*OTHERS, *PUREBRED)}
            for _ in range(args.turns):
                for loop in OTHERS:
                    speeds[loop].append(run_other(loop, data, args, model))
                for loop, (processes, flags) in PUREBRED.items():
                    speeds[loop].append(run_purebred(processes, flags, data, runs, args, model))
            print(table(model, speeds), flush=True)


if __name__ == "__main__":
    main()
