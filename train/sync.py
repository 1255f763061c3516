"""Send MLflow what it missed of training runs.

    python train/sync.py runs/NAME [runs/OTHER ...]

What MLflow has already stays as it is: the command can be repeated. A run whose processes were lost becomes
KILLED. The server is MLFLOW_TRACKING_URI, by default the one to which the run was logged while it trained.

Exit code: 0 MLflow has everything; 1 it does not answer; 2 it refuses something, or this is not a run
directory, or it is being trained.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not train/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.command_line import CommandLine
from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "mlflow")

from collections.abc import Sequence

from serve.contract.locks import is_locked
from serve.contract.urls import is_remote, redact
from train.runs.resume import LOCK
from train.tracking.base import read_metrics
from train.tracking.client import TrackingStore
from train.tracking.contents import artifacts
from train.tracking.errors import RefusedError
from train.tracking.run_record import FILE, read_record
from train.tracking.sender import Sender


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine("train/sync.py", __doc__, "RUN [RUN ...]")
    parser.add_argument("runs", nargs="+", help="run directories")
    worst = 0
    for run in parser.parse_args(argv).runs:
        try:
            if is_remote(run):
                raise UserError("only a local run directory is synchronised: copy it to this machine first")
            print(f"{run}: MLflow run {sync(Path(run))} is complete")
        except (UserError, OSError) as error:
            print(f"error: {redact(run)}: {redact(error)}", file=sys.stderr)
            worst = max(worst, 2 if isinstance(error, UserError) else 1)
    return worst


def sync(folder: Path) -> str:
    """Send what is missing, and return the run's ID.

    Raises:
        UserError: `folder` is no run that MLflow should have, or is being trained, or MLflow refuses it.
        ConnectionError: MLflow does not answer.
    """
    record = read_record(folder / FILE)
    if record is None:
        raise UserError(f"no readable {FILE}: this is no run directory, or its run had --track false")
    if is_locked(folder / LOCK):
        raise UserError("the run is being trained: that process sends what is missing")
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if record.complete and not record.run_id:  # another store has the files
        record.files = [str(path.relative_to(folder)) for path in artifacts(folder)]
    elif record.complete and (not given or TrackingStore().uri == record.uri):
        return record.run_id
    if record.status == "RUNNING":
        record.status = "KILLED"
    sender = Sender(record, folder / FILE, read_metrics(folder / "metrics.jsonl"), system_metrics=False)
    sender.update()
    if sender.refusals:
        raise RefusedError("MLflow refuses " + "\n".join(sender.refusals))
    return record.run_id


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
