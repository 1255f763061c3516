"""How fast is inference on each provider of this machine, in float32, bf16 and int8?

    python benchmarks/providers.py --models resnet18 mobilenet_v3_large tf_efficientnet_lite0

Networks have random weights, whose speed is that of trained ones and whose answers mean nothing. What is
compared takes turns (A B C A B C ...), and each time is divided into that of cpu:fp32 in the same turn, so
that other work on the machine falls on all of them. Median and range of that ratio: above 1 is faster.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from export.convert import convert, save  # noqa: E402
from export.quantization import Quantizer, optimise  # noqa: E402
from serve.contract.metadata import ModelMetadata  # noqa: E402
from serve.contract.preprocess import Preprocess  # noqa: E402
from serve.predictor import Predictor  # noqa: E402
from serve.providers.registry import PRECISIONS  # noqa: E402
from train.models.build import build_model  # noqa: E402

CLASS_NAMES = ("a", "b")
CALIBRATION_IMAGES = 16


def pictures(count: int, size: int) -> NDArray[np.uint8]:
    """Patches of colour with noise: uint8 [N, size, size, 3]."""
    rng = np.random.default_rng(0)
    patches = rng.uniform(0, 255, (count, 8, 8, 3)).repeat(-(-size // 8), 1).repeat(-(-size // 8), 2)
    noisy = patches[:, :size, :size] + rng.normal(0, 10, (count, size, size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def export(name: str, size: int, folder: Path) -> dict[str, Path]:
    """{"fp32": file, "int8": file}"""
    torch.manual_seed(0)
    model, _ = build_model(name, len(CLASS_NAMES), size)
    model.train()
    with torch.no_grad():  # batch norm: statistics of something, so that no activation explodes
        for _ in range(3):
            model(torch.from_numpy(pictures(8, size)))
    metadata = ModelMetadata(CLASS_NAMES, Preprocess("squash", size), model=name)
    files = {precision: folder / f"{name}.{precision}.onnx" for precision in ("fp32", "int8")}
    convert(model.eval(), metadata, files["fp32"])
    quantizer = Quantizer(optimise(files["fp32"]), pictures(CALIBRATION_IMAGES, size))
    save(quantizer.quantize(), metadata, files["int8"])
    return files


def open_all(files: dict[str, Path], threads: int) -> dict[str, Predictor]:
    """Whatever this machine has, as in "int8 on openvino:bf16"; what it lacks is printed."""
    predictors = {}
    for provider, precisions in PRECISIONS.items():
        for precision in precisions:
            for weights, file in files.items():
                try:
                    predictors[f"{weights} on {provider}:{precision}"] = Predictor(
                        file, provider, threads, precision, allow_unverified=True
                    )
                except ValueError as error:
                    print(f"  {provider}:{precision}: {error}", file=sys.stderr)
                    break
    return predictors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="0: one a processor")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()

    pixels = pictures(args.batch_size, args.image_size)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            predictors = open_all(export(name, args.image_size, Path(folder)), args.threads)
        seconds: dict[str, list[float]] = {what: [] for what in predictors}
        for turn in range(args.turns + 1):  # the first turn is not counted
            for what, predictor in predictors.items():
                started = time.perf_counter()
                predictor.predict(pixels)
                if turn:
                    seconds[what].append(time.perf_counter() - started)
        for what, times in seconds.items():
            ratios = [base / t for base, t in zip(seconds["fp32 on cpu:fp32"], times, strict=True)]
            print(
                f"{name:24} {what:26} {statistics.median(ratios):5.2f} times cpu:fp32 "
                f"[{min(ratios):.2f} to {max(ratios):.2f}], n = {len(times)}; "
                f"at best {args.batch_size / min(times):.0f} images/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
