"""Export a run's best checkpoint to one ONNX file, verified through the code that serves it.

    python export/main.py --run runs/NAME

Writes runs/NAME/export/model.onnx and verification.json. When verification fails, the exit code is 1 and
there is no model.onnx.

    python export/main.py --run runs/NAME --verify-provider openvino:bf16

verifies the published model.onnx on another provider of this machine, which serve/main.py may use from
then on, and times it. The model file stays as it is: verification.json beside it has the result.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not export/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch")

import argparse
import shlex
from collections.abc import Sequence

from export.convert import convert, describe, has_embeddings
from export.gate import MAX_ACCURACY_DROP, limits_for
from export.publish import check_register, track, training_run
from export.record import (
    MODEL_FILES,
    add_report,
    check_models_replaceable,
    publish_verified,
    published_model,
    verified_model,
)
from export.run_copy import open_run_folder
from export.speed import time_pairing
from export.validation_images import ValidationImages
from export.verify import verify
from serve.contract.command_line import CommandLine, Number, command
from serve.contract.files import check_folder_writable, file_sha256
from serve.outcome import report_error
from serve.predictor import Predictor
from serve.providers.registry import PRECISIONS
from train.checkpoint import best_checkpoint, load_checkpoint, load_with_digest
from train.models.build import rebuild


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("export/main.py", __doc__, "--run RUN [options]")
    add = parser.add_argument
    add("--run", required=True, help="run directory written by train/main.py, or its URL")
    add("--embeddings", action="store_true", help="third output: what the network's last layer sees")
    add(
        "--images",
        default="",
        help="folder of the validation images, or URL of the data set (default: where training read them)",
    )
    add("--limit", type=Number(int), default=0, help="verify on this many validation images; 0: on all")
    add("--overwrite", action="store_true", help="replace model files of other origin")
    add = parser.add_argument_group("another provider").add_argument
    add("--verify-provider", metavar="PROVIDER:PRECISION", help="verify the exported model on it")
    add(
        "--model-precision",
        choices=MODEL_FILES,
        default="fp32",
        help="the file to verify (--verify-provider) or to register (--register)",
    )
    add(
        "--max-accuracy-drop",
        type=Number(float, 0, 100),
        default=MAX_ACCURACY_DROP,
        help="points of accuracy that arithmetic below float32 may lose",
    )
    add = parser.add_argument_group("MLflow").add_argument
    add(
        "--register",
        default="",
        metavar="MODEL",
        help="register the file under this name, as challenger; a verified file of the best checkpoint is "
        "not exported again",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 verified, 1 verification failed, 2 unusable arguments or files, 3 an error
    that may pass, as of a disk or an object store."""
    args = build_parser().parse_args(argv)
    args.location = args.run  # of which args.run becomes a local copy, where it is a URL
    try:
        with open_run_folder(args.run) as args.run:
            return verify_provider(args) if args.verify_provider else run(args)
    except (UserError, OSError) as error:
        return report_error(error)


def run(args: argparse.Namespace) -> int:
    path = best_checkpoint(args.run)
    folder = args.run / "export"
    check_models_replaceable(folder, MODEL_FILES.values(), args.overwrite)
    published, unverified = folder / MODEL_FILES["fp32"], folder / "unverified.onnx"
    checkpoint, sha256 = load_with_digest(path)
    checkpoint["run_id"] = training_run(args.run, checkpoint["run_id"], sha256)
    metadata = describe(checkpoint, sha256)
    check_before_export(args, metadata.run_id)
    if args.register and has_verified_model(args, metadata.checkpoint_sha256):
        track(metadata, args.run, args.register, args.model_precision)
        return 0
    model = rebuild(checkpoint)
    images = ValidationImages.of_run(args.run, checkpoint, args.images, args.limit)
    try:
        convert(model, metadata, unverified, args.embeddings)
        report = verify(model, checkpoint, unverified, images)
        report.checkpoint_sha256 = metadata.checkpoint_sha256
        if not publish_verified(unverified, published, report):
            return 1
    finally:
        unverified.unlink(missing_ok=True)
    print(f"verified: {published}")
    track(metadata, args.run, args.register)
    where = shlex.quote(args.location)
    print(f"next: {command('serve/main.py')} --model {where} --images DIR --output predictions.csv")
    return 0


def check_before_export(args: argparse.Namespace, run_id: str) -> None:
    """Raise UserError where the export folder cannot be written, or nothing can be registered."""
    if args.model_precision != "fp32" and not (args.verify_provider or args.register):
        raise UserError(
            f"--model-precision {args.model_precision} has no effect without --verify-provider or "
            f"--register; {command('export/quantize.py')} --run {args.run} --to {args.model_precision} "
            "makes that file"
        )
    check_folder_writable(args.run / "export", "--run")
    if args.register:
        check_register(args.run, run_id, args.register)


def has_verified_model(args: argparse.Namespace, checkpoint_sha256: str) -> bool:
    """Return whether the model file that --register means exists, verified, of the best checkpoint.

    Raises:
        UserError: it is not, and this command does not make it: it is an int8 or fp16 file.
    """
    file = args.run / "export" / MODEL_FILES[args.model_precision]
    try:
        _, metadata, _ = verified_model(args.run, args.model_precision)
        if metadata.checkpoint_sha256 != checkpoint_sha256:
            raise UserError(f"{file} is of an earlier checkpoint than best.pt: make it again")
        if args.embeddings and not has_embeddings(file):
            raise UserError(f"{file} has no embeddings: make it again with --embeddings")
    except ValueError as error:
        if args.model_precision != "fp32":
            raise
        if file.exists():
            print(f"the run is exported again: {error}")
        return False
    print(f"{file} is verified and of the best checkpoint: it is registered as it is, not exported again")
    return True


def verify_provider(args: argparse.Namespace) -> int:
    """Record that a published model may be served on a provider at a precision, or that it may not."""
    provider, _, precision = args.verify_provider.partition(":")
    known = [f"{name}:{p}" for name, precisions in PRECISIONS.items() for p in precisions]
    if args.verify_provider not in known:
        raise UserError(f"--verify-provider {args.verify_provider!r} must be one of {', '.join(known)}")
    published, metadata, path = published_model(args.run, args.model_precision)
    check_before_export(args, training_run(args.run, metadata.run_id, metadata.checkpoint_sha256))
    # raises, before images are read, where the provider cannot be used
    Predictor(published, provider, precision=precision, allow_unverified=True)
    checkpoint = load_checkpoint(path)
    images = ValidationImages.of_run(args.run, checkpoint, args.images, args.limit)
    limits = limits_for(metadata.precision, precision, args.max_accuracy_drop)
    report = verify(rebuild(checkpoint), checkpoint, published, images, provider, precision, limits)
    report.file, report.checkpoint_sha256 = published.name, metadata.checkpoint_sha256
    report.model_sha256 = file_sha256(published)
    if report.passed:
        whole = published.with_name(MODEL_FILES["fp32"])
        report.images_per_second = time_pairing(published, args.verify_provider, whole)
    add_report(published.parent, report)
    report.print()
    if report.passed:
        print(f"verified: {published} on {args.verify_provider}")
    else:
        print(f"error: {published} is not to be served on {args.verify_provider}", file=sys.stderr)
    track(metadata, args.run, args.register if report.passed else "", args.model_precision)
    return 0 if report.passed else 1


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
