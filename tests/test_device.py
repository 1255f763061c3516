"""Device, threads and number format: what is asked for is what is used."""

import time
from pathlib import Path

import joblib
import pytest
import torch
from forked import execute, fork
from train_data import CPU

from train.config import TrainConfig
from train.device import (
    Precision,
    candidates,
    choose_device,
    choose_precision,
    choose_workers,
    compile_note,
    has_bf16,
    time_step,
)
from train.distributed import Ranks

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@no_gpu
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="--device cuda, but torch sees no CUDA device; use --device cpu"):
        choose_device(TrainConfig(device="cuda"), Ranks())


@no_gpu
def test_auto_takes_the_cpu_without_a_gpu_and_refuses_fp16() -> None:
    assert choose_device(TrainConfig(), Ranks()) == CPU
    with pytest.raises(ValueError, match="--precision fp16 is for CUDA; on the CPU use bf16 or fp32"):
        choose_device(TrainConfig(precision="fp16"), Ranks())


def test_cpu_is_the_cpu() -> None:
    assert choose_device(TrainConfig(device="cpu"), Ranks()) == CPU


def test_more_processes_than_gpus_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes on this machine and 2 CUDA devices"):
        choose_device(TrainConfig(), Ranks(0, 0, 4, 4))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {},
            ["fp32, channels_last", "fp32, contiguous", "bf16, channels_last", "bf16, contiguous"],
        ),
        ({"precision": "bf16"}, ["bf16, channels_last", "bf16, contiguous"]),
        ({"channels_last": False}, ["fp32, contiguous", "bf16, contiguous"]),
        ({"precision": "fp32", "channels_last": True}, ["fp32, channels_last"]),
        ({"deterministic": True}, ["fp32, channels_last"]),
        ({"deterministic": True, "precision": "bf16", "channels_last": False}, ["bf16, contiguous"]),
    ],
)
def test_candidates_are_what_the_settings_leave_open(
    settings: dict, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.device.has_bf16", lambda: True)
    assert [str(option) for option in candidates(TrainConfig(**settings), CPU)] == names


def test_what_the_processor_only_emulates_is_no_candidate_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of emulated bf16 can take a minute."""
    monkeypatch.setattr("train.device.has_bf16", lambda: False)
    assert [str(o) for o in candidates(TrainConfig(), CPU)] == ["fp32, channels_last", "fp32, contiguous"]
    asked = candidates(TrainConfig(precision="bf16", channels_last=True), CPU)
    assert [str(option) for option in asked] == ["bf16, channels_last"]


def test_bf16_is_a_candidate_where_the_kernels_are() -> None:
    capable = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else capable
    if capable & flags:
        assert has_bf16()


def test_the_fastest_candidate_is_chosen_and_each_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.device.has_bf16", lambda: True)
    options = candidates(TrainConfig(), CPU)
    steps: list[str] = []

    def make_step(option: Precision):
        seconds = 0.001 if str(option) == "bf16, channels_last" else 0.01

        def step() -> None:
            steps.append(str(option))
            time.sleep(seconds)

        return step

    chosen, seconds = choose_precision(options, make_step, CPU)
    assert str(chosen) == "bf16, channels_last"
    assert set(seconds) == set(steps) == {str(option) for option in options}


def test_a_single_candidate_is_not_timed() -> None:
    def make_step(option: Precision):
        raise AssertionError("timed")

    assert choose_precision([Precision()], make_step, CPU) == (Precision(), {})


@pytest.mark.parametrize(
    ("lasts", "first", "later"), [([0.5, 0.2, 0.02, 0.1], 0.5, 0.1), ([9.0, 4.0], 9.0, 4.0)]
)
def test_a_long_step_is_timed_once_after_the_first(
    monkeypatch: pytest.MonkeyPatch, lasts: list[float], first: float, later: float
) -> None:
    """A large network on a slow machine is not kept waiting for what one step already tells."""
    now = 0.0

    def step() -> None:
        nonlocal now
        now += lasts.pop(0)

    monkeypatch.setattr("train.device.time.perf_counter", lambda: now)
    assert time_step(step, CPU) == pytest.approx((first, later))
    assert lasts == []


@pytest.mark.parametrize(
    ("processors", "ranks", "device", "workers"),
    [(2, 1, "cpu", 0), (2, 4, "cpu", 0), (16, 1, "cpu", 4), (64, 4, "cpu", 4), (128, 1, "cpu", 8)]
    + [(2, 1, "cuda", 1), (8, 1, "cuda", 7), (64, 4, "cuda", 8), (4, 8, "cuda", 1)],
)
def test_loader_processes_follow_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, ranks: int, device: str, workers: int
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: processors)
    local = Ranks(0, 0, ranks, ranks)
    assert choose_workers(TrainConfig(), local, torch.device(device)) == workers
    assert choose_workers(TrainConfig(num_workers=3), local, torch.device(device)) == 3


THREADS = """
import joblib, torch
joblib.cpu_count = lambda: 8
from train.config import TrainConfig
from train.device import configure
from train.distributed import Ranks
for deterministic in (True, False):
    config = TrainConfig(deterministic=deterministic)
    for workers in (0, 1):
        for n in (1, 2, 4, 16):
            configure(config, Ranks(0, 0, n, n), torch.device("cpu"), workers)
            print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
"""


def test_the_ranks_of_a_machine_divide_its_processors(tmp_path: Path) -> None:
    process = fork(execute, THREADS, [], cwd=tmp_path, log=tmp_path / "log")
    process.join(60)
    threads = [8, 4, 2, 1, 7, 3, 1, 1]
    assert (tmp_path / "log").read_text().split() == [
        word for on in ("True", "False") for n in threads for word in (str(n), on)
    ]


def test_what_compiling_is_worth_is_said() -> None:
    assert compile_note(0.4, 60.0, 0.3, 100) == (
        "compiled in 60 s: 0.300 s a step, 0.400 without: it pays after 6.0 epochs of each image size"
    )
    assert "it does not pay here, leave --compile out" in compile_note(0.3, 60.0, 0.4, 100)
