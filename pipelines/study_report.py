"""Report of a sweep: a table of its trials, study.csv, and figures of history and importance."""

from pathlib import Path

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from pipelines.study import Plan, finished
from train.evaluation.figures import save_figure, sweep_history, sweep_importance
from train.evaluation.tables import check_replaceable, markdown_table, write_table

ENOUGH_FOR_IMPORTANCE = 10  # complete trials; with fewer, chance decides
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise a UserError when the report would replace files of other origin."""
    figures = dict.fromkeys((folder / "history.png", folder / "importance.png"), "")
    check_replaceable({folder / "study.csv": '"trial","run","state",', **figures}, overwrite)


def write_report(plan: Plan, study: optuna.Study) -> list[Path]:
    """Write study.csv and the figures that there are enough trials for; return their paths."""
    trials = finished(study)
    if not trials:
        return []
    written = [plan.folder / "study.csv"]
    write_table(written[0], [_row(plan, trial) for trial in trials])
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        written.append(plan.folder / "history.png")
        done = TrialState.COMPLETE
        points = [(t.number, t.value, t.state == done) for t in trials if t.value is not None]
        save_figure(sweep_history(points, plan.metric, plan.sign), written[-1])
    varied = any(len({repr(trial.params.get(name)) for trial in complete}) > 1 for name in plan.space)
    if len(complete) >= ENOUGH_FOR_IMPORTANCE and varied:
        written.append(plan.folder / "importance.png")
        # fANOVA, not Optuna's default: with 12 trials that one ranked a setting without effect first
        importances = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        save_figure(sweep_importance(importances, plan.metric, len(complete)), written[-1])
    return written


def summary(plan: Plan, study: optuna.Study) -> str:
    """Return a Markdown table: the best trials first, then those ended early, then failures."""
    order = list(STATES)
    trials = sorted(finished(study), key=lambda t: (order.index(t.state), -plan.sign * (t.value or 0)))
    names = ["run", "state", plan.metric, "best_epoch", "epochs", *plan.space]
    rows = [_row(plan, trial) for trial in trials]
    return markdown_table(names, [[_short(row[name]) for name in names] for row in rows])


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
