"""Launch time: whether a GPU waits for the host in every step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.distributed import Log, max_over_ranks

HOLD = 3.0  # times the seconds of launching a step, in which the device is kept busy before it
CYCLES = 2e9  # a second, no fewer than any GPU's
LAUNCH_BOUND = 1.1  # times the device's seconds that launching takes; less may be noise

Step = Callable[[], None]


@dataclass(frozen=True)
class LaunchTimes:
    """Seconds of one training step, of the slowest rank."""

    host: float
    """In which the host launches its kernels."""
    device: float
    """In which the device runs them when it need not wait for the host."""


def seconds_of(step: Step, device: torch.device) -> float:
    """Return how long a step takes on this rank, until the device has done it."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_launch(step: Step, device: torch.device) -> LaunchTimes:
    """Return how long launching a step and running it take; call the step once before.

    The device is kept busy while the host launches the step that is timed: events around kernels that were
    launched late would measure the host. Every rank must call it; the step must not communicate.
    """
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    host = time.perf_counter() - started
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # nothing public keeps a device busy for a given time
    torch.cuda._sleep(int(HOLD * host * CYCLES))  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    end.synchronize()
    return LaunchTimes(max_over_ranks(host), max_over_ranks(start.elapsed_time(end) / 1000))


def check_launching(step: Step, device: torch.device, log: Log) -> None:
    """Print what to do where launching is the limit. As `time_launch`."""
    step()
    if advice := launch_advice(time_launch(step, device)):
        log(advice)


def launch_advice(times: LaunchTimes) -> str:
    """Return a line for the user where launching is the limit; "" where the device is."""
    if times.host <= LAUNCH_BOUND * times.device:
        return ""
    return (
        f"warning: the device is busy {times.device / times.host:.0%} of the time: the host launches a "
        f"step in {1000 * times.host:.1f} ms, which takes the device {1000 * times.device:.1f} ms. Fewer "
        "--accumulation steps, fewer devices or --compile auto keep the result; a larger --batch-size and "
        "a higher --lr are another training"
    )
