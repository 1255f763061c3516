"""Compare finished runs: metrics with intervals, paired tests, settings that differ, curves.

    python train/compare.py runs/baseline runs/other ... --output comparison
    python train/compare.py runs/baseline runs/other --promote MODEL

The other runs are tested against the first one. Writes comparison.md, comparison.csv and curves.png.
--promote moves the alias champion of a registered MLflow model to its challenger, if the challenger's run
is one of those given and not worse than the champion: see train/runs/promotion.py.

Exit code: 0 compared, 2 an error, or a run that shares no validation image with the first; with --promote 0
promoted, 1 not promoted, 2 an error.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, not train/
    from serve.contract.interrupts import end_on_signal

    end_on_signal(importing=True)

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch")

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from serve.contract.command_line import CommandLine, Number
from serve.contract.urls import redact
from train.config import SETTINGS
from train.evaluation.charts import comparison_curves, save_figure
from train.evaluation.significance import Interval, PairedTest, accuracy_interval, holm, mean_interval
from train.evaluation.tables import check_reports_replaceable, markdown_table, write_table
from train.runs.results import RunResult, paired, read_run

METHODS = """\
Accuracy and log loss are those of the probabilities that are served (val_predictions.csv), calibrated if
set. Intervals are of 95 %: Wilson's for accuracy, Student's of the mean loss for log loss, DeLong's for
ROC AUC, Tango's for a difference of accuracy, Student's of the paired differences for a difference of
log loss. p is McNemar's exact test; p (Holm) is corrected for the number of runs tested. Differences are
run minus reference. Each run's best epoch and temperature were chosen on these very images, which
flatters all of them a little; what another seed would give is not in the intervals."""

HEADINGS = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "log_loss": "log loss",
    "roc_auc": "ROC AUC",
    "f1_macro": "F1 macro",
}


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("train/compare.py", __doc__, "RUN RUN ... [--output FOLDER] [options]")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run directory written by train/main.py")
    add("--output", type=Path, default=Path("comparison"), help="folder of the comparison")
    add("--overwrite", action="store_true", help="replace reports of other origin in --output")
    add("--promote", default="", metavar="MODEL", help="registered MLflow model whose champion may change")
    add(
        "--margin",
        type=Number(float, 0, 1),
        default=0.01,
        help="--promote: loss of accuracy that is to be ruled out",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (UserError, OSError) as error:
        print(f"error: {redact(error)}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    starts = {"comparison.md": "# Comparison of ", "comparison.csv": '"run","folder",', "curves.png": ""}
    check_reports_replaceable({args.output / name: start for name, start in starts.items()}, args.overwrite)
    runs = read_runs(args.runs)
    reference, tests = runs[0], paired_tests(runs)
    differences = differing_settings(runs)
    rows = [summarize(run, test) for run, test in zip(runs, tests, strict=True)]
    for i, row in enumerate(rows):
        row |= {f"setting_{name}": values[i] for name, values in differences.items()}
    text = markdown(runs, rows, differences)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "comparison.md").write_text(
        f"# Comparison of {len(runs)} runs\n\n{text}\n![curves](curves.png)\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    write_table(args.output / "comparison.csv", rows)
    figure = comparison_curves({run.name: run.rows for run in runs}, [run.best_epoch for run in runs])
    save_figure(figure, args.output / "curves.png")
    print(f"written: {args.output}/comparison.md, comparison.csv, curves.png")
    apart = [run.name for run, test in zip(runs[1:], tests[1:], strict=True) if test is None]
    if apart:
        names = ", ".join(apart)
        print(f"error: no validation image in common with {reference.name}: {names}", file=sys.stderr)
    if args.promote:
        from train.runs.promotion import promote  # a second of mlflow that a comparison does without

        return 0 if promote(args.promote, runs, args.margin) else 1
    return 2 if apart else 0


def read_runs(folders: Sequence[Path]) -> list[RunResult]:
    """Read runs, named by their folder, or by its path where two folders have the same name."""
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"run {str(folders[i])!r} is given twice: give it once")
    names = [folder.name for folder in resolved]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def paired_tests(runs: Sequence[RunResult]) -> list[tuple[PairedTest, float] | None]:
    """Return each run's test against the first one and its p value by Holm's correction.

    None for the first run, and for one that shares no validation image with it.
    """
    tests = [None, *(paired(run.predictions, runs[0].predictions) for run in runs[1:])]
    corrected = iter(holm([test.p for test in tests if test]))
    return [(test, next(corrected)) if test else None for test in tests]


def summarize(run: RunResult, tested: tuple[PairedTest, float] | None) -> dict[str, Any]:
    """Return a run's figures in full precision, a row of comparison.csv; those without a value are None."""
    test, p_holm = tested or (None, None)
    row: dict[str, Any] = {"run": run.name, "folder": str(run.folder), "best_epoch": run.best_epoch}
    row |= {"epochs": len(run.rows), "num_images": len(run.predictions.paths)}
    row |= columns("accuracy", accuracy_interval(run.predictions.correct))
    row |= columns("log_loss", mean_interval(run.predictions.losses))
    row |= columns("roc_auc", run.roc_auc) | {"f1_macro": run.best.get("val/f1_macro")}
    row |= {"top5_accuracy": run.best.get("val/top5_accuracy")}
    row |= {"shared_images": test and test.num_images}
    row |= {"gained": test and test.gained, "lost": test and test.lost}
    row |= {"mcnemar_p": test and test.p, "mcnemar_p_holm": p_holm}
    row |= columns("accuracy_difference", test and test.accuracy)
    return row | columns("log_loss_difference", test and test.log_loss)


