"""Join the parts of a sharded job, if they prove that every input has exactly one row.

python serve/merge.py predictions/ --output predictions.csv
python serve/merge.py s3://bucket/predictions --output s3://bucket/predictions.csv
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not serve/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

import argparse
from collections.abc import Sequence

from serve.contract.command_line import CommandLine
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.urls import redact
from serve.local_copy import open_folder
from serve.outcome import (
    add_outcome_options,
    open_summary,
    outcome_code,
    print_outcome,
    report_error,
)
from serve.outputs.destination import check_output_replaceable, open_output
from serve.outputs.join import join
from serve.shards import PART_NAME, Manifest
from serve.summary import JobSummary, summary_of


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("serve/merge.py", __doc__, "FOLDER --output FILE [options]")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="where the part files and their manifests are, or its URL (copied to TMPDIR)",
    )
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="file that gets all rows, or its URL"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace --output and --summary even if they are no outputs of this command",
    )
    add_outcome_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code.

    0: merged, 1: merged, and not one image was scored, 2: the parts do not fit, 3: a file could not be read
    or written, 4: merged, and more rows are errors than --max-errors allows, by default the shards' own.
    """
    args = build_parser().parse_args(argv)
    try:
        where, _, name = args.output.rpartition("/")
        if where == args.folder.rstrip("/") and PART_NAME.fullmatch(name):
            raise UserError(f"--output {args.output!r} is named as the parts are: choose another name")
        with (
            open_folder(args.folder) as folder,
            open_output(args.output, ".csv", None) as (path, copy),
            open_summary(args.summary, copy.url_of(path), None, args.overwrite) as write_summary,
        ):
            check_output_replaceable(copy, path, args.overwrite)
            summary = merge(folder, path)
            copy.publish(path)
            summary.facts |= {"output": redact(args.output), "shard": ""}
            write_summary(summary)
    except (UserError, OSError) as error:
        return report_error(error)
    where = redact(args.output)
    print(
        f"{summary.rows} rows in {where}, one for each input: {summary.scored} scored, "
        f"{summary.errors} errors"
    )
    print_outcome(summary)
    max_errors = summary.facts.get("max_errors") if args.max_errors is None else args.max_errors
    return outcome_code(summary, summary.rows, max_errors) or int(summary.errors == summary.rows)


def merge(folder: Path, output: Path) -> JobSummary:
    """Join parts, and return the job's summary. Raises UserError when they are not one job's."""
    parts = find_parts(folder)
    manifests = [Manifest.read(part) for part in parts]
    check_fit(parts, manifests)
    job = manifests[0].job
    if output.suffix != parts[0].suffix:
        raise UserError(f"--output {str(output)!r} must end in {parts[0].suffix}, as the parts do")
    if output.resolve() in {part.resolve() for part in parts}:
        raise UserError(f"--output {str(output)!r} is one of the parts: choose another name")
    with atomic_write(output) as file:
        if join(parts, manifests, file) != job.inputs_sha256:
            raise UserError(
                f"the names in the {len(parts)} parts are not the job's {job.total} inputs in their order"
            )
    summary = JobSummary()
    for manifest in manifests:
        summary.join(summary_of(manifest))
    return summary


def find_parts(folder: Path) -> list[Path]:
    """Return one for each shard, in order. Raises UserError when some are missing or of another job."""
    found = {path: match for path in folder.iterdir() if (match := PART_NAME.fullmatch(path.name))}
    if not found:
        raise UserError(f"no part files (part-00000-of-00001.csv, ...) in {str(folder)!r}")
    kinds = {(match[2], match[3]) for match in found.values()}
    if len(kinds) > 1:
        described = ", ".join(f"of {int(count)} ({suffix})" for count, suffix in sorted(kinds))
        raise UserError(
            f"{str(folder)!r} has parts of several jobs: {described}: remove those that are not to be "
            "merged, as in part-*-of-00008.csv*"
        )
    count, parts = int(kinds.pop()[0]), sorted(found)
    indices = {int(match[1]) for match in found.values()}
    if missing := sorted(set(range(count)) - indices):
        listed = ", ".join(map(str, missing[:20])) + (", ..." if missing[20:] else "")
        raise UserError(f"{len(missing)} of {count} parts are missing ({listed}): score these shards first")
    return parts


def check_fit(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0].job
    position = 0
    for part, manifest in zip(parts, manifests, strict=True):
        for name, reason in (
            ("model_sha256", "another model"),
            ("inputs_sha256", "another list of inputs"),
            ("total", "another number of inputs"),
            ("settings", "other settings"),
        ):
            ours, theirs = getattr(manifest.job, name), getattr(first, name)
            if ours != theirs:
                if name == "model_sha256":  # as of an alias that moved
                    both = (manifest, manifests[0])
                    ours, theirs = (f"{m.summary.get('model', '')} {m.job.model_sha256}" for m in both)
                raise UserError(f"{part.name} is of {reason} than {parts[0].name}: {ours} and {theirs}")
        if manifest.first != position:
            kind = "overlap" if manifest.first < position else "leave a gap"
            raise UserError(f"parts {kind}: {part.name} begins at row {manifest.first}, {position} is next")
        position += manifest.rows
    if position != first.total:
        raise UserError(f"the parts have {position} rows for {first.total} inputs: score all shards again")


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
