"""Profile of some training steps: a trace for Perfetto or chrome://tracing, and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function, schedule

WAIT = WARM_UP = 2  # steps before those that are counted: allocation, kernel selection, the profiler's own
PREFIX = "step/"
PHASES = ("data", "forward", "backward", "update")


def phase(name: str) -> record_function:
    """Name a part of the step in the trace, as `with phase("forward"):`; it costs microseconds."""
    assert name in PHASES
    return record_function(PREFIX + name)


class StepProfiler:
    """Records `steps` steps of one epoch, once; with 0 it does nothing."""

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.steps, self.folder = steps, folder
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self.done, self.warned = not steps, False
        self.profile: profile | None = None

    def start(self) -> None:
        """Begin an epoch."""
        if self.done:
            return
        timing = schedule(wait=WAIT, warmup=WARM_UP, active=self.steps, repeat=1)
        self.profile = profile(activities=self.activities, schedule=timing, on_trace_ready=self._write)
        self.profile.start()

    def step(self) -> None:
        """End a training step."""
        if self.profile is not None:
            self.profile.step()
            if self.done:
                self.stop()

    def stop(self) -> None:
        """End an epoch; warn once if it had too few steps."""
        if self.profile is None:
            return
        stopped, self.profile = self.profile, None
        stopped.stop()
        if not self.done and not self.warned:
            self.warned = True
            print(
                f"warning: --profile {self.steps} needs {WAIT + WARM_UP + self.steps} steps of one epoch, "
                f"and there were {stopped.step_num}: nothing is written",
                flush=True,
            )

    def _write(self, recorded: profile) -> None:
        if self.done or recorded.step_num < WAIT + WARM_UP + self.steps:  # stopped too early
            return
        self.done = True
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json.gz"))
        events = recorded.key_averages()
        parts = table(events, self.steps)
        order = "self_cuda_time_total" if len(self.activities) > 1 else "self_cpu_time_total"
        operators = events.table(sort_by=order, row_limit=25)
        (self.folder / "profile.md").write_text(f"{parts}\n```\n{operators}\n```\n", encoding="utf-8")
        print(f"profile of {self.steps} steps: {self.folder}\n{parts}", flush=True)


def table(events: Sequence[Any], steps: int) -> str:
    """Return milliseconds (of the host, which may wait for a GPU) and share of each part of a step."""
    # on a GPU each part has a second event, of the device, whose host time is 0
    host = [event for event in events if event.device_type == DeviceType.CPU]
    seen = {event.key: event.cpu_time_total / 1000 / steps for event in host}
    step = sum(value for key, value in seen.items() if key.startswith("ProfilerStep"))
    parts = {name: seen.get(PREFIX + name, 0.0) for name in PHASES}
    rows = {**parts, "other": max(0.0, step - sum(parts.values())), "step": step}
    lines = [f"| {name} | {value:.2f} | {value / step:.1%} |" for name, value in rows.items()]
    return "\n".join(["| part of a step | ms | share |", "|---|---|---|", *lines, ""])
