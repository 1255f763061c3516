"""The trainer: epochs, snapshots and stops of real runs."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from train_data import CPU, ONE, make_data

from serve.contract.errors import UserError
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.sampler import Key
from train.distributed import Ranks
from train.engine import trainer
from train.engine.build import build_run
from train.engine.loop import EpochProgress, train_one_epoch
from train.engine.run import TrainingRun
from train.engine.trainer import Trainer
from train.runs.history import History
from train.runs.snapshots import Position
from train.signals import Preempted, StopRequest
from train.tracking.base import MetricsFile


def new_run(tmp_path: Path, **changes: object) -> TrainingRun:
    fixed = {"pixel_cache": "off", "precision": "fp32", "channels_last": True}  # else chosen by timing
    config, data = make_data(tmp_path, **fixed, **changes)
    return build_run(config, data, None, ONE, CPU, 0, print)


def make_trainer(tmp_path: Path, run: TrainingRun) -> Trainer:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    return Trainer(run, folder, MetricsFile(folder / "metrics.jsonl", 0), StopRequest(), print)


def test_retuning_begins_at_its_start_though_a_resume_cut_the_epoch_before_it_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with fewer --epochs than the interrupted run had."""
    run = new_run(tmp_path, epochs=1, retune_epochs=1)
    run.history = History(1, 1, {"val/accuracy": 0.0, "val/log_loss_calibrated": 9.0})
    run.position = Position(step=2, sums=[[1.0, 1.0]], skipped=[0, 0, 0])
    first_steps: list[int] = []

    def recorded(
        run: TrainingRun, progress: EpochProgress, after_step: Callable[[], None]
    ) -> dict[str, float]:
        first_steps.append(progress.step)
        return train_one_epoch(run, progress, after_step)

    monkeypatch.setattr(trainer, "train_one_epoch", recorded)
    make_trainer(tmp_path, run).fit()
    assert first_steps == [0]
    assert run.history.retuned == 1


def test_files_that_are_lost_in_the_last_validation_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = make_trainer(tmp_path, new_run(tmp_path, epochs=1, max_bad=0.05))
    evaluate = trainer.evaluate

    def vanish(run: TrainingRun, after_batch: Callable[[], object]) -> object:
        for path in run.data.val.paths:
            (run.data.val.root / path).unlink()
        return evaluate(run, after_batch)

    monkeypatch.setattr(trainer, "evaluate", vanish)
    with pytest.raises(UserError, match=r"--max-bad 0.05"):
        ends.fit()
    listed = (tmp_path / "run" / "bad_files.csv").read_text()
    assert all(path in listed for path in ends.run.data.val.paths)


