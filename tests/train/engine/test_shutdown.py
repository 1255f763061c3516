"""The end of a process: exit code, who prints the error, and the status that the run keeps."""

import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import agent, fork
from train_data import linear_model, make_data, make_run

from serve.contract.errors import UserError
from train.distributed import Ranks
from train.engine import shutdown
from train.engine.run import TrainingRun
from train.engine.shutdown import exit_with_code, recorded_status, reports_error
from train.main import main
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


def test_a_full_disk_is_one_line_that_names_the_file_and_the_next_start_may_succeed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest()
    stop.began, stop.advice = True, lambda: "resume with: torchrun"
    with pytest.raises(SystemExit) as ended, exit_with_code(Ranks(), stop):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/config.yaml")
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert "No space left on device: 'runs/a/config.yaml'; make room" in printed
    assert "then resume with: torchrun" in printed


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EACCES, "denied")], ids=repr)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), exit_with_code(Ranks(), StopRequest()):
        raise error


def main_of_a_rank(error: Exception) -> None:
    """Train on a rank where rank 1 has an error, and nccl's teardown waits for ever."""
    from train import main as module
    from train.distributed import sum_over_ranks

    def train(config: object, ranks: Ranks, *_: object) -> None:
        if ranks.rank == 1:
            raise error
        sum_over_ranks(torch.zeros(1))

    module.train = train  # type: ignore[assignment]
    dist.destroy_process_group = threading.Event().wait  # type: ignore[assignment]
    shutdown.ALONE_SECONDS = 0.1
    sys.argv = ["train/main.py", "--data", "images", "--device", "cpu"]
    main()


@pytest.mark.parametrize(("error", "code"), [(ZeroDivisionError("cause"), 1), (UserError("cause"), 2)])
def test_one_rank_with_an_error_ends_with_it_although_the_group_cannot_end(
    error: Exception, code: int, tmp_path: Path
) -> None:
    store, variables = agent(2)
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    recorded = tmp_path / "error.json"
    variables[1]["TORCHELASTIC_ERROR_FILE"] = str(recorded)
    ranks = [
        fork(main_of_a_rank, error, cwd=tmp_path, log=log, environment=own)
        for log, own in zip(logs, variables, strict=True)
    ]
    for rank in ranks:
        rank.join(60)
    printed = [log.read_text() for log in logs]
    assert [rank.exitcode for rank in ranks] == [1, code], printed
    assert "rank 0 lost contact" in printed[0]
    if code == 1:
        assert "Traceback" in printed[1]
        assert "ZeroDivisionError: cause" in printed[1]
        assert "ZeroDivisionError: cause" in json.loads(recorded.read_text())["message"]["message"]
    else:
        assert "error (rank 1): cause" in printed[1]
    del store


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["on a GPU", "on the CPU", "in cuBLAS"],
)
def test_out_of_memory_is_exit_code_2_that_names_the_settings(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object) -> None:
        raise error

    monkeypatch.setattr("train.main.train", train)
    monkeypatch.setattr("train.main.configure", lambda *_: None)
    monkeypatch.setattr(StopRequest, "install", lambda self: None)
    monkeypatch.setattr(sys, "argv", ["train/main.py", "--data", "images", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert all(part in printed for part in ("--batch-size 128", "--accumulation 1", str(error)[:40]))
    assert len(printed.splitlines()) == 1


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
