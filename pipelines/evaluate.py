"""Evaluate an exported model on a labelled data set, through the code that serves it.

    python pipelines/evaluate.py --model runs/NAME/export/model.onnx --data LABELLED
    python pipelines/evaluate.py --model model.onnx --data LABELLED --min-accuracy 0.95

LABELLED is in any layout that training reads. Writes to --output: evaluation.json (accuracy, log loss, ROC
AUC, F1 and calibration error, with intervals of 95 %), per_class.csv, predictions.csv (with the columns of
a run's val_predictions.csv) and bad_files.csv. MLflow gets the same, below the run that trained the model.

Exit code: 0 evaluated; 1 a bug, with a traceback; 2 unusable arguments, model or data; 3 the system failed,
and the same call may succeed; 4 evaluated, and the accuracy is below --min-accuracy.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not pipelines/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch", "sklearn", "scipy")

import argparse
import time
from collections.abc import Sequence

from pipelines.evaluation_report import (
    FILES,
    Summary,
    evaluation_lines,
    evaluation_page,
    write_evaluation,
)
from pipelines.labelled_scores import Scored, read_labelled, score_labelled
from serve.contract.command_line import CommandLine, Number
from serve.contract.files import file_sha256
from serve.contract.images import MAX_MEGAPIXELS, MOST_MEGAPIXELS
from serve.contract.urls import is_remote, redact
from serve.local_copy import OpenedModel, resolve_model
from serve.outcome import report_error
from serve.predictor import Predictor
from serve.processors import available_processors
from serve.progress import resampling_warning
from serve.providers.registry import ALL_PRECISIONS, PROVIDERS
from serve.tracking import run_of_model
from train.config import TrainConfig
from train.data.layouts.registry import LAYOUTS
from train.evaluation.tables import check_reports_replaceable

BELOW = 4  # exit code


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("pipelines/evaluate.py", __doc__, "--model MODEL --data LABELLED [options]")
    add = parser.add_argument
    add("--model", required=True, help="as --model of serve/main.py: a file, a run, a URL")
    add("--data", required=True, help="labelled images, as --data of train/main.py")
    add("--output", type=Path, default=Path("evaluation"), help="folder of the results")
    add("--min-accuracy", type=Number(float, 0, 1), default=0.0, help=f"exit code {BELOW} if it is less")
    add("--track", action=argparse.BooleanOptionalAction, default=True, help="log to MLflow")
    add("--overwrite", action="store_true", help="replace files in --output that are not of this command")
    add = parser.add_argument_group("data").add_argument
    add("--data-format", choices=("auto", *LAYOUTS), default="auto", help="how --data names its labels")
    add(
        "--columns",
        default="",
        metavar="IMAGE,LABEL",
        help="of a label file, as --columns of train/main.py",
    )
    add("--ignore-unknown", action="store_true", help="leave out images of classes that the model lacks")
    add(
        "--max-bad",
        type=Number(float, 0, 1),
        default=TrainConfig.max_bad,
        help="share of unreadable images above which it is an error",
    )
    add(
        "--max-megapixels",
        type=Number(float, 1, MOST_MEGAPIXELS),
        default=MAX_MEGAPIXELS,
        metavar="N",
        help="millions of pixels above which an image is unreadable, as in training",
    )
    add = parser.add_argument_group("hardware").add_argument
    add("--provider", choices=("auto", *PROVIDERS), default="auto", help="of onnxruntime")
    add("--precision", choices=ALL_PRECISIONS, default="fp32", help="arithmetic of the provider")
    add("--allow-unverified", action="store_true", help="use a provider that the model was not verified on")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (UserError, OSError) as error:
        return report_error(error)


def run(args: argparse.Namespace) -> int:
    check_reports_replaceable({args.output / name: start for name, start in FILES.items()}, args.overwrite)
    started = time.time()
    with resolve_model(args.model) as model:
        predictor = Predictor(
            model.path,
            args.provider,
            precision=args.precision,
            allow_unverified=args.allow_unverified,
            workers=available_processors(),
        )
        if warning := resampling_warning(predictor.metadata):
            print(warning, file=sys.stderr)
        data = read_labelled(
            args.data, args.data_format, args.columns, predictor.metadata.class_names, args.ignore_unknown
        )
        scored = score_labelled(predictor, data, args.max_bad, args.max_megapixels)
        summary = Summary.of(args, predictor, file_sha256(predictor.path), scored)
    page = evaluation_page(summary, scored)
    write_evaluation(args.output, summary, scored, page)
    for line in evaluation_lines(page, args.output):
        print(line, flush=True)
    if args.track:
        track_evaluation(args, model, predictor, summary, scored, started)
    if summary.accuracy >= args.min_accuracy:
        return 0
    print(f"accuracy {summary.accuracy:.4f} is below --min-accuracy {args.min_accuracy}", file=sys.stderr)
    return BELOW


def track_evaluation(
    args: argparse.Namespace,
    model: OpenedModel,
    predictor: Predictor,
    summary: Summary,
    scored: Scored,
    started: float,
) -> None:
    """Log the evaluation to MLflow. It is written by now: what fails costs a warning."""
    from train.tracking.client import TrackingStore  # a second that --no-track saves
    from train.tracking.evaluation_run import log_evaluation

    recorded, metadata = run_of_model(model.location), predictor.metadata
    source = redact(args.data) if is_remote(args.data) else str(Path(args.data).resolve())
    try:
        evaluation_id = log_evaluation(
            TrackingStore(recorded.uri, recorded.run_id, retries=3, seconds=120),
            model_sha256=summary.model_sha256,
            checkpoint_sha256=metadata.checkpoint_sha256,
            run_name=metadata.run_name or predictor.path.stem,
            run_id=recorded.run_id or model.run_id or metadata.run_id,
            dataset=(source, scored.digest),
            started=started,
            metrics=summary.flat_metrics(),
            parameters=summary.parameters(),
            files=[args.output / name for name in FILES],
        )
        print(f"in MLflow: evaluation run {evaluation_id}")
    except (UserError, OSError) as error:
        print(f"warning: the evaluation is not whole in MLflow: {redact(error)}", file=sys.stderr)


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
