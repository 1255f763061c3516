"""What MLflow has of a run's exported files: a logged model for each, with the record of verification."""

import sys
from pathlib import Path

from export.record import MODEL_FILES, published_model, reports_of
from serve.metadata import ModelMetadata
from serve.verification import RECORD

METRICS = {
    "accuracy": "accuracy_served",
    "log_loss": "log_loss_served",
    "argmax_agreement": "argmax_agreement",
    "max_difference_probabilities": "max_difference_probabilities",
}


def check_register(run_id: str, name: str) -> None:
    """
    Raises:
        ValueError: nothing of this run can be registered under this name.
    """
    if not run_id:
        raise ValueError("--register: this run was not tracked in MLflow (--track false)")
    from train.tracking import check_registrable

    try:
        check_registrable(run_id, name)
    except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
        raise ValueError(f"--register {name}: {error}") from error


def track(run_id: str, run: Path, register: str = "", precision: str = "fp32") -> None:
    """Log each published model file of a run directory to the MLflow run that trained it, or bring the
    record of one that is there up to date; register the file of this precision.

    Without a run this does nothing.

    Raises:
        ValueError: it cannot be registered.
    """
    if not run_id:
        return
    try:
        for of_file in MODEL_FILES:
            try:
                file, metadata, _ = published_model(run, of_file)
            except ValueError:  # there is none, or it is of a checkpoint that is gone
                continue
            _log(run_id, file, metadata, register if of_file == precision else "")
    except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
        if register:
            raise ValueError(f"--register {register}: {error}") from error
        print(f"warning: the model is not in MLflow: {redact(error)}", file=sys.stderr)


def _log(run_id: str, file: Path, metadata: ModelMetadata, register: str) -> None:
    from train import tracking  # half a second that --track false saves

    verification, reports = file.with_name(RECORD), reports_of(file)
    model_id = tracking.find_logged_model(run_id, reports[0]["model_sha256"])
    if model_id:
        tracking.log_verification(run_id, model_id, verification)
        if register:
            tracking.register_logged_model(model_id, register)
    elif not metadata.verified:  # withdrawn
        return
    else:
        prefix = "served" if metadata.precision == "fp32" else f"served_{metadata.precision}"
        uri = tracking.log_verified_model(
            run_id,
            file,
            verification,
            metadata.preprocess.size,
            len(metadata.class_names),
            {f"{prefix}/{name}": reports[0][key] for name, key in METRICS.items()},
            register,
            metadata.checkpoint_sha256,
            metadata.precision,
        )
        model_id = uri.rpartition("/")[2]
    registered = f", registered as {register}@challenger" if register else ""
    print(f"in MLflow: models:/{model_id} ({file.name}){registered}")
