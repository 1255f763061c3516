"""Where the time of a training step goes: a trace for Perfetto or chrome://tracing, and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

WAIT, WARM_UP = (
    2,
    2,
)  # steps before those that are counted: allocation, kernel selection, the profiler's own
PREFIX = "step/"
PHASES = ("data", "forward", "backward", "update")
COMMUNICATION = ("gloo:", "nccl:", "c10d::allreduce", "c10d::broadcast")


def phase(name: str) -> record_function:
    """`with phase("forward"):` names a part of the step in the trace; it costs microseconds."""
    assert name in PHASES
    return record_function(PREFIX + name)


class StepProfiler:
    """Records some steps of rank 0; with `steps` 0 it does nothing."""

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.steps, self.folder, self.device = steps, folder, device
        self.done = self.told = False
        self.taken = 0
        self.profile: profile | None = None

    def start(self) -> None:
        if not self.steps or self.done or self.profile is not None:
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.taken = 0
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=self.steps, repeat=1),
            on_trace_ready=self._write,
        )
        self.profile.start()

    def step(self) -> None:
        """Call after each training step."""
        if self.profile is not None:
            self.taken += 1
            self.profile.step()
            if self.done:
                self.stop()

    def stop(self) -> None:
        """Also when the epoch had too few steps: nothing is written then, and that is said once."""
        if self.profile is not None:
            profile, self.profile = self.profile, None
            profile.stop()
            if not self.done and not self.told:
                self.told = True
                needed = WAIT + WARM_UP + self.steps
                print(
                    f"warning: --profile {self.steps} needs {needed} steps of one epoch, and there were "
                    f"{self.taken}: nothing is written",
                    flush=True,
                )

    def _write(self, recorded: profile) -> None:
        if self.done or self.taken < WAIT + WARM_UP + self.steps:
            return
        self.done = True
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json.gz"))
        events = recorded.key_averages()
        text = table(events, self.steps, self.device) + "\n" + _operators(events, self.device)
        (self.folder / "profile.md").write_text(text, encoding="utf-8")
        print(
            f"profile of {self.steps} steps: {self.folder}\n{table(events, self.steps, self.device)}",
            flush=True,
        )


def table(events: Sequence[Any], steps: int, device: torch.device) -> str:
    """Milliseconds and share of each part of a step, as Markdown.

    All-reduces run beside the backward pass, in threads of their own: their line counts time that is in
    others as well, and how much of it is hidden shows in the trace.
    """
    step = _milliseconds([e for e in events if e.key.startswith("ProfilerStep")], steps)
    parts = {name: _milliseconds([e for e in events if e.key == PREFIX + name], steps) for name in PHASES}
    rest = {"other": max(0.0, step - sum(parts.values()))}
    communication = [e for e in events if e.key.startswith(COMMUNICATION)]
    beside = {"communication (beside backward)": _milliseconds(communication, steps)}
    lines = ["| part of a step | ms | share |", "|---|---|---|"]
    for name, milliseconds in {**parts, **rest, **beside, "step": step}.items():
        lines.append(f"| {name} | {milliseconds:.2f} | {milliseconds / step:.1%} |")
    note = (
        ""
        if device.type == "cpu"
        else "\nTimes of the host: on a GPU, what it waited, not what kernels took.\n"
    )
    return "\n".join(lines) + "\n" + note


def _milliseconds(events: Sequence[Any], steps: int) -> float:
    return sum(float(event.cpu_time_total) for event in events) / 1000 / steps


def _operators(events: Any, device: torch.device) -> str:
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return f"```\n{events.table(sort_by=key, row_limit=25)}\n```\n"
