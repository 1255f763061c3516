"""Compare finished runs: metrics with intervals, paired tests, settings that differ, curves.

    python train/compare.py runs/baseline runs/other ... --output comparison
    python train/compare.py runs/baseline runs/other --promote MODEL

The first run is the one that the others are tested against. Writes comparison.md, comparison.csv and
curves.png. --promote moves the alias champion of a registered MLflow model to its challenger, if the
challenger's run is one of those given and not worse than the champion: see train/runs/promotion.py.

Exit code: 0 compared, 2 an error, or a run that shares no validation image with the first; with --promote 0
promoted, 1 not promoted, 2 an error.
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

require("train", "torch")

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.contract.urls import redact
from train.config import SETTINGS
from train.evaluation.figures import comparison_curves, save_figure
from train.evaluation.significance import (
    Interval,
    PairedTest,
    accuracy_interval,
    auc_interval,
    holm,
    mean_interval,
)
from train.evaluation.tables import check_replaceable, markdown_table, write_table
from train.runs.results import RunResult, paired, read_run

METHODS = """\
Accuracy and log loss are those of the probabilities that are served (val_predictions.csv), calibrated if
set. Intervals are of 95 %: Wilson's for accuracy, Student's of the mean loss for log loss, DeLong's (two
classes only) for ROC AUC, Tango's for a difference of accuracy, Student's of the paired differences for a
difference of log loss. p is McNemar's exact test; p (Holm) is corrected for the number of runs tested.
Differences are run minus reference. Each run's best epoch and temperature were chosen on these very images,
which flatters all of them a little; what another seed would give is not in the intervals."""


@dataclass(frozen=True)
class Comparison:
    runs: list[RunResult]
    """The first is the reference of the tests."""
    tests: list[PairedTest | None]
    """Of the second run and on; None where no image is shared."""
    p_holm: list[float | None]
    notes: list[str]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run directory written by train/main.py")
    add("--output", type=Path, default=Path("comparison"), help="folder; default: %(default)s")
    add("--overwrite", action="store_true", help="replace reports of other origin in --output")
    add("--promote", default="", metavar="MODEL", help="registered MLflow model whose champion may change")
    add(
        "--margin",
        type=float,
        default=0.01,
        help="--promote: loss of accuracy that is to be ruled out; default: %(default)s",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (UserError, OSError) as error:
        print(f"error: {redact(error)}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    starts = {"comparison.md": "# Comparison of ", "comparison.csv": '"run","folder",', "curves.png": ""}
    check_replaceable({args.output / name: start for name, start in starts.items()}, args.overwrite)
    comparison = compare(read_runs(args.runs))
    text = markdown(comparison)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "comparison.md").write_text(
        f"# Comparison of {len(comparison.runs)} runs\n\n{text}\n![curves](curves.png)\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    write_csv(args.output / "comparison.csv", comparison)
    figure = comparison_curves(
        {r.name: r.rows for r in comparison.runs}, [r.best_epoch for r in comparison.runs]
    )
    save_figure(figure, args.output / "curves.png")
    print(f"written: {args.output}/comparison.md, comparison.csv, curves.png")
    apart = [r.name for r, test in zip(comparison.runs[1:], comparison.tests, strict=True) if test is None]
    if apart:
        names = ", ".join(apart)
        print(
            f"error: no validation image in common with {comparison.runs[0].name}: {names}", file=sys.stderr
        )
    if args.promote:
        from train.runs.promotion import promote  # a second of mlflow that a comparison does without

        return 0 if promote(args.promote, comparison.runs, args.margin) else 1
    return 2 if apart else 0


def read_runs(folders: Sequence[Path]) -> list[RunResult]:
    """Runs are called by their folder's name, or by its path where two have the same name."""
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"run {str(folders[i])!r} is given twice")
    names = [folder.name for folder in resolved]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def compare(runs: list[RunResult]) -> Comparison:
    reference, others = runs[0], runs[1:]
    tests = [paired(run.predictions, reference.predictions) for run in others]
    corrected = iter(holm([test.p for test in tests if test]))
    notes = []
    for run, test in zip(others, tests, strict=True):
        count, shared = len(run.predictions.paths), test.num_images if test else 0
        if not shared:
            notes.append(f"{run.name} has no validation image in common with {reference.name}: not tested")
        elif shared < max(count, len(reference.predictions.paths)):
            notes.append(
                f"{run.name} is tested on the {shared} images that its {count} validation images and the "
                f"{len(reference.predictions.paths)} of {reference.name} have in common"
            )
    sources = {(str(run.config.get("data", "")), str(run.config.get("val_data", ""))) for run in runs}
    if len(sources) > 1:
        notes.append("--data or --val-data differs: images count as the same if their paths in it are")
    return Comparison(runs, tests, [next(corrected) if test else None for test in tests], notes)


