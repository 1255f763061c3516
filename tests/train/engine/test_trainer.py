"""The epochs of a run, with nothing of what trains in them replaced."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from train_data import CPU, ONE, make_data

from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.sampler import Key
from train.distributed import Ranks
from train.engine import trainer as epochs
from train.engine.build import Job, assemble
from train.engine.loop import Running, train_one_epoch
from train.engine.trainer import Epochs, epoch_line
from train.runs.history import History
from train.runs.snapshots import Position
from train.signals import Preempted, StopRequest
from train.tracking.base import MetricsFile


def make_job(tmp_path: Path, **changes: object) -> Job:
    fixed = {"pixel_cache": "off", "precision": "fp32", "channels_last": True}  # else chosen by timing
    config, data = make_data(tmp_path, **fixed, **changes)
    return assemble(config, data, None, ONE, CPU, 0, print)


def make_epochs(tmp_path: Path, job: Job) -> Epochs:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    return Epochs(job, folder, MetricsFile(folder / "metrics.jsonl", 0), StopRequest(), print)


def test_retuning_begins_at_its_start_though_a_resume_cut_the_epoch_before_it_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with fewer --epochs than the interrupted run had."""
    job = make_job(tmp_path, epochs=1, retune_epochs=1)
    job.history = History(1, 1, {"val/accuracy": 0.0, "val/log_loss_calibrated": 9.0})
    job.position = Position(step=2, sums=[[1.0, 1.0]], skipped=[0, 0, 0])
    began: list[int] = []

    def noted(*arguments: object) -> dict[str, float]:
        began.extend(a.step for a in arguments if isinstance(a, Running))
        return train_one_epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(epochs, "train_one_epoch", noted)
    make_epochs(tmp_path, job).run()
    assert began == [0]
    assert job.history.retuned == 1


class Slow:
    """Batches of which one does not come until somebody has waited for it."""

    def __init__(self, loader: Loader, late: int, told: StopRequest):
        self.loader, self.late, self.told = loader, late, told
        self.lost: dict[str, str] = {}
        self.images = loader.images
        self.while_waiting: Callable[[], None] = lambda: None
        self.exit_codes = loader.exit_codes

    def __call__(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        for number, batch in enumerate(self.loader(batches)):
            if number == self.late:
                self.told.received = signal.SIGTERM
                self.while_waiting()
                raise AssertionError("waited on")
            yield batch


@pytest.mark.parametrize("late", [2, 3], ids=["between steps", "within a step"])
def test_a_run_that_waits_for_a_batch_stops_with_a_snapshot_of_its_last_step(
    late: int, tmp_path: Path
) -> None:
    job = make_job(tmp_path, accumulation=2, batch_size=4, epochs=1)
    running = make_epochs(tmp_path, job)
    slow = Slow(running.train_loader, late, running.stop)
    slow.while_waiting = running.train_loader.while_waiting
    running.train_loader = slow  # type: ignore[assignment]
    with pytest.raises(Preempted):
        running.run()
    snapshot = load_checkpoint(tmp_path / "run" / "checkpoints" / "epoch-000000-step-00000001.pt")
    again = make_job(tmp_path, accumulation=2, batch_size=4, epochs=1)
    first = make_epochs(tmp_path / "again", again)

    def stop_after_one() -> None:
        first.stop.received = signal.SIGTERM

    first.profiler.step = stop_after_one  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        first.run()
    other = load_checkpoint(tmp_path / "again" / "run" / "checkpoints" / "epoch-000000-step-00000001.pt")
    assert all(torch.equal(value, other["model"][name]) for name, value in snapshot["model"].items())


def test_a_rank_of_several_leaves_the_others_when_its_batch_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = make_epochs(tmp_path, make_job(tmp_path))
    running.job.ranks = Ranks(1, 1, 2, 2)
    running.train_loader.while_waiting()  # nobody told it
    running.stop.received, running.stop.since = signal.SIGTERM, time.monotonic()
    running.train_loader.while_waiting()  # the batch may still come
    running.stop.since -= epochs.LATE_BATCH_SECONDS
    with pytest.raises(KeyboardInterrupt):
        running.val_loader.while_waiting()


def test_a_loader_process_that_was_killed_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(epochs, "train_one_epoch", killed)
    monkeypatch.setattr(Loader, "exit_codes", lambda self: [-signal.SIGKILL])
    with pytest.raises(ValueError, match=r"memory runs out"):
        make_epochs(tmp_path, make_job(tmp_path)).run()


def test_a_best_checkpoint_that_cannot_be_written_to_the_end_is_an_error(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1)
    job.history = History(1, 1, {"val/accuracy": 0.5, "val/log_loss_calibrated": 0.7})
    running = make_epochs(tmp_path, job)

    def full() -> None:
        raise OSError(28, "No space left on device")

    running.snapshots.owed = full
    with pytest.raises(ValueError, match=r"best checkpoint cannot be written: .*No space.* Make room"):
        running.run()


@pytest.mark.parametrize(("calibrate", "shown"), [(True, "0.2500"), (False, "0.5000")])
def test_an_epochs_line_shows_the_log_loss_that_decides_which_is_best(calibrate: bool, shown: str) -> None:
    values = {"val/accuracy": 0.9, "val/log_loss": 0.5, "val/log_loss_calibrated": 0.25, "lr": 0.1}
    line = epoch_line(
        History(1, 1), TrainConfig(calibrate=calibrate), values | {"images_per_second": 9.0}, True
    )
    assert [number for number in ("0.2500", "0.5000") if number in line] == [shown]


def test_the_tracker_has_the_best_epoch_as_soon_as_it_is_done(tmp_path: Path) -> None:
    class Noting(MetricsFile):
        def log_best(self, epoch: int, values: dict[str, float]) -> None:
            assert self.rows[-1]["epoch"] == epoch
            noted.append((epoch, values["val/accuracy"]))

    noted: list[tuple[int, float]] = []
    job = make_job(tmp_path, epochs=2, optimizer="adamw")
    running = make_epochs(tmp_path, job)
    running.tracker = Noting(tmp_path / "run" / "metrics.jsonl", 0)
    running.run()
    assert noted[0][0] == 1
    assert noted[-1] == (job.history.best_epoch, job.history.best["val/accuracy"])


def test_the_best_checkpoint_stays_that_of_the_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = History.update

    def worse_and_worse(self: History, metrics: dict[str, float], config: TrainConfig) -> bool:
        return update(self, metrics | {"val/accuracy": 1 / (self.epochs_done + 1)}, config)

    monkeypatch.setattr(History, "update", worse_and_worse)
    job = make_job(tmp_path, epochs=3, optimizer="adamw")
    running = make_epochs(tmp_path, job)
    running.run()
    checkpoints = tmp_path / "run" / "checkpoints"
    epochs = [load_checkpoint(checkpoints / name)["epoch"] for name in ("best.pt", "last.pt")]
    assert epochs == [1, 3]
