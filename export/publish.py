"""What MLflow has of a run's exported files: a logged model for each, with the record of verification."""

import sys
from contextlib import suppress
from pathlib import Path

from export.record import MODEL_FILES, published_model, reports_of
from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata
from serve.contract.urls import redact
from serve.tracking import recorded_run
from serve.verification import RECORD

METRICS = {
    "accuracy": "accuracy_served",
    "log_loss": "log_loss_served",
    "argmax_agreement": "argmax_agreement",
    "max_difference_probabilities": "max_difference_probabilities",
}


def training_run(run: Path, run_id: str, checkpoint_sha256: str) -> str:
    """Return the ID of the MLflow run that trained: by the run directory, by the checkpoint (`run_id`), or,
    if training was tracked and MLflow was away, by MLflow itself, which may have been sent the run since.

    "" when there is none.
    """
    recorded = recorded_run(run)
    if recorded.run_id or run_id or not recorded.tracked:
        return recorded.run_id or run_id
    from train.tracking.client import explained, find_training_run

    with suppress(ValueError, OSError), explained(recorded.uri):
        return find_training_run("", checkpoint_sha256, recorded.uri)
    return ""


def check_register(run: Path, run_id: str, name: str) -> None:
    """
    Raises:
        UserError: nothing of this run can be registered under this name.
        ConnectionError: MLflow does not answer.
    """
    recorded = recorded_run(run)
    if not run_id and recorded.tracked:
        raise UserError(
            "--register: MLflow does not have this run yet: send it by python train/sync.py with the run "
            "directory that training wrote"
        )
    if not run_id:
        raise UserError("--register: this run was not tracked in MLflow (--track false)")
    from train.tracking.client import check_registrable, explained

    try:
        with explained(recorded.uri):
            check_registrable(run_id, name, recorded.uri)
    except (ValueError, OSError) as error:
        raise _of_register(name, error) from error


def track(metadata: ModelMetadata, run: Path, register: str = "", precision: str = "fp32") -> None:
    """Log each published model file of a run directory to the MLflow run that trained it, or bring the
    record of one that is there up to date; register the file of this precision.

    Without a run this does nothing.

    Raises:
        UserError, ConnectionError: it cannot be registered.
    """
    recorded = recorded_run(run)
    run_id = training_run(run, metadata.run_id, metadata.checkpoint_sha256)
    if not run_id:
        if recorded.tracked:
            print("the model is not in MLflow, which does not have its training run yet: see train/sync.py")
        return
    from train.tracking.client import explained  # half a second that --track false saves

    try:
        with explained(recorded.uri):
            for of_file in MODEL_FILES:
                try:
                    file, published, _ = published_model(run, of_file)
                except ValueError:  # there is none, or it is of a checkpoint that is gone
                    continue
                _log(run_id, file, published, register if of_file == precision else "", recorded.uri)
    except (ValueError, OSError) as error:
        if register:
            raise _of_register(register, error) from error
        print(f"warning: the model is not in MLflow: {redact(error)}", file=sys.stderr)


def _of_register(name: str, error: Exception) -> Exception:
    kind = ConnectionError if isinstance(error, OSError) else UserError
    return kind(f"--register {name}: {error}")


def _log(run_id: str, file: Path, metadata: ModelMetadata, register: str, uri: str) -> None:
    from train.tracking import client as tracking

    verification, reports = file.with_name(RECORD), reports_of(file)
    model_id = tracking.find_logged_model(run_id, reports[0]["model_sha256"], uri)
    if model_id:
        tracking.log_verification(run_id, model_id, verification)
        if register:
            tracking.register_logged_model(model_id, register)
    elif not metadata.verified:  # withdrawn
        return
    else:
        prefix = "served" if metadata.precision == "fp32" else f"served_{metadata.precision}"
        logged = tracking.log_verified_model(
            run_id,
            file,
            verification,
            metadata.preprocess.size,
            len(metadata.class_names),
            {f"{prefix}/{name}": reports[0][key] for name, key in METRICS.items()},
            register,
            metadata.checkpoint_sha256,
            metadata.precision,
            uri,
        )
        model_id = logged.rpartition("/")[2]
    registered = f", registered as {register}@challenger" if register else ""
    print(f"in MLflow: models:/{model_id} ({file.name}){registered}")
