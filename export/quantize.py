"""Make a smaller, faster model file from a run's published model.onnx, if its answers stay good enough.

    python export/quantize.py --run runs/NAME --to int8     for processors: VNNI, AMX, ARM
    python export/quantize.py --run runs/NAME --to fp16     for GPUs

Writes runs/NAME/export/model.int8.onnx (model.fp16.onnx) and an entry in verification.json. The whole
validation set goes through the new file; when it loses more than --max-accuracy-drop points of accuracy
against float32, the exit code is 1 and there is no such file.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not export/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch", "onnx")

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.calibration_set import training_pixels
from export.convert import save
from export.gate import MAX_ACCURACY_DROP, limits_for
from export.publish import track
from export.quantization import Quantizer, onnx_probabilities, optimise, to_fp16
from export.record import (
    MODEL_FILES,
    add_report,
    check_models_replaceable,
    publish_verified,
    verified_model,
)
from export.report import describe_rates
from export.run_copy import open_run_folder
from export.search import choose_float_layers
from export.speed import time_pairing
from export.validation_images import ValidationImages
from export.verify import verify
from serve.contract.files import check_folder_writable
from serve.outcome import report_error
from serve.verification import DEFAULT_PAIRING
from train.checkpoint import load_checkpoint
from train.models.build import rebuild

# Mean |difference| of the likeliest class's probability on training images. A ResNet-18 of 20 layers has
# 0.004 with all of them in int8.
TARGET_ERROR = 0.01
SEARCH_IMAGES = 64


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("export/quantize.py", __doc__, "--run RUN --to int8 [options]")
    add = parser.add_argument
    add("--run", required=True, help="run directory with a published model.onnx, or its URL")
    add("--to", choices=[p for p in MODEL_FILES if p != "fp32"], required=True, help="which file to make")
    add("--calibration-images", type=Number(int, 1), default=256, help="int8: training images")
    add("--training-images", type=Path, help="int8: where they are (default: where training read them)")
    add("--overwrite", action="store_true", help="replace a model file of other origin")
    add(
        "--images",
        default="",
        help="folder of the validation images, or URL of the data set (default: where training read them)",
    )
    add(
        "--max-accuracy-drop",
        type=Number(float, 0, 100),
        default=MAX_ACCURACY_DROP,
        help="points of validation accuracy that may be lost",
    )
    add(
        "--target-error",
        type=Number(float),
        default=TARGET_ERROR,
        help="int8: mean change of the likeliest class's probability on training images; above it, a "
        "search finds layers to keep in float32",
    )
    add(
        "--search-seconds",
        type=Number(float),
        default=180.0,
        help="int8: about how long that search may take",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 published, 1 too much accuracy lost, 2 unusable arguments or files, 3 an
    error that may pass."""
    args = build_parser().parse_args(argv)
    try:
        with open_run_folder(args.run) as args.run:
            return run(args)
    except (UserError, OSError) as error:
        return report_error(error)


def run(args: argparse.Namespace) -> int:
    source, metadata, path = verified_model(args.run, "fp32")
    folder = source.parent
    check_models_replaceable(folder, [MODEL_FILES[args.to]], args.overwrite)
    published, unverified = folder / MODEL_FILES[args.to], folder / f"unverified.{args.to}.onnx"
    checkpoint = load_checkpoint(path)
    images = ValidationImages.of_run(args.run, checkpoint, args.images)
    check_folder_writable(folder, "--run")
    if args.to == "int8":
        model, notes = _to_int8(args, source, checkpoint, images)
    else:
        model, notes = to_fp16(optimise(source)), {}
    try:
        save(model, replace(metadata, precision=args.to, verified=()), unverified)
        limits = limits_for(args.to, "fp32", args.max_accuracy_drop)
        report = verify(rebuild(checkpoint), checkpoint, unverified, images, "cpu", "fp32", limits)
        report.checkpoint_sha256, report.conversion = metadata.checkpoint_sha256, notes
        if not publish_verified(unverified, published, report):
            if args.to == "int8":
                print("a lower --target-error keeps more layers in float32", file=sys.stderr)
            return 1
    finally:
        unverified.unlink(missing_ok=True)
    report.images_per_second = time_pairing(published, DEFAULT_PAIRING, source)
    add_report(folder, report)
    print(f"on this machine: {describe_rates(report.images_per_second)}")
    sizes = [f"{file.stat().st_size / 1e6:.1f} MB" for file in (published, source)]
    print(f"verified: {published}, {sizes[0]} instead of {sizes[1]}")
    track(metadata, args.run)
    return 0


def _to_int8(
    args: argparse.Namespace, source: Path, checkpoint: dict[str, Any], images: ValidationImages
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return the int8 graph, and how it was made, for verification.json."""
    pixels = training_pixels(checkpoint, images, args.calibration_images, args.training_images)
    quantizer = Quantizer(optimise(source), pixels)
    probe = pixels[:SEARCH_IMAGES]
    expected = onnx_probabilities(quantizer.model, probe)

    def error(float_layers: Sequence[str]) -> float:
        return mean_error(expected, onnx_probabilities(quantizer.quantize(float_layers), probe))

    search = choose_float_layers(quantizer.layers(), error, args.target_error, args.search_seconds)
    print(
        f"calibrated on {len(pixels)} training images; with all {search.layers} layers in int8, the "
        f"likeliest class's probability changes by {search.error_of_all_int8:.4f} on average"
    )
    if search.tried.keys() != {0}:
        names = ", ".join(search.float_layers) or "none"
        print(f"kept in float32: {len(search.float_layers)} ({names}): {search.error:.4f}")
    notes = {
        "calibration_images": len(pixels),
        "pixels_stay_bytes": quantizer.fused,
        "search": asdict(search),
    }
    return quantizer.quantize(search.float_layers), notes


def mean_error(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return the mean |difference| of the likeliest class's probability; each is [N, num_classes]."""
    rows, best = np.arange(len(expected)), expected.argmax(axis=1)
    return float(np.abs(expected[rows, best] - got[rows, best]).mean())


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
