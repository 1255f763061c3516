"""The end of a process: exit code, who prints the error, and the status that the run keeps."""

import signal
from pathlib import Path

import pytest
from train_data import linear_model, make_data, make_run

from serve.contract.errors import UserError
from train.distributed import Ranks
from train.engine import shutdown
from train.engine.run import TrainingRun
from train.engine.shutdown import exit_with_code, recorded_status, reports_error
from train.runs.directory import read_status
from train.runs.history import History
from train.signals import EXIT_CODE, Preempted, StopRequest
from train.tracking.base import NullTracker


@pytest.mark.parametrize(
    ("local_rank", "stopped", "prints"),
    [(0, False, True), (0, True, True), (1, True, False), (1, False, True)],
    ids=["the first", "the first though stopped", "another that is stopped", "another that is alone"],
)
def test_an_error_is_printed_once_a_machine_and_by_a_rank_that_has_it_alone(
    local_rank: int, stopped: bool, prints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "ALONE_SECONDS", 0.1)
    stop = StopRequest()
    stop.received = signal.SIGTERM if stopped else 0
    assert reports_error(Ranks(local_rank, local_rank, 2, 2), stop) is prints


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("--lr"), 2), (FloatingPointError("--lr"), 2), (Preempted(), EXIT_CODE)]
    + [(KeyboardInterrupt(), EXIT_CODE)],
    ids=repr,
)
def test_the_exit_code_is_the_kind_of_the_end(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_with_code(Ranks(), StopRequest()):
        raise error
    assert ended.value.code == code
    assert ("error: --lr" in capsys.readouterr().err) == (code == 2)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_with_code(Ranks(), StopRequest()):
        raise ZeroDivisionError


class Recorder(NullTracker):
    status = ""

    def end(self, status: str) -> None:
        self.status = status


def run_of(tmp_path: Path, epochs_done: int) -> TrainingRun:
    config, data = make_data(tmp_path, epochs=3)
    return make_run(config, data, linear_model(), history=History(epochs_done, 1))


@pytest.mark.parametrize(("epochs_done", "status"), [(3, "FINISHED"), (2, "KILLED")])
def test_a_run_that_ends_well_is_finished_unless_stop_after_ended_it(
    epochs_done: int, status: str, tmp_path: Path
) -> None:
    tracker = Recorder()
    assert read_status(tmp_path) == ""
    with recorded_status(run_of(tmp_path, epochs_done), tmp_path, tracker, StopRequest()):
        assert read_status(tmp_path) == "RUNNING"
    assert read_status(tmp_path) == tracker.status == status


@pytest.mark.parametrize(
    ("error", "lost_peer", "status"),
    [(Preempted, False, "KILLED"), (KeyboardInterrupt, True, "FAILED"), (ValueError, False, "FAILED")],
)
def test_a_run_that_a_signal_or_an_error_ends_has_the_status_of_that(
    error: type[BaseException], lost_peer: bool, status: str, tmp_path: Path
) -> None:
    tracker, stop = Recorder(), StopRequest()
    stop.lost_peer = lost_peer
    with pytest.raises(error), recorded_status(run_of(tmp_path, 3), tmp_path, tracker, stop):
        raise error
    assert read_status(tmp_path) == tracker.status == status


def test_other_ranks_write_no_status(tmp_path: Path) -> None:
    run = run_of(tmp_path, 3)
    run.ranks = Ranks(1, 1, 2, 2)
    with recorded_status(run, tmp_path, NullTracker(), StopRequest()):
        pass
    assert read_status(tmp_path) == ""
