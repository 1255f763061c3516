"""Images cut and resized on the device: the boxes and, within a level, the pixels of the CPU's way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import train
from test_cuda_pretended import CUDA, pretended_cuda
from train_data import CPU, ONE, draw, flat_set, make_data, pixel_dataset, settings, train_epochs

import train.data.device_cache as module
from benchmarks.jobs import weights_sha256
from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.device_cache import DeviceLoader, choose_device_cache, why_on_cpu
from train.data.index import Data, prepare_data
from train.data.loader import Loader
from train.data.pixel_cache import open_cache, training_entries, validation_entries
from train.data.sampler import EpochPlan
from train.engine.build import build_run
from train.engine.checks import check_start
from train.engine.retune import retuning_settings
from train.runs.history import History

LEVELS = {"bilinear": 1, "bicubic": 2}


def silent(_: str) -> None: ...


def both(tmp_path: Path, config: TrainConfig, data: Data) -> tuple[Loader, DeviceLoader]:
    """Return the loaders of training images by the CPU and by the device."""
    cache = open_cache(tmp_path / "cache", data.train, training_entries(config), "on", silent)
    assert cache is not None
    dataset = pixel_dataset(data.train, config, ImageAugment(config), cache)
    return Loader(dataset, 0, pin_memory=False), DeviceLoader(dataset, CPU)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "changes",
    [
        {"crop_scale": 0.3},
        {"crop_scale": 0.05, "image_size": 32},
        {"crop_scale": 1.0},
        {"crop_scale": 1.0, "resize_mode": "squash"},
        {"crop_scale": 0.35, "start_size": 8},
        {"crop_scale": 0.5, "resize_mode": "pad"},
    ],
    ids=["crops", "enlarged", "whole", "squashed", "growing", "padded"],
)
def test_images_are_those_of_the_cpu_within_a_level(
    changes: dict[str, Any], interpolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sides that differ, in parts of a batch, half of them flipped."""
    monkeypatch.setattr(module, "CUT", 3 * 64**2)
    config = settings(tmp_path, flip=0.5, interpolation=interpolation, **changes)
    for label, name in enumerate(("cat", "dog")):
        for i in range(8):
            draw(Path(config.data) / f"{name}.{i}.png", label, i, size=(20 + 11 * i, 90 - 9 * i))
    data = prepare_data(config)
    on_cpu, there = both(tmp_path, config, data)
    plan = EpochPlan(len(data.train), 7, 0)
    for epoch in range(config.epochs):
        for a, b in zip(on_cpu(plan.batches(epoch)), there(plan.batches(epoch)), strict=True):
            assert b.images.dtype == torch.uint8
            assert b.images.is_contiguous()
            assert a.images.shape == b.images.shape
            assert int((a.images.int() - b.images.int()).abs().max()) <= LEVELS[interpolation]
            for name in ("labels", "weights", "indices"):
                assert torch.equal(getattr(a, name), getattr(b, name))


def test_validation_images_are_the_very_pixels(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    cache = open_cache(tmp_path / "cache", data.val, validation_entries(config), "on", silent)
    assert cache is not None
    keys = [[(0, i, 1.0) for i in reversed(range(len(data.val)))]]
    dataset = pixel_dataset(data.val, config, None, cache)
    (expected,) = Loader(dataset, 0, pin_memory=False)(keys)
    (batch,) = DeviceLoader(dataset, CPU)(keys)
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.labels, expected.labels)


def test_re_tuning_sees_validations_view_of_the_same_memory(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, crop_scale=0.5, retune_epochs=1)
    on_cpu, there = both(tmp_path, config, data)
    augment = ImageAugment(retuning_settings(config))
    again = there.with_augment(augment)
    assert again.pixels is there.pixels
    plan = EpochPlan(len(data.train), 4, 0)
    for a, b in zip(on_cpu.with_augment(augment)(plan.batches(0)), again(plan.batches(0)), strict=True):
        assert int((a.images.int() - b.images.int()).abs().max()) <= 1


