"""Export a run's best checkpoint to one ONNX file, verified through the code that serves it.

    python export/main.py --run runs/NAME

Writes runs/NAME/export/model.onnx and verification.json. When verification fails, the exit code is 1 and
there is no model.onnx.

    python export/main.py --run runs/NAME --verify-provider openvino:bf16

verifies the model.onnx that is there on another provider of this machine, which serve/main.py may use from
then on.
"""

import gc
import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not export/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]
    gc.disable()  # until all is imported: a fifth of that time would go into looking for garbage

if __name__ == "__main__":  # before the imports that take seconds
    from serve.interrupts import end_on_signal

    end_on_signal(importing=True)

import argparse
import math
from collections.abc import Sequence
from typing import Any

from export.convert import convert, describe
from export.record import (
    MODEL_FILES,
    RECORD,
    lost_by_exporting,
    published_model,
    restamp,
    stamp,
    write_report,
)
from export.staged import open_run
from export.verify import ValidationImages, Verification, limits_for, verify
from serve.accelerators import PRECISIONS
from serve.metadata import ModelMetadata
from serve.predictor import Predictor
from train.checkpoint import file_sha256, load_checkpoint
from train.model import best_checkpoint, rebuild

MAX_ACCURACY_DROP = 0.3


# such a call fails again
STAYS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def not_negative(text: str) -> float:
    """For argparse: a finite number from 0 on. NaN would pass every gate."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", required=True, help="run directory written by train/main.py; also s3://, gs://")
    add("--limit", type=int, default=0, help="verify on this many validation images; 0: on all")
    add("--embeddings", action="store_true", help="third output: what the network's last layer sees")
    add("--images", type=Path, help="folder of the validation images; default: where training read them")
    add("--verify-provider", metavar="PROVIDER:PRECISION", help="verify the exported model there, too")
    add(
        "--model-precision", choices=MODEL_FILES, default="fp32", help="of that model; default: %(default)s"
    )
    add(
        "--max-accuracy-drop",
        type=not_negative,
        default=MAX_ACCURACY_DROP,
        help="points of accuracy that arithmetic below float32 may lose; default: %(default)s",
    )
    add("--register", default="", help="MLflow registered model that gets the new version as challenger")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 verified, 1 verification failed, 2 unusable arguments or files, 3 an error
    that may pass, as of a disk or an object store."""
    args = build_parser().parse_args(argv)
    try:
        with open_run(args.run) as args.run:
            return verify_provider(args) if args.verify_provider else run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


def exit_code(error: Exception) -> int:
    return 3 if isinstance(error, OSError) and not isinstance(error, STAYS) else 2


def run(args: argparse.Namespace) -> int:
    path = best_checkpoint(args.run)
    folder = args.run / "export"
    published, unverified = folder / MODEL_FILES["fp32"], folder / "unverified.onnx"
    checkpoint = load_checkpoint(path)
    model = rebuild(checkpoint)
    metadata = describe(checkpoint, file_sha256(path))
    images = validation_images(args.run, checkpoint, args.images, args.limit)
    try:
        convert(model, metadata, unverified, args.embeddings)
        report = verify(model, checkpoint, unverified, images)
        report.checkpoint_sha256 = metadata.checkpoint_sha256
        if report.passed:
            stamp(unverified, report)
        if lost := lost_by_exporting(folder):
            print(f"the earlier export's {', '.join(lost)} are gone: make them again where they are needed")
        for name in MODEL_FILES.values():  # from here on, a model.onnx is one that this call verified
            (folder / name).unlink(missing_ok=True)
        write_report(folder, report)
        print_report(report)
        if not report.passed:
            print(f"error: not published; see {folder / RECORD}", file=sys.stderr)
            return 1
        unverified.replace(published)
    finally:
        unverified.unlink(missing_ok=True)
    print(f"verified: {published}")
    track(metadata, published, report, args.register)
    return 0


def verify_provider(args: argparse.Namespace) -> int:
    """Add a provider and precision to those that a published model may be served with, or strike it out."""
    provider, _, precision = args.verify_provider.partition(":")
    known = [f"{name}:{p}" for name, precisions in PRECISIONS.items() for p in precisions]
    if args.verify_provider not in known:
        raise ValueError(f"--verify-provider {args.verify_provider!r} is none of {', '.join(known)}")
    published, metadata, path = published_model(args.run, args.model_precision)
    Predictor(published, provider, precision=precision, allow_unverified=True)  # not to be had: an error
    checkpoint = load_checkpoint(path)
    images = validation_images(args.run, checkpoint, args.images, args.limit)
    limits = limits_for(metadata.precision, precision, args.max_accuracy_drop)
    report = verify(rebuild(checkpoint), checkpoint, published, images, provider, precision, limits)
    report.file, report.checkpoint_sha256 = published.name, metadata.checkpoint_sha256
    restamp(published, report)
    print_report(report)
    if not report.passed:
        print(f"error: {published} is not to be served on {args.verify_provider}", file=sys.stderr)
        return 1
    print(f"verified: {published} on {args.verify_provider}")
    if args.register:
        track(metadata, published, report, args.register)
    return 0


def validation_images(
    run: Path, checkpoint: dict[str, Any], root: Path | None, limit: int = 0
) -> ValidationImages:
    return ValidationImages.read(run / "val_predictions.csv", root or Path(checkpoint["val_root"]), limit)


def print_report(report: Verification) -> None:
    print(
        f"{report.num_images} validation images and {report.num_noise_images} of noise, PyTorch against "
        f"the served model ({report.provider}:{report.precision}, {report.nodes}): "
        f"max |difference| of logits {report.max_difference_logits:.2e}, "
        f"of probabilities {report.max_difference_probabilities:.2e}, "
        f"argmax agreement {report.argmax_agreement:.2%}, "
        f"accuracy {report.accuracy_pytorch:.4f} and {report.accuracy_served:.4f}, "
        f"log loss {report.log_loss_pytorch:.4f} and {report.log_loss_served:.4f}"
    )
    for failure in report.failures:
        print(f"FAILED: {failure}", file=sys.stderr)


def track(metadata: ModelMetadata, model: Path, report: Verification, register: str) -> None:
    """Log the model to the MLflow run that trained it. Without a run this does nothing."""
    if not metadata.run_id:
        if register:
            raise ValueError("--register: this run was not tracked in MLflow (--track false)")
        return
    from train.tracking import log_verified_model  # half a second that --track false saves

    try:
        uri = log_verified_model(
            metadata.run_id,
            model,
            model.with_name(RECORD),
            metadata.preprocess.size,
            len(metadata.class_names),
            {
                "served/accuracy": report.accuracy_served,
                "served/log_loss": report.log_loss_served,
                "served/argmax_agreement": report.argmax_agreement,
                "served/max_difference_probabilities": report.max_difference_probabilities,
            },
            register,
            metadata.checkpoint_sha256,
        )
    except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
        if register:
            raise ValueError(f"--register {register}: {error}") from error
        print(f"warning: the model is not in MLflow: {error}", file=sys.stderr)
    else:
        print(f"in MLflow: {uri}" + (f", registered as {register}@challenger" if register else ""))


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: it is not looked through again
    gc.enable()
    end_on_signal()
    sys.exit(main())
