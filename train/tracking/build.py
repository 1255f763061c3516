"""Choose the tracker of a rank."""

from pathlib import Path

from train.config import TrainConfig
from train.tracking.base import MetricsFile, NullTracker


def build_tracker(
    config: TrainConfig, is_main: bool, path: Path, epochs_done: int, run_id: str
) -> NullTracker:
    """Only rank 0 has one that does anything, and spends the seconds of importing mlflow."""
    if not is_main:
        return NullTracker()
    if not config.track:
        return MetricsFile(path, epochs_done)
    from train.tracking.mlflow_tracker import MlflowTracker

    return MlflowTracker(config, path, epochs_done, run_id)
