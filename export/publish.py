"""The exported files of a run in MLflow: a logged model for each, with the record of its verification."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from export.record import MODEL_FILES, published_model, reports_of
from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata
from serve.contract.urls import redact
from serve.tracking import RecordedRun, recorded_run
from serve.verification import RECORD

if TYPE_CHECKING:
    from train.tracking.client import TrackingStore

METRICS = {
    "accuracy": "accuracy_served",
    "log_loss": "log_loss_served",
    "argmax_agreement": "argmax_agreement",
    "max_difference_probabilities": "max_difference_probabilities",
}


def training_run(run: Path, run_id: str, checkpoint_sha256: str) -> str:
    """Return the ID of the MLflow run that trained, or "": from the run directory, else from the checkpoint
    (`run_id`), else from MLflow, which may have got the run after the checkpoint was written."""
    recorded = recorded_run(run)
    if recorded.run_id or run_id or not recorded.tracked:
        return recorded.run_id or run_id
    from train.tracking.registry import find_by_checkpoint

    with suppress(UserError, OSError):
        return find_by_checkpoint(_open_store(recorded), checkpoint_sha256)
    return ""


def check_register(run: Path, run_id: str, name: str) -> None:
    """Raise UserError when nothing of this run can be registered under this name, ConnectionError when
    MLflow does not answer."""
    recorded = recorded_run(run)
    if not run_id and recorded.tracked:
        raise UserError(
            f"--register: MLflow does not have this run yet: {command('train/sync.py')} with the run "
            "directory that training wrote sends it"
        )
    if not run_id:
        raise UserError("--register: this run was not tracked in MLflow (--track false)")
    from train.tracking.registry import check_registrable

    try:
        check_registrable(_open_store(recorded, run_id), run_id, name)
    except (UserError, OSError) as error:
        raise _of_register(name, error) from error


def track(metadata: ModelMetadata, run: Path, register: str = "", precision: str = "fp32") -> None:
    """Log each published model file to the MLflow run that trained it, or update the record of one that is
    there; register the file of this precision. Without an MLflow run this does nothing.

    Raises:
        UserError, ConnectionError: it cannot be registered.
    """
    recorded = recorded_run(run)
    run_id = training_run(run, metadata.run_id, metadata.checkpoint_sha256)
    if not run_id:
        if recorded.tracked:
            print(
                "warning: the model is not in MLflow, which does not have its training run yet: "
                f"{command('train/sync.py')} with the run directory sends it"
            )
        return
    try:
        store = _open_store(recorded, run_id)
        for of_file in MODEL_FILES:
            try:
                file, published, _ = published_model(run, of_file)
            except UserError:  # there is none, or it is of a checkpoint that is gone
                continue
            _publish(store, run_id, file, published, register if of_file == precision else "")
    except (UserError, OSError) as error:
        if register:
            raise _of_register(register, error) from error
        print(f"warning: the model is not in MLflow: {redact(error)}", file=sys.stderr)


def _open_store(recorded: RecordedRun, run_id: str = "") -> "TrackingStore":
    from train.tracking.client import TrackingStore  # a second that --track false saves

    return TrackingStore(recorded.uri, run_id, retries=3, seconds=120)  # nobody trains meanwhile


def _publish(
    store: "TrackingStore", run_id: str, file: Path, metadata: ModelMetadata, register: str
) -> None:
    from export.mlflow_package import ServedModel
    from train.tracking.registry import publish_model

    prefix = "served" if metadata.precision == "fp32" else f"served_{metadata.precision}"
    report = reports_of(file)[0]
    metrics = {f"{prefix}/{name}": report[key] for name, key in METRICS.items()}
    flavor = ServedModel(file, metadata)
    model_id = publish_model(
        store, run_id, file, metadata, file.with_name(RECORD), metrics, flavor, register
    )
    if model_id:
        registered = f", registered as {register}@challenger" if register else ""
        print(f"in MLflow: models:/{model_id} ({file.name}){registered}")


def _of_register(name: str, error: Exception) -> Exception:
    kind = ConnectionError if isinstance(error, OSError) else UserError
    return kind(f"--register {name}: {error}")
