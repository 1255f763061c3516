"""Log a scoring run, as JSON on standard input, to a local MLflow store; prints the run's ID.

serve/lineage.py starts this where the store is a file, which only mlflow itself can write.
"""

import json
import os
import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not export/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from serve.lineage import ScoringRun, Source
from train.tracking.client import find_model, find_training_run, log_scoring_run


def main() -> int:
    run = ScoringRun(**json.load(sys.stdin))
    training_run_id, source = find_training_run(run.training_run_id, run.checkpoint_sha256), Source()
    if training_run_id:
        experiment_id, model_id, versions = find_model(
            training_run_id, run.checkpoint_sha256, run.parameters.get("model_precision", "fp32")
        )
        source = Source(training_run_id, experiment_id, model_id, tuple(versions))
    if warning := source.warning(run):
        print(warning, file=sys.stderr)
    run_id = log_scoring_run(
        run.name,
        "" if os.environ.get("MLFLOW_EXPERIMENT_NAME") else source.experiment_id,
        run.parameters,
        run.metrics,
        source.tags(run),
        source.model_id,
        (run.started, run.ended),
    )
    print(run_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
