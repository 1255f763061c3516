"""Sweeps: every trial a process and a run, early ends, failures, and resuming after any end.

Where the training itself does not matter, a stand-in for train/main.py writes metrics.jsonl by a script.
"""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
from conftest import REPOSITORY, code_of
from forked import fork
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState
from train_data import flat_set

from pipelines import launch, study, sweep, trial
from pipelines.study_report import study_table, write_study_report
from train import compare
from train.config import TrainConfig

# Trial N has the accuracies of the Nth entry; a text is an error, null stands still until it is stopped.
STAND_IN = """
import json, pathlib, signal, sys, time
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if "=" in argument)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
resumed = pathlib.Path(flags.get("resume", "none"))
folder = resumed if "resume" in flags else pathlib.Path(flags["output"]) / flags["name"]
folder.mkdir(parents=True, exist_ok="resume" in flags)
(folder / "checkpoints").mkdir(exist_ok=True)
with open(folder / "arguments", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
values = json.loads(pathlib.Path("script.json").read_text())[int(folder.name.split("-")[1])]
if isinstance(values, str):
    sys.exit(values)
for epoch, value in list(enumerate(values, 1))[done:]:
    while value is None:
        if pathlib.Path("go").exists():
            value = 0.9
        time.sleep(0.02)
    with open(metrics, "a") as file:
        row = {"epoch": epoch, "val/accuracy": value, "val/log_loss_calibrated": 1 - value}
        file.write(json.dumps(row) + chr(10))
    (folder / "checkpoints" / "last.pt").touch()
"""
SPACE = "lr: {low: 1.0e-4, high: 1.0e-1, log: true}\naugmentation: {low: 0, high: 1}\n"
SMALL = ["--model", "simple_cnn", "--image-size", "16", "--batch-size", "4", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    flat_set(tmp_path / "images", 10)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "main.py").write_text(STAND_IN)
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "mixes.yaml").write_text("mixup: {choices: [0.0, 0.2]}\n")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    mlflow.set_tracking_uri(None)


def arguments(trials: int, *own: str, track: bool = False, epochs: int = 3) -> list[str]:
    return [
        *("--trials", str(trials), "--study", "s", "--data", "images", "--space", "space.yaml", *own, "--"),
        *(*SMALL, "--epochs", str(epochs), "--track", str(track).lower()),
    ]


def script(*values: Any) -> None:
    Path("script.json").write_text(json.dumps(values))


def rows(folder: str = "runs/s") -> list[dict[str, str]]:
    with open(f"{folder}/study.csv", newline="") as file:
        return list(csv.DictReader(file))


def states(folder: str = "runs/s") -> list[str]:
    return [row["state"] for row in rows(folder)]


def load(folder: str = "runs/s") -> optuna.Study:
    return optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/study.db")


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.02)


def test_trials_are_runs_with_the_sampled_values(capsys: pytest.CaptureFixture[str]) -> None:
    script([0.5, 0.8, 0.7], [0.5, 0.6, 0.6])
    assert sweep.main(arguments(2)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"val/accuracy 0\.8000 .*\b2\b.*1/2", printed)
    assert "| s-0 | complete | 0.8 " in printed
    first, second = rows()
    assert (first["val/accuracy"], first["best_epoch"], first["epochs"]) == ("0.8", "2", "3")
    assert (second["run"], second["val/accuracy"]) == ("s-1", "0.6")
    given = json.loads(Path("runs/s/s-0/arguments").read_text())
    assert f"--lr={first['lr']}" in given
    assert {"--data=images", "--output=runs/s", "--name=s-0"} <= set(given)
    assert any(flag.startswith("--crop-scale=") for flag in given)
    assert Path("runs/s/history.png").is_file()
    assert not Path("runs/s/importance.png").exists()


def test_log_loss_is_minimised() -> None:
    script([0.5, 0.8, 0.7], [0.5, 0.6, 0.6])
    assert sweep.main([*arguments(2), "--best-by", "log_loss"]) == 0
    assert [row["val/log_loss_calibrated"][:4] for row in rows()] == ["0.19", "0.4"]
    assert load().best_trial.number == 0


