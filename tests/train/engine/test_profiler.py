"""A profile accounts for the whole step, and is written once."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from train.engine.profiler import PHASES, WAIT, WARM_UP, StepProfiler, phase, table

CPU = torch.device("cpu")


def steps(profiler: StepProfiler, count: int) -> None:
    profiler.start()
    x = torch.rand(300, 300)
    for _ in range(count):
        for name in PHASES:
            with phase(name):
                time.sleep(0.05 if name == "backward" else 0.005)
                x = x @ x / x.norm()
        profiler.step()
    profiler.stop()


def test_the_table_says_where_the_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps(StepProfiler(3, tmp_path / "profile", CPU), 10)
    text = (tmp_path / "profile" / "profile.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ")][1:]
    milliseconds = {name.strip(): float(ms) for name, ms, _ in rows}
    assert milliseconds["backward"] > 2 * milliseconds["forward"] > 0
    parts = sum(milliseconds[name] for name in (*PHASES, "other"))
    assert parts == pytest.approx(milliseconds["step"], rel=0.02)
    assert "aten::mm" in text
    assert capsys.readouterr().out.startswith(f"profile of 3 steps: {tmp_path}")
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    named = [e["name"] for e in trace["traceEvents"] if str(e.get("name")).startswith("step/")]
    assert named.count("step/forward") == 3


def test_it_is_written_once_and_not_at_all_for_too_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiler = StepProfiler(3, tmp_path / "profile", CPU)
    for _ in range(2):
        steps(profiler, WAIT + WARM_UP)
    assert not (tmp_path / "profile" / "profile.md").exists()
    assert capsys.readouterr().out.count("--profile 3 needs 7 steps of one epoch, and there were 4") == 1
    steps(profiler, 10)
    written = (tmp_path / "profile" / "trace.json.gz").stat().st_mtime_ns
    steps(profiler, 10)
    assert (tmp_path / "profile" / "trace.json.gz").stat().st_mtime_ns == written


def test_the_devices_events_of_a_part_do_not_hide_the_hosts() -> None:
    names = ("ProfilerStep*", *(f"step/{name}" for name in PHASES))
    events = [
        SimpleNamespace(key=name, cpu_time_total=time, device_type=device)
        for device, time in ((DeviceType.CPU, 8000.0), (DeviceType.CUDA, 0.0))
        for name in names
    ]
    assert "| backward | 4.00 | 100.0% |" in table(events, 2)


def test_without_steps_it_does_nothing(tmp_path: Path) -> None:
    steps(StepProfiler(0, tmp_path / "profile", CPU), 5)
    assert not list(tmp_path.iterdir())
