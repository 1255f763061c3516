"""Who says what ended a run, and how it ends when all is well."""

import signal
from pathlib import Path

import numpy as np
import pytest

from train import main
from train.config import TrainConfig
from train.distributed import Ranks
from train.runs.history import History
from train.signals import StopRequest


@pytest.mark.parametrize(
    ("local_rank", "told", "says"),
    [(0, False, True), (0, True, True), (1, True, False), (1, False, True)],
    ids=["the first", "the first though told to end", "another that is ended", "another that is alone"],
)
def test_an_error_is_said_once_a_machine_and_by_a_rank_that_has_it_alone(
    local_rank: int, told: bool, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "ALONE_SECONDS", 0.1)
    stop = StopRequest()
    stop.received = signal.SIGTERM if told else 0
    assert main.is_mine_to_say(Ranks(local_rank, local_rank, 2, 2), stop) is says


def test_the_last_lines_have_the_interval_and_a_command_that_a_shell_takes() -> None:
    best = {"val/accuracy": 0.9, "val/log_loss": 0.3, "val/log_loss_calibrated": 0.25, "val/f1_macro": 0.5}
    even, odd = np.arange(100) % 2, np.arange(100) // 85
    printed = main.summary(History(3, 2, best), TrainConfig(epochs=3), even, str(Path("runs") / "my pets"))
    assert "val/accuracy 0.9000 (95 % interval 0.8256 to 0.9448, 100 validation images)" in printed
    assert printed.endswith("--run 'runs/my pets'")
    assert "stopped" not in printed
    assert "warning" not in printed
    partly = main.summary(History(3, 2, best), TrainConfig(epochs=4), odd, "runs/a")
    assert partly.startswith("stopped after 3 of 4 epochs")
    assert "always naming the largest class would be right for 0.8500 of them" in partly
    assert "Train it longer" in partly
    few = main.summary(
        History(3, 2, best | {"val/accuracy": 1.0}), TrainConfig(epochs=3), even[:2], "runs/a"
    )
    assert "No model could be, on so few: validate on more" in few
    assert "Train it longer" not in few
