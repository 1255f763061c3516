"""Report of a sweep: a table of its trials, study.csv, and figures of history and importance."""

from pathlib import Path

import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from pipelines.study import Plan, ended_trials
from train.evaluation.charts import COLORS, count_along, save_figure
from train.evaluation.tables import check_reports_replaceable, markdown_table, write_table

ENOUGH_FOR_IMPORTANCE = 10  # complete trials; with fewer, chance decides
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise a UserError when the report would replace files of other origin."""
    figures = dict.fromkeys((folder / "history.png", folder / "importance.png"), "")
    check_reports_replaceable({folder / "study.csv": '"trial","run","state",', **figures}, overwrite)


def write_study_report(plan: Plan, study: optuna.Study) -> list[Path]:
    """Write study.csv and the figures that there are enough trials for; return their paths."""
    trials = ended_trials(study)
    if not trials:
        return []
    written = [plan.folder / "study.csv"]
    write_table(written[0], [_row(plan, trial) for trial in trials])
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        written.append(plan.folder / "history.png")
        save_figure(_history(plan, trials), written[-1])
    varied = any(len({repr(trial.params.get(name)) for trial in complete}) > 1 for name in plan.space)
    if len(complete) >= ENOUGH_FOR_IMPORTANCE and varied:
        written.append(plan.folder / "importance.png")
        save_figure(_importance(plan, study, len(complete)), written[-1])
    return written


def study_table(plan: Plan, study: optuna.Study) -> str:
    """Return a Markdown table: the best trials first, then those ended early, then failures."""
    order = list(STATES)
    trials = sorted(ended_trials(study), key=lambda t: (order.index(t.state), -plan.sign * (t.value or 0)))
    names = ["run", "state", plan.metric, "best_epoch", "epochs", *plan.space]
    rows = [_row(plan, trial) for trial in trials]
    return markdown_table(names, [[_short(row[name]) for name in names] for row in rows])


def _history(plan: Plan, trials: list[FrozenTrial]) -> Figure:
    """Draw the trials in order, and the best so far."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    valued = [trial for trial in trials if trial.value is not None]
    complete = [trial for trial in valued if trial.state == TrialState.COMPLETE]
    early = [trial for trial in valued if trial.state != TrialState.COMPLETE]
    for part, color, marker, label in (
        (complete, COLORS[0], "o", "complete"),
        (early, "tab:gray", "x", "ended early, at its last epoch"),
    ):
        numbers, values = [trial.number for trial in part], [trial.value or 0.0 for trial in part]
        if part:
            axes.scatter(numbers, values, color=color, marker=marker, label=label, zorder=2)
    best = plan.sign * np.maximum.accumulate([plan.sign * (trial.value or 0) for trial in complete])
    numbers = [*(trial.number for trial in complete), valued[-1].number]
    axes.step(numbers, [*best, best[-1]], where="post", color=COLORS[1], label="best so far")
    axes.set(ylabel=plan.metric, title=f"{len(valued)} trials")
    count_along(axes, "trial")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _importance(plan: Plan, study: optuna.Study, num_complete: int) -> Figure:
    """Draw how much of the metric's variance each setting explains."""
    # fANOVA, not Optuna's default: with 12 trials that one ranked a setting without effect first
    importances = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(importances)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(importances), list(importances.values()), color=COLORS[0])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    title = f"share of the variance of {plan.metric} (fANOVA, {num_complete} complete trials)"
    axes.set(xlim=(0, 1.1), title=title)
    return figure


def _row(plan: Plan, trial: FrozenTrial) -> dict[str, object]:
    attributes = trial.user_attrs
    return {
        "trial": trial.number,
        "run": attributes.get("run"),
        "state": STATES[trial.state],
        plan.metric: attributes.get("best"),
        "best_epoch": attributes.get("best_epoch"),
        "epochs": attributes.get("epochs"),
        "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
        **{name: trial.params.get(name) for name in plan.space},
        "error": attributes.get("error", ""),
    }


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