def test_one_worse_than_the_median_is_stopped_and_not_before_its_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = [0.5, 0.6, 0.7, 0.8, 0.9]
    script(good, good, [0.1, 0.2, 0.3, None, None], [0.1, 0.9, 0.9, 0.9, 0.9])
    assert sweep.main(arguments(4, "--startup", "2", "--prune-after", "2", epochs=5)) == 0
    assert states() == ["complete", "complete", "ended early", "complete"]
    assert rows()[2]["epochs"] == "2"
    assert load().trials[2].state == TrialState.PRUNED
    assert re.search(r"early.*\b2\b.*4/4|early.*\b2\b.*3/4", capsys.readouterr().out)


def test_a_trial_that_has_done_all_its_epochs_is_complete() -> None:
    script([0.9, 0.9], [0.95, 0.1], [0.0, 0.0])
    assert sweep.main(arguments(3, "--startup", "1", "--prune-after", "2", epochs=2)) == 0
    assert states() == ["complete"] * 3


def test_a_sweep_in_two_parts_is_the_sweep_in_one() -> None:
    """The same values, and no trial twice."""
    script(*([0.5, 0.6, 0.6 + 0.1 * (i % 3)] for i in range(5)))
    few = ("--startup", "2")  # the values after them depend on what came before
    assert sweep.main([*arguments(5, *few), "--output", "whole"]) == 0
    assert sweep.main([*arguments(3, *few), "--output", "parts"]) == 0
    assert sweep.main([*arguments(5, *few), "--output", "parts"]) == 0
    assert sweep.main([*arguments(5, *few), "--output", "parts"]) == 0
    assert [row["lr"] for row in rows("parts/s")] == [row["lr"] for row in rows("whole/s")]
    assert len({row["lr"] for row in rows("parts/s")}) == 5
    assert len(Path("parts/s/s-0/arguments").read_text().splitlines()) == 1


def test_a_model_of_the_default_space_without_weights_is_an_error_with_the_way_out() -> None:
    flags = ["--trials", "1", "--study", "s", "--data", "images", "--", "--weights", "default"]
    with pytest.raises(ValueError, match=r"simple_cnn.*--model.*--space"):
        sweep.parse_plan(flags)


def test_importance_is_shown_once_there_are_enough_trials(tmp_path: Path) -> None:
    plan = sweep.parse_plan(arguments(12))
    plan.folder.mkdir(parents=True)
    made = study.open_study(plan)
    for number in range(12):
        asked = made.ask(plan.space)
        made.tell(asked, 1 - abs(asked.params["augmentation"] - 0.4))
        written = [path.name for path in write_study_report(plan, made)]
        assert ("importance.png" in written) == (number >= 9)
    assert study_table(plan, made).count("complete") == 12


def test_failed_trials_do_not_stop_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    script("error: one", "error: two", [0.5, 0.6, 0.7], "error: one", "error: one", [0.1, 0.2, 0.3])
    assert sweep.main(arguments(6)) == 0
    assert states() == ["failed", "failed", "complete", "failed", "failed", "complete"]
    assert rows()[1]["error"] == "error: two"
    printed = capsys.readouterr().out
    assert "error: two" in printed
    assert "2/6" in printed


def test_three_in_a_row_with_the_same_error_do(capsys: pytest.CaptureFixture[str]) -> None:
    script([0.5, 0.6, 0.7], *(f"error: --lr {i} is out of memory" for i in range(4)))
    assert sweep.main(arguments(9)) == 1
    assert states() == ["complete", "failed", "failed", "failed"]
    error = capsys.readouterr().err
    assert "error: --lr 2 is out of memory" in error
    assert "runs/s/s-3.log" in error


def test_the_exit_code_is_1_when_no_trial_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    script("error: one", [])
    assert sweep.main(arguments(2)) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert "val/accuracy" in rows()[1]["error"]


