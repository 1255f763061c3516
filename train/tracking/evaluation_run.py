"""The evaluation of a model file in MLflow: a run with the data set, and metrics of the logged model."""

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from serve.contract.mlflow_tags import CHECKPOINT_TAG, DATA_TAG, HOST_TAG, KIND_TAG
from train.tracking.client import TrackingStore, choose_experiment, dataset_input, mlflow
from train.tracking.registry import find_by_checkpoint, find_logged_model

PREFIX = "evaluation/"  # of metrics: those of training are val/ and served/


def log_evaluation(
    store: TrackingStore,
    *,
    model_sha256: str,
    checkpoint_sha256: str,
    run_name: str,
    run_id: str,
    dataset: tuple[str, str],
    started: float,
    metrics: Mapping[str, float],
    parameters: Mapping[str, str],
    files: Sequence[Path],
) -> str:
    """Return the ID of the new, finished MLflow run.

    It is below the run that trained the model (`run_id`, or found by the checkpoint), in its experiment, if
    the store has that run; and the logged model of the same bytes, if there is one, gets the metrics with
    their data set. `dataset` is (absolute path or URL, digest), `started` seconds since 1970. Raises
    RefusedError or ConnectionError; a run that is not whole has the status FAILED.
    """
    if not run_id and checkpoint_sha256:
        run_id = find_by_checkpoint(store, checkpoint_sha256)
    with store.errors():
        client, entities = store.client, mlflow.entities
        trained = store.find_run(run_id) if run_id else None
        model_id = find_logged_model(client, trained, model_sha256) if trained else ""
        tags = {KIND_TAG: "evaluation", CHECKPOINT_TAG: checkpoint_sha256}
        if trained:
            experiment_id = store.experiment_id("", trained.info.experiment_id)
            tags |= {"mlflow.parentRunId": run_id, "purebred.training_run_id": run_id}
        else:
            experiment_id = store.experiment_id(*choose_experiment(""))
        given = dataset_input(*dataset, "evaluation")
        tags |= {DATA_TAG: given.dataset.name, HOST_TAG: socket.gethostname()}
        run = client.create_run(
            experiment_id,
            start_time=int(started * 1000),
            tags=mlflow.tracking.context.registry.resolve_tags(tags),
            run_name=f"evaluate {run_name} on {given.dataset.name}",
        )
        made = run.info.run_id
        try:
            models = [entities.LoggedModelInput(model_id)] if model_id else None
            client.log_inputs(made, [given], models)
            now = int(time.time() * 1000)
            measured = [
                entities.Metric(
                    *(PREFIX + name, value, now, 0),
                    model_id=model_id or None,
                    dataset_name=given.dataset.name,
                    dataset_digest=given.dataset.digest,
                    run_id=made,
                )
                for name, value in metrics.items()
            ]
            client.log_batch(made, measured, [entities.Param(*each) for each in parameters.items()])
            store.check_artifact_folder(run.info.artifact_uri)
            for file in files:
                client.log_artifact(made, str(file))
        except BaseException:
            with suppress(Exception):  # of a server that is gone too
                client.set_terminated(made, "FAILED")
            raise
        client.set_terminated(made, "FINISHED")
    return str(made)
