"""Batch scoring of photographs: purebred against the loops that people write, in turn, on this machine.

    python benchmarks/serve.py --images photographs/ --models resnet18 mobilenet_v3_large

Networks have random weights: the speed of trained ones, answers that mean nothing. Every loop runs in a
process of its own (benchmarks/scoring_loops.py says what each does), one after the other, turn after turn.
Ratios are of the same turn, so that other work on the machine falls on all of them alike.

The limit is (processor seconds of decoding + processor seconds of the model) / processors, each measured
alone in the same turn by as many threads as there are processors: no pipeline of these parts is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import peak_bytes  # noqa: E402
from benchmarks.scoring_loops import LOOPS, RESIZE, SIZE  # noqa: E402
from export.convert import convert, save  # noqa: E402
from export.quantization import Quantizer, optimise  # noqa: E402
from serve.contract.images import load_image, read_image_file  # noqa: E402
from serve.contract.metadata import ModelMetadata  # noqa: E402
from serve.contract.preprocess import Preprocess  # noqa: E402
from train.models.build import build_model  # noqa: E402

BASELINE = "plain"
CALIBRATION_IMAGES = 32
SECONDS_BETWEEN_READINGS = 0.1


@dataclass
class Pass:
    images: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def prepare(name: str, photographs: Sequence[Path], folder: Path) -> Path:
    """Write FOLDER/name.pt, name.fp32.onnx and name.int8.onnx; returns FOLDER/name."""
    torch.manual_seed(0)
    preprocess = Preprocess("crop", SIZE, RESIZE)
    images = [
        preprocess(load_image(read_image_file(path), preprocess.decode))
        for path in photographs[:CALIBRATION_IMAGES]
    ]
    pixels = torch.stack([torch.from_numpy(image.copy()) for image in images])
    model, _ = build_model(name, 2, SIZE)
    with torch.no_grad():  # statistics of batch norm, so that no activation explodes
        for _ in range(3):
            model(pixels)
    base = folder / name
    torch.save(model.eval().network, base.with_suffix(".pt"))
    metadata = ModelMetadata(("a", "b"), preprocess, model=name)
    convert(model, metadata, base.with_suffix(".fp32.onnx"))
    quantizer = Quantizer(optimise(base.with_suffix(".fp32.onnx")), pixels.numpy())
    save(quantizer.quantize(), metadata, base.with_suffix(".int8.onnx"))
    return base


def run(loop: str, model: Path, images: Path, limit: int) -> Pass:
    command = [sys.executable, str(ROOT / "benchmarks" / "scoring_loops.py"), loop]
    command += ["--model", str(model), "--images", str(images), "--limit", str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        peak = peak_bytes(child, SECONDS_BETWEEN_READINGS)
        assert child.stdout is not None
        output = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{loop} failed with exit code {child.returncode}")
    return Pass(**json.loads(output), peak_bytes=peak)


BARE = """
import sys
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
side = session.get_inputs()[0].shape[1]
session.run(None, {"images": np.zeros((1, side, side, 3), np.uint8)})
"""


def seconds_to_first_row(model: Path, image: Path, times: int) -> dict[str, list[float]]:
    """Of `python serve/main.py` with one image, start to exit, and of a process that does no more than to
    import onnxruntime, open the model and ask it once; in turn. Ours is compiled, as if it were installed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        score = [str(ROOT / "serve" / "main.py"), "--allow-unverified", "--provider", "cpu"]
        score += ["--model", str(model), "--images", str(image), "--output", f"{folder}/predictions.csv"]
        commands = {"serve/main.py": score, "onnxruntime alone": ["-c", BARE, str(model)]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(times + 1):
            for name, arguments in commands.items():
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL
                )
                if turn:  # the first compiles
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def middle(values: Sequence[float], digits: int = 2) -> str:
    """Median [lowest, highest]"""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(name: str, passes: dict[str, list[Pass]]) -> str:
    lines = [
        f"### {name}",
        "",
        "| loop | images/s | times plain | CPU ms an image | peak MiB | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    cores = len(os.sched_getaffinity(0))
    parts = {"purebred": "model_fp32", "purebred_int8": "model_int8"}
    for loop, runs in passes.items():
        ratios = [base.seconds / run.seconds for base, run in zip(passes[BASELINE], runs, strict=True)]
        speed = statistics.median(run.images / run.seconds for run in runs)
        cpu = statistics.median(1000 * run.cpu_seconds / run.images for run in runs)
        peak = max(run.peak_bytes for run in runs) / 2**20
        share = ""
        if loop in parts:
            limits = [
                (decode.cpu_seconds + model.cpu_seconds) / cores
                for decode, model in zip(passes["decode"], passes[parts[loop]], strict=True)
            ]
            share = middle([best / run.seconds for best, run in zip(limits, runs, strict=True)])
        lines.append(f"| {loop} | {speed:.0f} | {middle(ratios)} | {cpu:.1f} | {peak:.0f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of .jpg files")
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=[], help="default: all that run here")
    parser.add_argument("--limit", type=int, default=500, help="images in a pass")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()

    photographs = sorted(path for path in args.images.iterdir() if path.suffix == ".jpg")[: args.limit]
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model = prepare(name, photographs, Path(folder))
            passes: dict[str, list[Pass]] = {loop: [] for loop in args.loops or LOOPS}
            for turn in range(args.turns):
                for loop in list(passes):
                    try:
                        passes[loop].append(run(loop, model, args.images, args.limit))
                    except RuntimeError as error:
                        if turn or not loop.startswith("openvino"):  # a plug-in that not everyone has
                            raise
                        print(error, file=sys.stderr)
                        del passes[loop]
            print(table(name, passes))
            start = seconds_to_first_row(
                model.with_suffix(".fp32.onnx"), photographs[0], 2 * args.turns + 1
            )
            print("\nstart to exit with one image, n =", 2 * args.turns + 1)
            for program, seconds in start.items():
                print(f"{program}: {middle(seconds)} s", flush=True)
            print()


if __name__ == "__main__":
    main()
