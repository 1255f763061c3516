"""Write the report of a finished run anew.

    python pipelines/report.py --run runs/NAME

Writes runs/NAME/report.html (--output names another file): metrics with intervals, curves, classes,
confusions, the worst images, likely wrong labels, calibration, and the accuracy that each threshold leaves.
Training writes it too; --images is for images that were moved since.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not pipelines/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.installation import require

require("train", "torch", "scipy")

import argparse
from collections.abc import Sequence

from pipelines.launch import exit_code_of
from serve.contract.command_line import CommandLine
from train.checkpoint import best_checkpoint, load_checkpoint
from train.evaluation.html_report import REPORT, REPORT_START
from train.evaluation.tables import check_reports_replaceable
from train.runs.results import read_run
from train.runs.run_page import write_run_page


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("pipelines/report.py", __doc__, "--run RUN [options]")
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run directory written by train/main.py")
    add("--images", type=Path, help="folder of the validation images (default: where training read them)")
    add("--output", type=Path, help=f"file (default: {REPORT} in the run directory)")
    add("--overwrite", action="store_true", help="replace a file that is no such report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for unusable arguments or runs."""
    args = build_parser().parse_args(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    path = args.output or args.run / REPORT
    check_reports_replaceable({path: REPORT_START}, args.overwrite)
    result = read_run(args.run)
    best = load_checkpoint(best_checkpoint(args.run))
    root = args.images or Path(best["val_root"])
    write_run_page(path, result, str(args.run), root, best["data_digest"], {})
    print(f"written: {path}")


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
