"""Study of a sweep: its plan, its Optuna storage, its lock and its MLflow run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from pipelines.space import Space
from serve.contract.errors import UserError
from serve.contract.locks import file_lock
from serve.contract.urls import redact
from train.checkpoint import checkpoint_folder
from train.config import SETTINGS, TrainConfig
from train.tracking.parent_run import end_children, log_parent, open_parent

LOCK_SECONDS = 120.0  # longer than a trial takes to end after its sweep was killed
OPERATION = ("hardware", "run and tracking", "fault tolerance")  # groups of settings


@dataclass(frozen=True)
class Plan:
    study: str
    trials: int
    folder: Path
    """Holds the trials' run directories."""
    storage: str
    processes: int
    startup: int
    prune_after: int
    argv: list[str]
    """Flags of train/main.py that all trials share."""
    config: TrainConfig
    """Their settings."""
    space: Space

    @property
    def metric(self) -> str:
        """Name of the metric that decides a run's best epoch."""
        calibrated = self.config.best_by == "log_loss" and self.config.calibrate
        return f"val/{self.config.best_by}{'_calibrated' if calibrated else ''}"

    @property
    def sign(self) -> int:
        """1 when a higher metric is better, else -1."""
        return 1 if self.config.best_by == "accuracy" else -1

    def settings(self) -> dict[str, Any]:
        """Return what may not change within a study, or its trials would not be comparable: not how and
        where they run."""
        config = {
            name: value
            for name, value in self.config.to_dict().items()
            if not (SETTINGS[name].resumable and SETTINGS[name].group in OPERATION)
        }
        config |= {k: redact(v, hidden="") for k, v in config.items() if isinstance(v, str)}
        space = {f"space of {name}": distribution_to_json(d) for name, d in self.space.items()}
        return {**config, **space, "folder": str(self.folder.resolve())}


@contextmanager
def locked(folder: Path) -> Iterator[Sequence[int]]:
    """Let one sweep of a folder run at a time; yields file descriptors for a trial to inherit.

    The lock is free when a killed sweep *and* its last trial have ended.

    Raises:
        UserError: another sweep holds it.
    """
    risk = "two sweeps of this study at once are not noticed, and spoil each other's trials"
    notify = partial(print, flush=True)
    with file_lock(folder / ".lock", risk, notify, LOCK_SECONDS, inherited=True) as file:
        yield [file.fileno()] if file else []


def open_study(plan: Plan) -> optuna.Study:
    """Create or load the study. Raises UserError for unusable storage, or a study of other settings."""
    try:
        study = optuna.create_study(
            study_name=plan.study,
            storage=plan.storage,
            direction="maximize" if plan.sign > 0 else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(plan.startup, plan.prune_after),
        )
    except Exception as error:  # optuna's own and SQLAlchemy's, which share no base
        raise UserError(f"--storage {plan.storage}: {str(error).splitlines()[0]}") from error
    settings, known = plan.settings(), study.user_attrs.get("settings")
    if known is None:
        if study.get_trials(deepcopy=False):
            raise UserError(f"study {plan.study} in {plan.storage} was not made by pipelines/sweep.py")
        study.set_user_attr("settings", settings)
        return study
    fixed = settings.keys() | (known.keys() - SETTINGS.keys())
    names = sorted(name for name in fixed if settings.get(name) != known.get(name))
    if names:
        listed = "; ".join(f"{name} {known.get(name)!r} -> {settings.get(name)!r}" for name in names)
        raise UserError(f"study {plan.study} has other settings ({listed}): use another --study")
    return study


def sampler(plan: Plan, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a trial, seeded by (seed, trial number): a resumed sweep repeats no values."""
    seed = int(np.random.SeedSequence((plan.config.seed, number)).generate_state(1)[0])
    return optuna.samplers.TPESampler(n_startup_trials=plan.startup, seed=seed)


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run can be resumed; it can also in its first epoch."""
    return any(checkpoint_folder(folder).glob("*.pt"))


def recover(study: optuna.Study, plan: Plan) -> None:
    """Mark interrupted trials as failed, and enqueue each once more with the same values.

    The new trial resumes the run of the old one if that has a checkpoint.
    """
    trials = study.get_trials()
    continued = {trial.user_attrs.get("continues") for trial in trials}
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        if trial.number not in continued:  # else killed between the two steps below
            attributes = {"continues": trial.number}
            name = trial.user_attrs.get("run", "")
            if name and has_checkpoint(plan.folder / name):
                attributes["run"] = name
            study.enqueue_trial(trial.params, attributes)
            print(f"trial {trial.number} was interrupted; it is resumed as a new one")
        study.tell(trial.number, state=TrialState.FAIL)


def ended_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that are complete, pruned or failed, without those that were interrupted."""
    trials = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs.get("continues") for trial in trials}
    return [t for t in trials if t.state.is_finished() and t.number not in continued]


class ParentRun:
    """MLflow run of a sweep; what MLflow misses while it does not answer is sent with the next trial."""

    def __init__(self, plan: Plan, study: optuna.Study):
        self.plan, self.study = plan, study
        self.run_id = ""

    def send(self, files: Sequence[Path] = (), status: str = "") -> None:
        """Log the finished trials; `status` ends the run."""
        if not self.plan.config.track:
            return
        try:
            if not self.run_id:
                self._open()
            end_children(self.run_id)
            log_parent(self.run_id, self.points(), self._tags(), files, status)
        except (UserError, ConnectionError) as error:
            print(f"warning: the sweep's run in MLflow is not up to date: {error}", flush=True)

    def _open(self) -> None:
        known = self.study.user_attrs.get("mlflow_run", "")
        fixed = {k: str(v) for k, v in self.plan.settings().items() if k not in self.plan.space}
        self.run_id = open_parent(self.plan.config.experiment, self.plan.study, known, fixed)
        self.study.set_user_attr("mlflow_run", self.run_id)

    def points(self) -> list[tuple[str, float, int, int]]:
        """Return (metric, value, step, milliseconds) of each complete trial's value and of the best so far;
        the step is the trial's number."""
        points: list[tuple[str, float, int, int]] = []
        best = -np.inf
        for trial in ended_trials(self.study):
            if trial.state == TrialState.COMPLETE and trial.value is not None and trial.datetime_complete:
                best = max(best, self.plan.sign * trial.value)
                when = int(trial.datetime_complete.timestamp() * 1000)
                points.append((self.plan.metric, trial.value, trial.number, when))
                points.append((f"best/{self.plan.metric}", self.plan.sign * best, trial.number, when))
        return points

    def _tags(self) -> dict[str, str]:
        """Return numbers of trials and the best values; tags can change when the study is resumed."""
        states = [trial.state for trial in ended_trials(self.study)]
        tags = {"trials": str(len(states))}
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            tags[f"trials.{state.name.lower()}"] = str(states.count(state))
        if TrialState.COMPLETE in states:
            best = self.study.best_trial
            tags |= {"best.run": best.user_attrs["run"], f"best.{self.plan.metric}": str(best.value)}
            tags |= {f"best.{name}": str(value) for name, value in best.params.items()}
        return tags