def test_a_pretended_gpu_makes_the_images_and_is_not_waited_for(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, crop_scale=0.35, flip=0.5)
    train, val = (
        open_cache(tmp_path / "cache", images, entries(config), "on", silent)
        for images, entries in ((data.train, training_entries), (data.val, validation_entries))
    )
    assert train is not None
    assert val is not None
    with pretended_cuda() as audit:
        for images, cache, augment in ((data.train, train, ImageAugment(config)), (data.val, val, None)):
            pixels = torch.empty(cache.bytes.size // 3, 3, dtype=torch.uint8, device=CUDA)
            loader = DeviceLoader(pixel_dataset(images, config, augment, cache), CUDA, pixels)
            for batch in loader([[(0, i, 1.0) for i in range(len(images))]]):
                assert batch.to(CUDA).images.device == CUDA
                assert batch.images.shape == (len(images), 16, 16, 3)
                assert batch.indices.device == CPU, "colour jitter computes its numbers from them"
    assert not audit.waits


MB = 1_000_000


QUIET = {"deterministic", "pixel_cache"}  # settings that choose, so that no note explains it


@pytest.mark.parametrize(
    ("changes", "device", "needed", "free", "chosen"),
    [
        ({}, CUDA, (100, 20), 1000, [True, True]),
        ({}, CUDA, (190, 20), 1000, [True, False]),
        ({}, CUDA, (300, 20), 1000, [False, True]),
        ({}, CUDA, (300, 300), 1000, [False, False]),
        ({}, CUDA, (0, 20), 1000, [False, True]),
        ({}, CUDA, (100, 0), 1000, [True, False]),
        ({}, CUDA, (0, 0), 1000, [False, False]),
        ({"trivial_augment": True}, CUDA, (100, 20), 1000, [False, True]),
        ({"deterministic": True}, CUDA, (100, 20), 1000, [False, False]),
        ({"pixel_cache": "on"}, CUDA, (100, 20), 1000, [False, False]),
        ({"pixel_cache": "device"}, CUDA, (500, 400), 1000, [True, True]),
        ({"pixel_cache": "device", "deterministic": True}, CUDA, (100, 20), 1000, [True, True]),
        ({"pixel_cache": "device"}, CPU, (100, 0), float("inf"), [True, False]),
        ({}, CPU, (100, 20), float("inf"), [False, False]),
    ],
)
def test_a_gpu_gets_what_takes_a_fifth_of_its_free_memory(
    changes: dict[str, Any], device: torch.device, needed: tuple[int, int], free: float, chosen: list[bool]
) -> None:
    sizes = [size * MB for size in needed]
    found, note = choose_device_cache(TrainConfig(**changes), device, sizes, free * MB)
    assert found == chosen
    if True in chosen:
        assert f"in the memory of {device}" in note
    left = [size and not there for size, there in zip(needed, chosen, strict=True)]
    assert ("are loaded by processes" in note) == (
        any(left) and device == CUDA and not changes.keys() & QUIET
    )


def test_more_than_the_memory_is_an_error_that_names_a_way_out() -> None:
    config = TrainConfig(pixel_cache="device")
    with pytest.raises(UserError, match=r"--pixel-cache device.*--pixel-cache on"):
        choose_device_cache(config, CUDA, [600 * MB, 500 * MB], 1000 * MB)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trivial_augment": True}, "--trivial-augment"),
        ({"interpolation": "lanczos"}, "--interpolation lanczos"),
        ({"resize_mode": "pad"}, "--resize-mode pad"),
        ({"resize_mode": "pad", "crop_scale": 0.5, "retune_epochs": 1}, "--resize-mode pad"),
    ],
)
def test_what_the_device_cannot_make_is_refused_before_the_images_are_read(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, pixel_cache="device", name="run", **changes)
    assert named in why_on_cpu(config)
    for resume in ("", str(tmp_path)):  # a setting that may change when a run is resumed
        with pytest.raises(UserError, match=named):
            check_start(config.replace(resume=resume))


def losses(config: TrainConfig, data: Data) -> list[float]:
    torch.manual_seed(0)
    run = build_run(config, data, None, ONE, CPU, 0, silent)
    run.history = History()
    assert isinstance(run.train_loader, DeviceLoader) == (config.pixel_cache == "device")
    assert isinstance(run.val_loader, DeviceLoader) == (config.pixel_cache == "device")
    return [metrics["train/loss"] for metrics in train_epochs(run, 0, 1)]


def test_both_ways_learn_the_same(tmp_path: Path) -> None:
    config, data = make_data(
        tmp_path,
        20,
        batch_size=8,
        crop_scale=0.35,
        flip=0.5,
        optimizer="adamw",
        channels_last=True,
        lr=2e-4,
    )
    on, there = (losses(config.replace(pixel_cache=mode), data) for mode in ("on", "device"))
    assert on[1] < on[0]
    assert there == pytest.approx(on, abs=0.01)


def test_a_stopped_run_resumes_exactly_from_the_devices_memory(tmp_path: Path) -> None:
    flags = ["--data", flat_set(tmp_path / "images"), "--model", "simple_cnn", "--image-size", 16]
    flags += ["--batch-size", 4, "--epochs", 3, "--pixel-cache", "device", "--device", "cpu"]
    flags += ["--deterministic", "true", "--track", "false", "--retune-epochs", 1]
    for arguments in (["whole"], ["stopped", "--stop-after", 1], ["stopped"]):
        train(1, *flags, "--name", *arguments, cwd=tmp_path)
    sums = {weights_sha256(tmp_path / "runs" / name) for name in ("whole", "stopped")}
    assert len(sums) == 1
