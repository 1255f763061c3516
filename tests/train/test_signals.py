"""A signal is recorded while the trainer polls for it, and ends the process elsewhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from torch.utils.data import DataLoader

from train import signals as signals
from train.signals import STOPS, StopRequest, Unbreakable, ignore_stops


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in STOPS}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_where_nobody_polls_a_signal_ends_the_process(stop: StopRequest, number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    for other in STOPS:  # a second one does not interrupt the end of the run
        signal.raise_signal(other)
    assert stop.received == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_where_somebody_polls_it_is_recorded_also_when_it_comes_twice(
    stop: StopRequest, number: int
) -> None:
    """Ctrl-C reaches a rank from the terminal and from torchrun."""
    stop.polled = True
    signal.raise_signal(number)
    signal.raise_signal(number)
    assert stop.received == number


def test_a_user_who_insists_is_obeyed(stop: StopRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SECONDS_TO_INSIST", 0.0)
    stop.polled = True
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_rank_that_is_ended_for_anothers_sake_got_no_request_to_stop(
    stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sends the same signal when it gets one and when a rank has died."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for ranks, requested in ((1, True), (2, False)):
        here = len(psutil.Process(os.getppid()).children())
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1 if ranks == 1 else here + 1))
        stop.__init__()  # type: ignore[misc]
        stop.polled = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested is requested


def test_nohup_keeps_its_word(stop: StopRequest) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    stop.install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_nobody_who_stops_reading_stops_a_run() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        with pytest.raises(BrokenPipeError):
            print("lost", file=pipe, flush=True)
        print("lost", file=Unbreakable(pipe), flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_loader_processes_ignore_the_signal() -> None:
    others = set(psutil.Process().children())  # such as multiprocessing's resource tracker
    loader = DataLoader(range(8), num_workers=1, worker_init_fn=ignore_stops, persistent_workers=True)
    batches = iter(loader)
    assert int(next(batches)) == 0
    (worker,) = set(psutil.Process().children()) - others
    for number in STOPS:
        worker.send_signal(number)
    assert [int(batch) for batch in batches] == list(range(1, 8))


AGENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""
RANK = """
import time
from train.signals import StopRequest, stop_with_agent
StopRequest().install()
stop_with_agent()
open("ready", "w").close()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("torchrun", [True, False])
def test_a_rank_does_not_outlive_torchrun_but_outlives_a_shell(torchrun: bool, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environment |= {"TORCHELASTIC_RUN_ID": "none"} if torchrun else {}
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, RANK],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert agent.stdout is not None
    rank = psutil.Process(int(agent.stdout.readline()))
    while not (tmp_path / "ready").exists():
        assert rank.is_running()
        time.sleep(0.05)
    agent.kill()
    agent.wait()
    try:
        rank.wait(20 if torchrun else 0.5)
        assert torchrun, "it ended with its shell"
    except psutil.TimeoutExpired:
        assert not torchrun, "it trains on beside a new start"
        rank.kill()
