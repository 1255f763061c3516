"""The evaluation of a model file in MLflow: a run with the data set, and metrics of the logged model."""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serve.contract.mlflow_tags import CHECKPOINT_TAG, DATA_TAG, HOST_TAG, KIND_TAG
from train.tracking.client import TrackingStore, choose_experiment, dataset_input, mlflow
from train.tracking.registry import find_by_checkpoint, find_logged_model

PREFIX = "evaluation/"  # of metrics: those of training are val/ and served/


@dataclass(frozen=True)
class LoggedEvaluation:
    """What MLflow gets of the evaluation of a model file."""

    model_sha256: str
    checkpoint_sha256: str
    run_name: str
    run_id: str
    """Of the run that trained the model; empty: found by the checkpoint."""
    data_source: str
    """Absolute path or URL."""
    data_digest: str
    started: float
    """Seconds since 1970."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()


def log_evaluation(store: TrackingStore, evaluation: LoggedEvaluation) -> str:
    """Return the ID of the new, finished MLflow run.

    It is below the run that trained the model, in its experiment, if the store has that run; and the logged
    model of the same bytes, if there is one, gets the metrics with their data set. Raises RefusedError or
    ConnectionError.
    """
    run_id, checkpoint = evaluation.run_id, evaluation.checkpoint_sha256
    if not run_id and checkpoint:
        run_id = find_by_checkpoint(store, checkpoint)
    with store.errors():
        client, entities = store.client, mlflow.entities
        trained = store.find_run(run_id) if run_id else None
        model_id = find_logged_model(client, trained, evaluation.model_sha256) if trained else ""
        tags = {KIND_TAG: "evaluation", CHECKPOINT_TAG: checkpoint}
        if trained:
            experiment_id = trained.info.experiment_id
            tags |= {"mlflow.parentRunId": run_id, "purebred.training_run_id": run_id}
        else:
            experiment_id = store.experiment_id(*choose_experiment(""))
        given = dataset_input(evaluation.data_source, evaluation.data_digest, "evaluation")
        dataset = given.dataset
        tags |= {DATA_TAG: dataset.name, HOST_TAG: socket.gethostname()}
        run = client.create_run(
            experiment_id,
            start_time=int(evaluation.started * 1000),
            tags=mlflow.tracking.context.registry.resolve_tags(tags),
            run_name=f"evaluate {evaluation.run_name} on {dataset.name}",
        )
        made = run.info.run_id
        store.check_artifact_folder(run.info.artifact_uri)
        models = [entities.LoggedModelInput(model_id)] if model_id else None
        client.log_inputs(made, [given], models)
        parameters = [entities.Param(key, value) for key, value in evaluation.parameters.items()]
        now = int(time.time() * 1000)
        metrics = [
            entities.Metric(
                *(PREFIX + name, value, now, 0),
                model_id=model_id or None,
                dataset_name=dataset.name,
                dataset_digest=dataset.digest,
                run_id=made,
            )
            for name, value in evaluation.metrics.items()
        ]
        client.log_batch(made, metrics, parameters)
        for file in evaluation.files:
            client.log_artifact(made, str(file))
        client.set_terminated(made, "FINISHED")
    return str(made)
