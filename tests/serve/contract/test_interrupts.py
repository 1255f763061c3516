"""Scoring and exporting end in one line, with their unfinished files removed."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY

from serve.contract.interrupts import end_on_signal

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_a_signal_ends_a_command_in_one_line_and_a_second_one_does_not_interrupt_its_end(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    end_on_signal("; again")
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    signal.raise_signal(number)
    assert ended.value.code == code
    assert capfd.readouterr().err == f"stopped by {number.name}; again\n"


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_on_signal()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_command_that_still_imports_ends_at_once() -> None:
    program = "import os, signal\nfrom serve.contract.interrupts import end_on_signal\n"
    program += "end_on_signal(importing=True)\n"
    program += "try:\n    os.kill(os.getpid(), signal.SIGINT)\nfinally:\n    print('traceback')"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n")
