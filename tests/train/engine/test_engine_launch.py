"""A GPU that waits for the host is found, from injected times."""

import pytest
from train_data import CPU

import train.engine.launch as module
from train.engine.launch import LaunchTimes, check_launching, launch_advice, seconds_of


@pytest.mark.parametrize(("host", "device"), [(0.010, 0.020), (0.010, 0.010), (0.0105, 0.010)])
def test_a_device_that_is_busy_gets_no_advice(host: float, device: float) -> None:
    assert launch_advice(LaunchTimes(host, device)) == ""


def test_the_advice_names_the_share_in_which_the_device_is_busy_and_the_flags_that_raise_it() -> None:
    found = launch_advice(LaunchTimes(0.040, 0.010))
    for part in ("40.0 ms", "10.0 ms", "25%", "--accumulation", "--batch-size", "--lr", "--compile auto"):
        assert part in found


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
    check_launching(lambda: steps.append(1), CPU, lines.append)
    assert steps == [1], "the first step allocates, and is not timed"
    assert bool(lines) == (host > device)