def roc_auc(run: RunResult) -> Interval | None:
    predictions, names = run.predictions, run.predictions.class_names
    if "val/roc_auc" not in run.best:
        return None
    if len(names) > 2:
        return Interval(float(run.best["val/roc_auc"]), math.nan, math.nan)
    return auc_interval(predictions.labels == 1, predictions.probabilities[:, 1])


def differing_settings(runs: list[RunResult]) -> dict[str, list[str]]:
    """Setting -> its value in each run, for those that are not the same in all."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    settings = [name for name in names if name not in SETTINGS or SETTINGS[name].compared]
    values = {name: [str(run.config.get(name, "-")) for run in runs] for name in settings}
    return {name: texts for name, texts in values.items() if len(set(texts)) > 1}


def markdown(comparison: Comparison) -> str:
    """The tables, which also read well on a terminal."""
    runs = comparison.runs
    metrics = []
    for r in runs:
        auc, f1 = roc_auc(r), r.best.get("val/f1_macro", math.nan)
        epochs = f"{r.best_epoch} of {len(r.rows)}"
        intervals = accuracy_interval(r.predictions.correct), mean_interval(r.predictions.losses), auc
        metrics.append([r.name, epochs, str(len(r.predictions.paths)), *map(show, intervals), f"{f1:.4f}"])
    header = ["run", "best epoch", "val images", "accuracy", "log loss", "ROC AUC", "F1 macro"]
    parts = [markdown_table(header, metrics)]
    if comparison.tests:
        header = [
            "run",
            "images",
            "right only here",
            "wrong only here",
            "accuracy",
            "p",
            "p (Holm)",
            "log loss",
        ]
        rows = [
            [run.name, *test_cells(test, p)]
            for run, test, p in zip(runs[1:], comparison.tests, comparison.p_holm, strict=True)
        ]
        parts += [
            f"Against {runs[0].name}, on the validation images that both have:\n",
            markdown_table(header, rows),
        ]
        differences = differing_settings(runs)
        if differences:
            header = ["setting", *(r.name for r in runs)]
            parts.append(markdown_table(header, [[name, *values] for name, values in differences.items()]))
        else:
            parts.append("No setting differs.\n")
    parts += [f"Note: {note}.\n" for note in comparison.notes]
    return "\n".join([*parts, METHODS + "\n"])


def test_cells(test: PairedTest | None, p_holm: float | None) -> list[str]:
    if test is None:
        return ["0", *("-",) * 6]
    return [
        *(str(count) for count in test[:3]),
        show(test.accuracy, "+.4f"),
        f"{test.p:.3g}",
        f"{p_holm:.3g}",
        show(test.log_loss, "+.4f"),
    ]


def show(interval: Interval | None, form: str = ".4f") -> str:
    if interval is None:
        return "-"
    value, low, high = (format(number, form) for number in interval)
    return f"{value} (no interval)" if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def write_csv(path: Path, comparison: Comparison) -> None:
    """One row for each run: every figure of the tables in full precision, and the settings that differ."""
    differences = differing_settings(comparison.runs)
    rows = []
    tests = [None, *comparison.tests]
    for i, (run, test, p) in enumerate(
        zip(comparison.runs, tests, [None, *comparison.p_holm], strict=True)
    ):
        row: dict[str, object] = {"run": run.name, "folder": str(run.folder), "best_epoch": run.best_epoch}
        row |= {"epochs": len(run.rows), "num_images": len(run.predictions.paths)}
        row |= columns("accuracy", accuracy_interval(run.predictions.correct))
        row |= columns("log_loss", mean_interval(run.predictions.losses))
        row |= columns("roc_auc", roc_auc(run)) | {"f1_macro": run.best.get("val/f1_macro")}
        row |= {"shared_images": test and test.num_images}
        row |= {"gained": test and test.gained, "lost": test and test.lost}
        row |= {"mcnemar_p": test and test.p, "mcnemar_p_holm": p}
        row |= columns("accuracy_difference", test and test.accuracy)
        row |= columns("log_loss_difference", test and test.log_loss)
        rows.append(row | {f"setting_{name}": values[i] for name, values in differences.items()})
    write_table(path, rows)


def columns(name: str, interval: Interval | None) -> dict[str, object]:
    value, low, high = interval or (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
