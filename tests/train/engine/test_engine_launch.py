"""A GPU that waits for the host: found from injected times, with the batch and the rate that mend it."""

import pytest
from train_data import CPU

import train.engine.launch as module
from train.config import TrainConfig
from train.distributed import Ranks
from train.engine.launch import LaunchTimes, check_launching, launch_advice, seconds_of

FOUR = Ranks(world_size=4, local_world_size=4)


def advice(host: float, device: float, **changes: object) -> str:
    settings = {"optimizer": "sgd", "lr": 0.1, "batch_size": 128, **changes}
    return launch_advice(LaunchTimes(host, device), TrainConfig(**settings), FOUR)  # type: ignore[arg-type]


@pytest.mark.parametrize(("host", "device"), [(0.010, 0.020), (0.010, 0.010), (0.0105, 0.010)])
def test_a_device_that_is_busy_gets_no_advice(host: float, device: float) -> None:
    assert advice(host, device) == ""


@pytest.mark.parametrize(
    ("optimizer", "host", "batch_size", "lr"),
    [
        ("sgd", 0.012, 256, "0.2"),
        ("sgd", 0.035, 512, "0.4"),
        ("adamw", 0.035, 512, "0.2"),
        ("muon", 0.035, 512, "0.2"),
        ("muon", 0.041, 1024, "0.28"),
    ],
)
def test_the_advice_names_a_batch_that_keeps_the_device_busy_and_its_rate(
    optimizer: str, host: float, batch_size: int, lr: str
) -> None:
    found = advice(host, 0.010, optimizer=optimizer)
    assert f"--batch-size {batch_size} " in found
    assert f"({batch_size // 4} images" in found
    assert f"--lr {lr} " in found


@pytest.mark.parametrize(("accumulation", "fewer"), [(8, 2), (2, 1), (6, 1), (12, 3)])
def test_fewer_accumulation_steps_come_first(accumulation: int, fewer: int) -> None:
    """They keep the result."""
    found = advice(0.035, 0.010, accumulation=accumulation)
    assert f"--accumulation {fewer} " in found
    assert "--lr" not in found


def test_a_step_is_timed_on_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.5])
    monkeypatch.setattr("train.engine.launch.time.perf_counter", lambda: next(now))
    done: list[int] = []
    assert seconds_of(lambda: done.append(1), CPU) == 2.5
    assert done == [1]


@pytest.mark.parametrize(("host", "device"), [(0.03, 0.01), (0.01, 0.03)])
def test_advice_is_printed_where_launching_is_the_limit(
    host: float, device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(module, "time_launch", lambda step, device_: LaunchTimes(host, device))
    lines: list[str] = []
    config = TrainConfig(optimizer="sgd", lr=0.1)
    check_launching(lambda: steps.append(1), config, FOUR, CPU, lines.append)
    assert steps == [1], "the first step allocates, and is not timed"
    assert bool(lines) == (host > device)