def columns(name: str, interval: Interval | None) -> dict[str, Any]:
    value, low, high = interval or (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def differing_settings(runs: Sequence[RunResult]) -> dict[str, list[str]]:
    """Return setting -> its value in each run, for those that differ."""
    settings = [name for name, setting in SETTINGS.items() if not setting.location]
    values = {name: [str(getattr(run.config, name)) for run in runs] for name in settings}
    return {name: texts for name, texts in values.items() if len(set(texts)) > 1}


def markdown(
    runs: Sequence[RunResult],
    rows: Sequence[Mapping[str, Any]],
    differences: Mapping[str, Sequence[str]],
) -> str:
    """Return the tables, which also read well on a terminal, and notes."""
    # top-5 accuracy is of ten classes or more
    measured = [name for name in HEADINGS if any(row[name] is not None for row in rows)]
    header = ["run", "best epoch", "val images", *(HEADINGS[name] for name in measured)]
    cells = [
        [
            *(str(row["run"]), f"{row['best_epoch']} of {row['epochs']}", str(row["num_images"])),
            *(show(row, name) for name in measured),
        ]
        for row in rows
    ]
    parts = [markdown_table(header, cells)]
    if len(runs) > 1:
        header = ["run", "images", "only it is right", "only it is wrong"]
        header += ["accuracy", "p", "p (Holm)", "log loss"]
        cells = [
            [
                *(show(row, name, "") for name in ("run", "shared_images", "gained", "lost")),
                *(show(row, "accuracy_difference", "+.4f"), show(row, "mcnemar_p", ".3g")),
                *(show(row, "mcnemar_p_holm", ".3g"), show(row, "log_loss_difference", "+.4f")),
            ]
            for row in rows[1:]
        ]
        parts += [f"Against {runs[0].name}, on the validation images that both have:\n"]
        parts += [markdown_table(header, cells)]
        if differences:
            header = ["setting", *(run.name for run in runs)]
            parts.append(markdown_table(header, [[name, *values] for name, values in differences.items()]))
        else:
            parts.append("No setting differs.\n")
    parts += [f"Note: {note}.\n" for note in notes(rows, differences)]
    return "\n".join([*parts, METHODS + "\n"])


def show(row: Mapping[str, Any], name: str, form: str = ".4f") -> str:
    """Return the value of a column, with its interval if it has one."""
    value, low, high = (row.get(column) for column in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "-"
    if low is None or high is None:
        return format(value, form)
    if low != low:
        return f"{value:{form}} (no interval)"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def notes(rows: Sequence[Mapping[str, Any]], differences: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what limits the comparison."""
    reference, found = rows[0], []
    for row in rows[1:]:
        if row["shared_images"] is None:
            found.append(f"{row['run']} has no validation image in common with {reference['run']}")
        elif row["shared_images"] < max(row["num_images"], reference["num_images"]):
            found.append(
                f"{row['run']} is tested on the {row['shared_images']} images that its {row['num_images']} "
                f"validation images and the {reference['num_images']} of {reference['run']} have in common"
            )
    if "data" in differences or "val_data" in differences:
        found.append(
            "--data or --val-data differs: images with equal paths below it are taken to be the same"
        )
    return found


if __name__ == "__main__":
    end_on_signal()
    sys.exit(main())
