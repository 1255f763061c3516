"""Loader processes: two for stored validation images, none for images in the device's memory."""

from pathlib import Path
from typing import Any

import pytest
from train_data import CPU, ONE, make_data

from train.data.device_cache import DeviceLoader
from train.data.loader import Loader
from train.engine.loaders import build_loaders


def silent(_: str) -> None: ...


def loaders(tmp_path: Path, **changes: Any) -> tuple[Loader, Loader]:
    config, data = make_data(tmp_path, **changes)
    return build_loaders(config, config, data, ONE, CPU, 6, silent)


@pytest.mark.parametrize(("mode", "validating"), [("on", 2), ("off", 6)])
def test_stored_validation_images_need_two_processes(mode: str, validating: int, tmp_path: Path) -> None:
    train, val = loaders(tmp_path, pixel_cache=mode)
    assert (train.num_workers, val.num_workers) == (6, validating)


def test_the_devices_memory_needs_none(tmp_path: Path) -> None:
    train, val = loaders(tmp_path, pixel_cache="device")
    assert isinstance(train, DeviceLoader)
    assert isinstance(val, DeviceLoader)
    assert train.num_workers + val.num_workers == 0
    assert train.exit_codes() + val.exit_codes() == []
