"""Tags of runs, models and experiments in MLflow."""

import json

CHECKPOINT_TAG = "purebred.checkpoint_sha256"  # on models in MLflow, as in the file's own metadata
PRECISION_TAG = "purebred.model_precision"  # of the file's own layers; unset: fp32
BEST_CHECKPOINT_TAG = "purebred.best_checkpoint_sha256"  # on training runs in MLflow
KIND_TAG = "purebred.kind"  # of a run in MLflow: training, fold, trial, scoring, evaluation, or:
SWEEP, CROSS_VALIDATION = "sweep", "cross-validation"
MODEL_NAME_TAG = "purebred.model"  # architecture
CLASSES_TAG = "purebred.classes"  # their number
DATA_TAG = "purebred.data"  # last part of its path or URL
HOST_TAG = "purebred.host"

VIEW = "purebred"  # key of a view of the table of runs, in MLflow's menu "Views" and in links
_COLUMNS = [
    *("metrics.`best/val/accuracy`", "metrics.`best/val/log_loss`", "metrics.`best/val/f1_macro`"),
    *("params.`model`", f"tags.`{KIND_TAG}`"),
]
_STATE = {"orderByKey": _COLUMNS[0], "orderByAsc": False, "selectedColumns": _COLUMNS}
# MLflow 3.17 reads these values, and lists the view; versions before read those of the state itself
_NAMED = {"name": "best accuracy first", "createdAt": 0, "updatedAt": 0, "state": json.dumps(_STATE)}
VIEW_TAG = (f"mlflow.sharedViewState.{VIEW}", json.dumps(_STATE | _NAMED))
# MLflow guesses the kind of an experiment without this tag, at first GenAI
EXPERIMENT_TAGS = dict([("mlflow.experimentKind", "custom_model_development"), VIEW_TAG])


def runs_page(uri: str, experiment_id: str) -> str:
    """Return the address of an experiment's table of runs, the best accuracy first, at a server."""
    query = f"workflowType=machine_learning&viewStateShareKey={VIEW}"  # else a new browser shows GenAI
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"
