"""Studies: values that do not repeat, interrupted trials that are resumed once, the best so far."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from pipelines.space import Space
from pipelines.study import ParentRun, Plan, ended_trials, recover, sampler
from train.config import TrainConfig


def plan(folder: Path = Path(), **changes: Any) -> Plan:
    space: Space = {"lr": FloatDistribution(1e-4, 0.1, log=True)}
    return Plan("s", 9, folder, "", 1, 5, 1, [], TrainConfig(**changes), space)


def test_each_trial_has_values_of_its_own_that_are_reproducible() -> None:
    def sampled(seed: int) -> list[float]:
        of_seed = plan(seed=seed)
        studies = [optuna.create_study(sampler=sampler(of_seed, number)) for number in range(4)]
        return [study.ask(of_seed.space).params["lr"] for study in studies]

    assert sampled(0) == sampled(0)
    assert len({*sampled(0), *sampled(1)}) == 8


@pytest.mark.parametrize("queued_already", [False, True])
def test_an_interrupted_trial_is_resumed_once_and_not_counted_twice(
    tmp_path: Path, queued_already: bool
) -> None:
    study, of_folder = optuna.create_study(), plan(tmp_path)
    study.tell(study.ask(of_folder.space), state=TrialState.FAIL)
    trial = study.ask(of_folder.space)
    trial.set_user_attr("run", "s-1")
    (tmp_path / "s-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "s-1" / "checkpoints" / "last.pt").touch()
    attributes = {"continues": 1, "run": "s-1"}
    if queued_already:  # by a sweep that was killed right then
        study.enqueue_trial(trial.params, attributes)
    for _ in range(2):
        recover(study, of_folder)
        states = [t.state for t in study.get_trials()]
        assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]
    assert study.get_trials()[2].user_attrs == attributes
    assert [t.number for t in ended_trials(study)] == [0]


@pytest.mark.parametrize(
    ("best_by", "metric", "best"),
    [
        ("accuracy", "val/accuracy", [0.5, 0.7, 0.7]),
        ("log_loss", "val/log_loss_calibrated", [0.5, 0.5, 0.2]),
    ],
)
def test_mlflow_gets_each_value_and_the_best_so_far(best_by: str, metric: str, best: list[float]) -> None:
    judged = plan(best_by=best_by)
    study = optuna.create_study(direction="maximize" if judged.sign > 0 else "minimize")
    for value in (0.5, 0.7, 0.2):
        study.tell(study.ask(judged.space), value)
    points = ParentRun(judged, study).points()
    assert [value for name, value, *_ in points if name == metric] == [0.5, 0.7, 0.2]
    assert [value for name, value, *_ in points if name == f"best/{metric}"] == best
