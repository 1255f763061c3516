"""Progress: plain lines in a log, a bar on a terminal, silence on other ranks."""

import sys
from contextlib import closing

import pytest

from train.engine import progress
from train.engine.progress import ProgressBar


def run(enabled: bool = True, total: int = 100) -> None:
    with closing(ProgressBar("epoch 1", total, enabled)) as bar:
        for _ in range(5):
            bar.advance(20)


def test_a_log_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    run()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("epoch 1: 40/100, ")
    assert lines[-1].endswith(" images/s, 0 s left")
    assert "\r" not in captured.out + captured.err


def test_lines_come_every_few_seconds_only(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().out == ""


def test_other_ranks_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(enabled=False)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 1" in captured.err
