"""A scoring job as a run of MLflow: its parameters, metrics and tags."""

import argparse
import json
import socket
import time
from pathlib import Path

from serve.contract.errors import UserError, print_line
from serve.contract.mlflow_tags import CLASSES_TAG, DATA_TAG, HOST_TAG, KIND_TAG, MODEL_NAME_TAG
from serve.contract.urls import last_part, redact, url_path
from serve.job import Scoring
from serve.local_copy import OpenedModel
from serve.progress import Progress
from serve.shards import Shard
from serve.summary import TOP_KINDS, JobSummary, ranked
from serve.tracking import ScoringRun, log_scoring_run, run_of_model
from serve.tracking_server import TrackingServer

PARAMETER_CHARACTERS = 6000  # MLflow's limit
MAX_TAG_CHARACTERS = 4000  # MLflow's limit is 8000, and older stores' 5000


def metrics_of(summary: JobSummary) -> dict[str, float]:
    """Return the metrics for MLflow."""
    found = {
        "rows": float(summary.rows),
        "errors": float(summary.errors),
        "error_share": summary.error_share,
    }
    if estimate := summary.estimate:
        assert summary.threshold is not None
        found |= {
            "estimated_accuracy": estimate.accuracy,
            "estimated_accuracy_low": estimate.low,
            "estimated_accuracy_high": estimate.high,
            "validation_accuracy": summary.threshold.accuracy,
        }
    return found


def tags_of(summary: JobSummary) -> dict[str, str]:
    """Return the tags for MLflow: counts of names, which as metrics would fill its tables."""
    counts = {
        "purebred.errors_by_kind": list(ranked(summary.errors_by_kind).items())[:TOP_KINDS],
        "purebred.predicted": list(ranked(summary.predicted).items()),
    }
    tags = {name: _json_of_a_tag(found) for name, found in counts.items() if found}
    if differences := summary.differences():
        tags["purebred.differences"] = "; ".join(differences)[:MAX_TAG_CHARACTERS]
    return tags


def _json_of_a_tag(counts: list[tuple[str, int]]) -> str:
    """Return an object of as many counts, the first ones, as a tag holds."""
    text = json.dumps(dict(counts), ensure_ascii=False)
    return text if len(text) <= MAX_TAG_CHARACTERS else _json_of_a_tag(counts[: len(counts) * 9 // 10])


def describe_run(
    args: argparse.Namespace,
    model: OpenedModel,
    scoring: Scoring,
    progress: Progress,
    shard: Shard | None,
    output: str,
    started: float,
) -> ScoringRun:
    predictor, ended = scoring.predictor, time.time()
    metadata = predictor.metadata
    return ScoringRun(
        name=f"score {metadata.run_name or Path(url_path(model.location)).stem}"
        + (f" {shard.index}/{shard.count}" if shard else ""),
        training_run_id=run_of_model(model.location).run_id or model.run_id or metadata.run_id,
        checkpoint_sha256=metadata.checkpoint_sha256,
        parameters={
            "model": model.location,
            "model_name": args.model if args.model != model.location else "",
            "model_sha256": scoring.model_sha256,
            "model_precision": metadata.precision,
            "provider": predictor.provider,
            "precision": predictor.precision,
            "images": redact(args.images)[:PARAMETER_CHARACTERS],
            "output": output,
            "batch_size": str(scoring.batch_size),
        },
        metrics={
            **metrics_of(progress.summary),
            "resumed": progress.resumed,
            "seconds": ended - started,
            "images_per_second": (progress.done - progress.resumed) / (ended - started),
        },
        tags={
            KIND_TAG: "scoring",
            MODEL_NAME_TAG: metadata.model,
            CLASSES_TAG: str(len(metadata.class_names)),
            DATA_TAG: last_part(redact(args.images)),
            HOST_TAG: socket.gethostname(),
            **tags_of(progress.summary),
        },
        started=int(started * 1000),
        ended=int(ended * 1000),
        model_version=model.version,
    )


def log_run(server: TrackingServer, run: ScoringRun) -> None:
    """Log the scoring run. The scores are written by now: an error costs a warning, not the job."""
    try:
        print(f"in MLflow: scoring run {log_scoring_run(server, run)}")
    except (UserError, OSError) as error:
        print_line(f"warning: the scoring run is not in MLflow: {redact(error)}")
