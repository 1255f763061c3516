"""Find likely wrong labels: those that models trained without the image contradict with confidence.

    python pipelines/label_issues.py --folds 3 --output label_issues -- FLAGS OF train/main.py
    python pipelines/label_issues.py RUN RUN RUN --output label_issues

The first form trains a run for each fold, in FOLDER/fold1of3 and so on; started again, it resumes them. The
second takes runs trained with --folds K and --fold 1 ... K. Both write label_issues.csv, the least
plausible label first, and label_issues.png. Delete the rows whose labels are right: train/main.py --exclude
label_issues.csv leaves out every image that is listed.

Method: confident learning (arXiv 1911.00068) as implemented in cleanlab; see
pipelines/confident_learning.py for when nothing is listed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not pipelines/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.command_line import CommandLine, Number
from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch", "cleanlab")

import argparse
import csv
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pipelines.confident_learning import CURE, MOST_LISTED, LabelIssues, find_issues
from pipelines.folds import OutOfFold, read_folds, train_folds
from pipelines.launch import exit_code_of, split_flags
from serve.contract.files import atomic_path
from train.data.labels import listed
from train.evaluation.charts import save_figure
from train.evaluation.figures import Picture, contact_sheet
from train.evaluation.tables import check_reports_replaceable

TABLE, FIGURE = "label_issues.csv", "label_issues.png"
HEADER = (
    *("rank", "path", "label", "suggestion", "probability_of_label", "probability_of_suggestion"),
    *("score", "fold"),
)
MOST_KINDS = 20  # pairs of classes that are printed
MOST_PICTURES = 42


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("pipelines/label_issues.py", __doc__, "RUN ... | --folds N -- --data DIR [...]")
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="run directories of the folds")
    add("--folds", type=Number(int, 2), help="number of folds to train with the flags after --")
    add("--nproc_per_node", type=Number(int, 1), default=1, help="processes of each training")
    add("--output", type=Path, default=Path("label_issues"), help="folder of the results")
    add("--overwrite", action="store_true", help="replace an edited list, or files of another command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, that of a training that failed, or 2 for unusable arguments or models."""
    own, flags = split_flags(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(own)
    return exit_code_of(lambda: run(args, flags))


def run(args: argparse.Namespace, flags: Sequence[str]) -> None:
    if bool(args.runs) == bool(args.folds):
        raise UserError("give either the run directories of the folds, or --folds to train them")
    if flags and not args.folds:
        raise UserError("flags after -- need --folds: they are for its trainings")
    reports = {args.output / TABLE: ",".join(f'"{name}"' for name in HEADER), args.output / FIGURE: ""}
    check_reports_replaceable(reports, args.overwrite)
    if args.runs:
        data = read_folds(args.runs)
    else:
        data = train_folds(args.folds, args.output, flags, args.nproc_per_node)
    report(data, args.output, args.overwrite)


def report(data: OutOfFold, output: Path, overwrite: bool = False) -> LabelIssues:
    """Write the table and the figure. Raises UserError when there is another table: people edit it."""
    issues = find_issues(data)
    output.mkdir(parents=True, exist_ok=True)
    table = output / TABLE
    with atomic_path(table) as new:
        write_issues(new, data, issues)
        if not overwrite and table.exists() and table.read_bytes() != new.read_bytes():
            raise UserError(
                f"{table} exists and differs from the new list: choose another --output, or give "
                "--overwrite to replace it"
            )
    save_figure(draw_issues(data, issues), output / FIGURE)
    print(issue_summary(data, issues))
    print(f"written: {output}/{TABLE}, {FIGURE}")
    return issues


def write_issues(path: Path, data: OutOfFold, issues: LabelIssues) -> None:
    """Write a CSV file with the columns of HEADER."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(HEADER)
        for rank, i in enumerate(issues.found.tolist(), 1):
            p, label = data.probabilities[i], int(data.labels[i])
            names = data.class_names[label], data.class_names[p.argmax()]
            numbers = [float(f"{value:.6g}") for value in (p[label], p.max(), issues.scores[i])]
            writer.writerow([rank, data.paths[i], *names, *numbers, int(data.folds[i])])


def draw_issues(data: OutOfFold, issues: LabelIssues) -> Figure:
    pictures = []
    for rank, i in enumerate(issues.found[:MOST_PICTURES].tolist(), 1):
        p, label = data.probabilities[i], data.class_names[data.labels[i]]
        name = data.paths[i].rpartition("/")[2]
        caption = f"{rank}: {name}\n{label}? rather {p.max():.2f}\n{data.class_names[p.argmax()]}"
        pictures.append(Picture(data.root / data.paths[i], caption, False))
    shown = f", {MOST_PICTURES} shown" if len(issues.found) > MOST_PICTURES else ""
    title = f"{len(issues.found)} likely wrong labels of {len(data.paths)}{shown}: given label? prediction"
    return contact_sheet(title, pictures)


def issue_summary(data: OutOfFold, issues: LabelIssues) -> str:
    """Return how many labels were judged and listed, and what was not judged."""
    lines = [
        f"{len(data.paths)} images in {len(np.unique(data.folds))} of {data.num_folds} folds, out-of-fold "
        f"accuracy {data.accuracy:.4f} against the given labels"
    ]
    for fold in np.unique(data.folds).tolist():
        mine = data.folds == fold
        right = data.probabilities[mine].argmax(axis=1) == data.labels[mine]
        lines.append(f"  fold {fold}: {mine.sum()} images, accuracy {right.mean():.4f}")
    for fold in issues.folds_at_chance:
        lines.append(
            f"warning: the model of fold {fold} is not surely better than always naming the largest class: "
            f"its images are not judged; {CURE}"
        )
    if data.missing:
        lines.append(
            f"warning: no run of fold {', '.join(map(str, data.missing))}: its images are not judged"
        )
    if issues.unknown_classes:
        names = listed([data.class_names[label] for label in issues.unknown_classes])
        lines.append(
            f"warning: more than {MOST_LISTED:.0%} of the labels of {names} would be listed: the models do "
            f"not know these classes, which are not judged; {CURE}"
        )
    kinds = Counter(
        (data.class_names[data.labels[i]], data.class_names[data.probabilities[i].argmax()])
        for i in issues.found.tolist()
    )
    judged = int(issues.judged.sum())
    lines.append(
        f"estimated number of wrong labels: {issues.estimate} ({issues.estimate / judged:.2%} of {judged} "
        f"judged); likely ones listed: {len(issues.found)}"
    )
    lines += [
        f"  {label!r}, rather {other!r}: {count}" for (label, other), count in kinds.most_common(MOST_KINDS)
    ]
    if len(kinds) > MOST_KINDS:
        lines.append(f"  and {len(kinds) - MOST_KINDS} rarer pairs of classes, which the list has too")
    return "\n".join(lines)


if __name__ == "__main__":
    end_on_signal("; the same command continues with the folds that are not finished")
    sys.exit(main())
