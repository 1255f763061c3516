"""Log a scoring run, as JSON on standard input, to a local MLflow store; prints the run's ID.

serve/lineage.py starts this where the store is a file, which only mlflow itself can write.
"""

import json
import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not export/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from serve.lineage import ScoringRun, Source
from train.tracking import find_model, log_scoring_run


def main() -> int:
    run = ScoringRun(**json.load(sys.stdin))
    source = Source()
    if run.training_run_id:
        experiment_id, model_id, versions = find_model(
            run.training_run_id, run.checkpoint_sha256, run.parameters.get("model_precision", "fp32")
        )
        source = Source(experiment_id, model_id, tuple(versions))
    run_id = log_scoring_run(
        run.name,
        source.experiment_id,
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
