"""Tags of runs, models and experiments in MLflow."""

CHECKPOINT_TAG = "purebred.checkpoint_sha256"  # on models in MLflow, as in the file's own metadata
PRECISION_TAG = "purebred.model_precision"  # of the file's own layers; unset: fp32
BEST_CHECKPOINT_TAG = "purebred.best_checkpoint_sha256"  # on training runs in MLflow
KIND_TAG = "purebred.kind"  # of a run in MLflow: training, fold, trial, sweep, scoring, evaluation
MODEL_NAME_TAG = "purebred.model"  # architecture
CLASSES_TAG = "purebred.classes"  # their number
DATA_TAG = "purebred.data"  # last part of its path or URL
HOST_TAG = "purebred.host"
# a tag and its value: else MLflow guesses, at first GenAI
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