def sweep_stand_ins(arguments: list[str]) -> int:
    launch.ROOT = Path.cwd()
    return sweep.main(arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_resumes_with_its_last_trial(number: signal.Signals) -> None:
    script([0.5, 0.6, 0.7], [0.5, None, 0.8], [], [0.1, 0.2, 0.3])
    process = fork(sweep_stand_ins, arguments(3), cwd=Path.cwd(), log=Path("log"))
    wait_for(Path("runs/s/s-1/checkpoints/last.pt"))
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + signal.SIGTERM)
    Path("go").touch()
    assert sweep.main(arguments(3)) == 0
    assert [row["run"] for row in rows()] == ["s-0", "s-1", "s-3"]
    assert states() == ["complete"] * 3
    first, again = (json.loads(line) for line in Path("runs/s/s-1/arguments").read_text().splitlines())
    assert f"--lr={rows()[1]['lr']}" in first
    assert again == ["--resume=runs/s/s-1"]
    assert rows()[1]["val/accuracy"] == "0.9"
    interrupted = load().trials[1]
    assert interrupted.state == TrialState.FAIL
    assert interrupted.params == load().trials[2].params


def test_one_interrupted_before_its_first_checkpoint_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    script([None, 0.6], [0.4, 0.5], [0.5, 0.7])

    def ctrl_c(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_trial", ctrl_c)
    assert sweep.main(arguments(2, epochs=2)) == 143
    monkeypatch.setattr(sweep, "run_trial", trial.run_trial)
    assert sweep.main(arguments(2, epochs=2)) == 0
    assert [row["run"] for row in rows()] == ["s-1", "s-2"]
    assert load().trials[0].params == load().trials[1].params


def test_sighup_stops_a_sweep_as_sigterm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(*_: Any) -> bool:
        signal.raise_signal(signal.SIGHUP)
        raise AssertionError("not stopped")

    script([0.5])
    monkeypatch.setattr(sweep, "run_trial", hang_up)
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        assert sweep.main(arguments(1, epochs=1)) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_without_file_locks_a_study_can_be_run_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with study.locked(tmp_path):
        assert "Function not implemented" in capsys.readouterr().out


def test_two_sweeps_of_one_study_do_not_run_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "LOCK_SECONDS", 0.3)
    Path("runs/s").mkdir(parents=True)
    with study.locked(Path("runs/s")):
        assert sweep.main(arguments(1)) == 2
    assert "runs/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--weight-decay", "0.3"], "weight_decay None -> 0.3"),
        (["--best-by", "log_loss"], "best_by 'accuracy' -> 'log_loss'"),
        (["--output", "elsewhere"], "folder "),
    ],
)
def test_a_study_keeps_its_settings(
    change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script([0.5, 0.6, 0.7])
    storage = ["--storage", "sqlite:///study.db"]
    assert sweep.main(arguments(1, *storage)) == 0
    assert sweep.main([*arguments(2, *storage), *change]) == 2
    error = capsys.readouterr().err
    assert message in error


def test_a_study_can_be_resumed_with_other_settings_of_operation() -> None:
    """In a study that an earlier version has stored with all settings, too."""
    script([0.5, 0.6, 0.7], [0.5, 0.6, 0.8])
    assert sweep.main(arguments(1)) == 0
    stored = load()
    stored.set_user_attr("settings", stored.user_attrs["settings"] | {"hang_minutes": 10.0})
    assert sweep.main([*arguments(2), "--hang-minutes", "30", "--pixel-cache", "off"]) == 0
    assert states() == ["complete"] * 2


@pytest.mark.parametrize(
    ("own", "rest", "message"),
    [
        ([], ["--epoch", "3"], "--epoch"),
        ([], ["--epochs", "0"], "--epochs 0 "),
        ([], ["--lr", "0.1"], "lr"),
        ([], ["--name", "x"], "--name "),
        ([], ["--resume", "x"], "--resume "),
        ([], ["--stop-after", "1"], "--stop-after "),
        ([], ["--data", "x"], "--data "),
        ([], ["--model", "simple_cnm"], "--model 'simple_cnm'"),
        ([], ["--model", "alexnet"], "alexnet cannot take images of 16 pixels"),
        (["--nproc_per_node", "3"], [], "--batch-size 4 "),
        (["--nproc_per_node", "4"], ["--mixup", "0.2"], "--batch-size 4 "),
        (["--space", "mixes.yaml"], ["--batch-size", "5"], "--batch-size 5 "),
        (["--trials", "0"], [], "--trials 0 "),
        (["--startup", "0"], [], "--startup 0 "),
        (["--study", "a/b"], [], "'a/b'"),
        (["--study", ""], [], "--study"),
        (["--data", "nowhere"], [], "--data 'nowhere'"),
        ([], ["--output", "s3://bucket/runs"], "--output s3://bucket/runs"),
        (["--space", "none.yaml"], [], "none.yaml"),
        (["--storage", "nosuch://x"], [], "--storage nosuch://x"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_trial(
    own: list[str], rest: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(sweep.main, *arguments(1, *own), *rest) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert "trial" not in printed.out


@pytest.mark.parametrize(("mixup", "processes"), [(0.2, 1), (0.0, 2)])
def test_a_range_of_batch_sizes_must_not_hold_any_that_cannot_be_divided(
    mixup: float, processes: int
) -> None:
    config = TrainConfig(mixup=mixup)
    sweep.check_batches(TrainConfig(), {"batch_size": IntDistribution(2, 8)}, [], 1)
    sweep.check_batches(config, {"batch_size": CategoricalDistribution([2, 8])}, [], processes)
    with pytest.raises(ValueError, match=r"--batch-size 3\b"):
        sweep.check_batches(config, {"batch_size": IntDistribution(2, 8)}, [], processes)


def test_a_study_of_someone_else_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    other = optuna.create_study(study_name="s", storage="sqlite:///other.db")
    other.tell(other.ask(), 1.0)
    assert sweep.main(arguments(1, "--storage", "sqlite:///other.db")) == 2
    assert "other.db" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["study.csv", "history.png"])
def test_a_file_of_the_users_in_the_studys_folder_is_kept(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/s").mkdir(parents=True)
    Path("runs/s", name).write_text("mine")
    assert sweep.main(arguments(1)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("runs/s", name).read_text() == "mine"


def test_no_secret_of_the_data_is_in_the_studys_settings() -> None:
    url = "https://user:SECRET@host/set.tar?X-Amz-Date=1&X-Amz-Signature=SECRET"
    settings = [
        sweep.parse_plan(arguments(1, "--data", url.replace("Date=1", f"Date={n}"))) for n in (1, 2)
    ]
    assert settings[0].settings() == settings[1].settings()
    assert settings[0].settings()["data"] == "https://host/set.tar"
    assert "SECRET" in settings[0].config.data


def test_a_sweep_does_not_need_mlflow_to_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    script([0.5, 0.6, 0.7])
    assert sweep.main(arguments(1, track=True)) == 0
    assert "warning: " in capsys.readouterr().out


@pytest.mark.slow
def test_real_trials_with_one_killed_and_resumed_are_children_of_one_mlflow_run() -> None:
    command = [sys.executable, str(REPOSITORY / "pipelines" / "sweep.py")]
    command += arguments(2, track=True, epochs=2)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    with open("printed", "w") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
        wait_for(Path("runs/s/s-1/checkpoints/last.pt"), 300)
        process.kill()
        process.wait()
    client = mlflow.MlflowClient(f"sqlite:///{os.getcwd()}/mlflow.db")
    tags = {"mlflow.parentRunId": load().user_attrs["mlflow_run"]}
    client.create_run("1", run_name="lost with its machine", tags=tags)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trial 1 was interrupted" in again.stdout
    assert [row["run"] for row in rows()] == ["s-0", "s-1"]
    assert states() == ["complete"] * 2

    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert runs.pop("lost with its machine").info.status == "KILLED"
    assert sorted(runs) == ["s", "s-0", "s-1"]  # three: the resumed trial is one run
    parent = runs.pop("s")
    for row in rows():
        child = runs[row["run"]]
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["sweep.trial"] == row["trial"]
        assert child.data.params["lr"] == row["lr"]
        assert len(client.get_metric_history(child.info.run_id, "val/accuracy")) >= 2
    best = max(rows(), key=lambda row: float(row["val/accuracy"]))
    assert parent.info.status == "FINISHED"
    assert parent.data.params["epochs"] == "2"
    assert parent.data.tags["trials.complete"] == "2"
    assert float(parent.data.tags["best.val/accuracy"]) == float(best["val/accuracy"])
    assert {m.step for m in client.get_metric_history(parent.info.run_id, "val/accuracy")} == {0, 2}
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["history.png", "study.csv"]
    assert compare.main([f"runs/s/{name}" for name in sorted(runs)]) == 0
