"""The end of a scoring job: what is printed and written as JSON, and which exit code follows."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.contract.command_line import Number
from serve.contract.errors import LASTING, UserError, print_line
from serve.contract.files import atomic_write
from serve.contract.urls import redact
from serve.local_copy import LocalCopy
from serve.outputs.destination import check_output_replaceable, open_output
from serve.shards import Shard
from serve.summary import JobSummary, is_summary

TOO_MANY_ERRORS = 4
SUFFIX = ".summary.json"  # with --shard of a file in the folder that --summary names

Write = Callable[[JobSummary], None]


def report_error(error: Exception) -> int:
    """Print the error in one line; return the exit code: 2 if the same call will fail again, 3 if it may
    succeed."""
    print_line(f"error: {redact(error)}")
    return 2 if isinstance(error, LASTING) else 3


def add_outcome_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-errors",
        type=Number(float, 0, 1),
        metavar="SHARE",
        help=f"of the rows that may be errors: with more, the exit code is {TOO_MANY_ERRORS}; all rows "
        "are written",
    )
    parser.add_argument(
        "--summary",
        default="",
        metavar="FILE",
        help="JSON of counts, errors by kind, predicted classes, estimated accuracy, speed, model; or "
        "its URL; with --shard a folder",
    )


@contextmanager
def open_summary(summary: str, output: str, shard: Shard | None, overwrite: bool) -> Iterator[Write]:
    """Yield what writes a summary to the file or URL; without one, it does nothing.

    Raises:
        UserError: it cannot be written, or would replace another kind of file.
    """
    if not summary:
        yield lambda _: None
        return
    with open_output(summary, SUFFIX, shard, "--summary") as (path, copy):
        for file in (output, f"{output}.json"):  # the second is its manifest
            if copy.url_of(path) == file or (not copy.url and path.resolve() == Path(file).resolve()):
                raise UserError(f"--summary {redact(summary)} is a file of --output: choose another name")
        check_output_replaceable(copy, path, overwrite, flag="--summary", is_ours=is_summary)
        yield lambda found: _write(found, path, copy)


def _write(summary: JobSummary, path: Path, copy: LocalCopy) -> None:
    """Write the summary. The scores are written by now: an error costs a warning, not the job."""
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write(summary.to_json())
        copy.publish(path)
    except (UserError, OSError) as error:
        print_line(f"warning: the summary is not written: {redact(error)}")


def print_outcome(summary: JobSummary) -> None:
    """Print the commonest errors and the estimated accuracy."""
    for line in summary.lines():
        print_line(line)


def outcome_code(summary: JobSummary, total: int, max_errors: float | None) -> int:
    """Return the exit code for the errors among a job's `total` rows, of which one shard has a part: 0, or
    TOO_MANY_ERRORS, with a line."""
    if max_errors is None or summary.errors <= max_errors * total + 1e-9:
        return 0
    print_line(
        f"error: {summary.errors} of {total} rows are errors, more than --max-errors {max_errors:g} allows "
        "(all rows are written)"
    )
    return TOO_MANY_ERRORS
