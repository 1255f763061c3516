"""Loader processes: two for stored validation images, as many for training as a measurement asks for."""

import math
from pathlib import Path
from typing import Any

import pytest
from train_data import CPU, ONE, make_data

import train.engine.loaders as module
from train.data.device_cache import DeviceLoader
from train.data.loader import Loader
from train.data.sampler import EpochPlan
from train.engine.loaders import build_loaders, fit_to_step


def silent(_: str) -> None: ...


def loaders(tmp_path: Path, processes: int = 6, **changes: Any) -> Any:
    config, data = make_data(tmp_path, **{"num_workers": -1} | changes)
    return config, data, *build_loaders(config, config, data, ONE, CPU, processes, silent)


@pytest.mark.parametrize(("mode", "validating"), [("on", 2), ("off", 6)])
def test_stored_validation_images_need_two_processes(mode: str, validating: int, tmp_path: Path) -> None:
    _, _, train, val = loaders(tmp_path, pixel_cache=mode)
    assert (train.num_workers, val.num_workers) == (6, validating)


def test_the_devices_memory_needs_none(tmp_path: Path) -> None:
    _, _, train, val = loaders(tmp_path, pixel_cache="device")
    assert isinstance(train, DeviceLoader)
    assert isinstance(val, DeviceLoader)
    assert train.exit_codes() + val.exit_codes() == []


@pytest.mark.parametrize(
    ("load", "step", "changes", "expected"),
    [
        (0.08, 0.08, {}, 2),
        (0.20, 0.08, {}, 4),
        (0.01, 0.08, {}, 1),
        (9.00, 0.08, {}, 6),
        (0.08, math.nan, {}, 5),
        (0.08, 0.08, {"num_workers": 4}, 6),
    ],
    ids=["as fast", "slower", "much faster", "much slower", "unknown step", "given"],
)
def test_training_gets_the_processes_that_its_steps_need(
    load: float,
    step: float,
    changes: dict[str, Any],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "time_loading", lambda *_: load)
    monkeypatch.setattr(module, "USUAL_WORKERS", 5)
    config, data, train, _ = loaders(tmp_path, **changes)
    lines: list[str] = []
    fitted = fit_to_step(train, config, EpochPlan(len(data.train), 4, 0), step, lines.append)
    assert isinstance(fitted, Loader)
    assert fitted.num_workers == expected
    assert bool(lines) == (not math.isnan(step) and not changes)


def test_two_batches_are_loaded_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data, train, _ = loaders(tmp_path)
    loaded: list[Any] = []
    original = type(train.dataset).__getitem__
    monkeypatch.setattr(
        type(train.dataset), "__getitem__", lambda self, keys: loaded.append(keys) or original(self, keys)
    )
    plan = EpochPlan(len(data.train), 4, 0)
    fit_to_step(train, config, plan, 10.0, silent)
    assert loaded == list(plan.batches(0))[:2]
