"""Send MLflow what it missed of training runs.

    python train/sync.py runs/NAME [runs/OTHER ...]

What MLflow has already stays as it is, so that this can be done twice. A run whose processes are gone
without saying how becomes KILLED. The server is MLFLOW_TRACKING_URI, by default the one that the run was
logged to, or should have been.

Exit code: 0 MLflow has everything; 1 it does not answer; 2 it refuses something, or this is not a run
directory, or it is being trained.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not train/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

if __name__ == "__main__":  # before the imports that take seconds
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "mlflow")

import argparse
from collections.abc import Sequence

from serve.contract.locks import is_locked
from serve.contract.urls import redact
from train.runs.resume import LOCK
from train.tracking.base import read_metrics
from train.tracking.mlflow_errors import RefusedError, without_passwords
from train.tracking.mlflow_run import Sender
from train.tracking.run_record import read_record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    worst = 0
    for folder in parser.parse_args(argv).runs:
        try:
            print(f"{folder}: MLflow run {sync(folder)} is complete")
        except UserError as error:
            print(f"error: {redact(error)}", file=sys.stderr)
            worst = max(worst, 2)
        except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
            reason = (without_passwords(str(error)) or type(error).__name__).splitlines()[0][:200]
            print(f"error: {folder}: MLflow does not answer: {reason}", file=sys.stderr)
            worst = max(worst, 1)
    return worst


def sync(folder: Path) -> str:
    """Returns the run's ID.

    Raises:
        UserError: `folder` is no run that MLflow should have, or is being trained, or MLflow refuses it.
    """
    place = folder / "tracking.json"
    record = read_record(place)
    if record is None:
        raise UserError(f"{folder} has no readable tracking.json: it is no run, or one of --track false")
    if is_locked(folder / LOCK):
        raise UserError(f"{folder} is being trained: that process sends what is missing")
    if record.complete and record.run_id:
        return record.run_id
    if record.status == "RUNNING":
        record.status = "KILLED"
    sender = Sender(record, place, read_metrics(folder / "metrics.jsonl"), system_metrics=False)
    try:
        sender.update()
    except RefusedError as error:
        raise RefusedError(f"{folder}: MLflow refuses this run: {error}") from error
    finally:
        sender.close()  # another folder's run may follow
    if sentences := sender.refused.sentences():
        raise RefusedError(f"{folder}: " + "\n".join(sentences.values()))
    return record.run_id


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