@pytest.mark.parametrize("late", [2, 3], ids=["between steps", "within a step"])
def test_a_run_that_waits_for_a_batch_stops_with_a_snapshot_of_its_last_step(
    late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"accumulation": 2, "batch_size": 4, "epochs": 1}
    waits = make_trainer(tmp_path, new_run(tmp_path, **settings))
    batches = Loader.__call__

    def slow(loader: Loader, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """Batches of which one does not come until somebody has waited for it."""
        for number, batch in enumerate(batches(loader, keys)):
            if number == late:
                waits.stop.received = signal.SIGTERM
                loader.while_waiting()
                raise AssertionError("the wait was not ended")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__call__", slow)
        with pytest.raises(Preempted):
            waits.fit()
    snapshot = load_checkpoint(tmp_path / "run" / "checkpoints" / "epoch-000000-step-00000001.pt")
    stops = make_trainer(tmp_path / "again", new_run(tmp_path, **settings))

    def stop_after_one() -> None:
        stops.stop.received = signal.SIGTERM

    monkeypatch.setattr(stops.profiler, "step", stop_after_one)
    with pytest.raises(Preempted):
        stops.fit()
    other = load_checkpoint(tmp_path / "again" / "run" / "checkpoints" / "epoch-000000-step-00000001.pt")
    assert all(torch.equal(value, other["model"][name]) for name, value in snapshot["model"].items())


def test_a_rank_of_several_leaves_the_others_when_its_batch_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = make_trainer(tmp_path, new_run(tmp_path))
    waits.run.ranks = Ranks(1, 1, 2, 2)

    def late(run: TrainingRun, *_: object) -> dict[str, float]:
        run.train_loader.while_waiting()  # no signal
        waits.stop.received, waits.stop.since = signal.SIGTERM, time.monotonic()
        run.train_loader.while_waiting()  # the batch may still come
        waits.stop.since -= trainer.LATE_BATCH_SECONDS
        run.val_loader.while_waiting()
        raise AssertionError("the wait was not ended")

    monkeypatch.setattr(trainer, "train_one_epoch", late)
    with pytest.raises(KeyboardInterrupt):
        waits.fit()


def test_a_loader_process_that_was_killed_is_an_error_that_names_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(trainer, "train_one_epoch", killed)
    monkeypatch.setattr(Loader, "exit_codes", lambda self: [-signal.SIGKILL])
    with pytest.raises(ValueError, match=r"--num-workers.*--batch-size"):
        make_trainer(tmp_path, new_run(tmp_path)).fit()


def test_a_resumed_run_that_cannot_be_compiled_on_its_machine_is_an_error_that_names_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without a C compiler. A new run has tried it before its first step."""

    def failed(*_: object) -> None:
        raise TorchDynamoException("no C compiler")

    monkeypatch.setattr(trainer, "train_one_epoch", failed)
    with pytest.raises(UserError, match=r"simple_cnn cannot be compiled.*no C compiler.*--compile false"):
        make_trainer(tmp_path, new_run(tmp_path)).fit()


def test_a_best_checkpoint_that_cannot_be_written_to_the_end_is_an_error(tmp_path: Path) -> None:
    run = new_run(tmp_path, epochs=1)
    run.history = History(1, 1, {"val/accuracy": 0.5, "val/log_loss_calibrated": 0.7})
    full_disk = make_trainer(tmp_path, run)

    def full() -> None:
        raise OSError(28, "No space left on device")

    full_disk.snapshots.write({}, full)
    with pytest.raises(ValueError, match=rf"No space left on device.*{tmp_path}"):
        full_disk.fit()


def test_the_tracker_has_the_best_epoch_as_soon_as_it_is_done(tmp_path: Path) -> None:
    class Recorder(MetricsFile):
        def log_best(self, epoch: int, values: dict[str, float]) -> None:
            assert self.rows[-1]["epoch"] == epoch
            logged.append((epoch, values["val/accuracy"]))

    logged: list[tuple[int, float]] = []
    run = new_run(tmp_path, epochs=2, optimizer="adamw")
    tracked = make_trainer(tmp_path, run)
    tracked.tracker = Recorder(tmp_path / "run" / "metrics.jsonl", 0)
    tracked.fit()
    assert logged[0][0] == 1
    assert logged[-1] == (run.history.best_epoch, run.history.best["val/accuracy"])


def test_the_best_checkpoint_stays_that_of_the_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = History.update

    def worse_and_worse(self: History, metrics: dict[str, float], config: TrainConfig) -> bool:
        return update(self, metrics | {"val/accuracy": 1 / (self.epochs_done + 1)}, config)

    monkeypatch.setattr(History, "update", worse_and_worse)
    make_trainer(tmp_path, new_run(tmp_path, epochs=3, optimizer="adamw")).fit()
    checkpoints = tmp_path / "run" / "checkpoints"
    epochs = [load_checkpoint(checkpoints / name)["epoch"] for name in ("best.pt", "last.pt")]
    assert epochs == [1, 3]


def test_bad_files_are_not_written_anew_without_a_lost_file(tmp_path: Path) -> None:
    run = new_run(tmp_path, epochs=1)
    make_trainer(tmp_path, run).fit()
    assert not (tmp_path / "run" / "bad_files.csv").exists(), "the run's start writes it"
