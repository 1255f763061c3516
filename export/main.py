"""Export a run's best checkpoint to one ONNX file, verified through the code that serves it.

    python export/main.py --run runs/NAME

Writes runs/NAME/export/model.onnx and verification.json. When verification fails, the exit code is 1 and
there is no model.onnx.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not export/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

import argparse
import json
from collections.abc import Sequence

from export.convert import convert, describe
from export.verify import ValidationImages, Verification, verify
from serve.metadata import ModelMetadata
from train.checkpoint import file_sha256, load_checkpoint
from train.model import rebuild


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run directory written by train/main.py")
    add("--checkpoint", choices=("best", "last"), default="best", help="default: %(default)s")
    add("--limit", type=int, default=0, help="verify on this many validation images; 0: on all")
    add("--embeddings", action="store_true", help="third output: what the network's last layer sees")
    add("--register", default="", help="MLflow registered model that gets the new version as challenger")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 verified, 1 verification failed, 2 unusable arguments or files."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    path = args.run / "checkpoints" / f"{args.checkpoint}.pt"
    folder = args.run / "export"
    published, unverified = folder / "model.onnx", folder / "unverified.onnx"
    checkpoint = load_checkpoint(path)
    published.unlink(missing_ok=True)  # from here on, a model.onnx is one that this call verified

    model = rebuild(checkpoint)
    metadata = describe(checkpoint, file_sha256(path))
    images = ValidationImages.read(
        args.run / "val_predictions.csv", Path(checkpoint["val_root"]), args.limit
    )
    try:
        convert(model, metadata, unverified, args.embeddings)
        report = verify(model, checkpoint, unverified, images)
        report.checkpoint_sha256 = metadata.checkpoint_sha256
        report.model_sha256 = file_sha256(unverified)
        verification = write_report(report, folder / "verification.json")
        print_report(report)
        if not report.passed:
            print(f"error: not published; see {verification}", file=sys.stderr)
            return 1
        unverified.replace(published)
    finally:
        unverified.unlink(missing_ok=True)
    print(f"verified: {published}")
    track(metadata, published, verification, args.register)
    return 0


def write_report(report: Verification, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def print_report(report: Verification) -> None:
    print(
        f"{report.num_images} validation images and {report.num_noise_images} of noise, PyTorch against "
        f"the served model: max |difference| of logits {report.max_difference_logits:.2e}, "
        f"of probabilities {report.max_difference_probabilities:.2e}, "
        f"argmax agreement {report.argmax_agreement:.2%}, "
        f"accuracy {report.accuracy_pytorch:.4f} and {report.accuracy_served:.4f}"
    )
    for failure in report.failures:
        print(f"FAILED: {failure}", file=sys.stderr)


def track(metadata: ModelMetadata, model: Path, verification: Path, register: str) -> None:
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
            verification,
            metadata.preprocess.size,
            len(metadata.class_names),
            register,
        )
    except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
        if register:
            raise ValueError(f"--register {register}: {error}") from error
        print(f"warning: the model is not in MLflow: {error}", file=sys.stderr)
    else:
        print(f"in MLflow: {uri}" + (f", registered as {register}@challenger" if register else ""))


if __name__ == "__main__":
    sys.exit(main())
