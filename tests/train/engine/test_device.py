"""Device, loader processes and threads: what is required is what is used."""

from pathlib import Path

import pytest
import torch
from forked import execute, fork
from train_data import CPU

from train.config import TrainConfig
from train.distributed import Ranks
from train.engine import device as device_module
from train.engine.device import choose_device, choose_workers

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@no_gpu
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--device cuda.*--device cpu"):
        choose_device(TrainConfig(device="cuda"), Ranks())


@no_gpu
def test_auto_takes_the_cpu_without_a_gpu_and_refuses_fp16() -> None:
    assert choose_device(TrainConfig(), Ranks()) == CPU
    with pytest.raises(ValueError, match=r"--precision fp16.*bf16.*fp32"):
        choose_device(TrainConfig(precision="fp16"), Ranks())
    with pytest.raises(ValueError, match=r"--precision fp16.*bf16.*fp32"):
        choose_device(TrainConfig(precision="fp16", device="cpu"), Ranks())


def test_cpu_is_the_cpu() -> None:
    assert choose_device(TrainConfig(device="cpu"), Ranks()) == CPU


def test_more_processes_than_gpus_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"\b4\b.*\b2 CUDA.*--nproc_per_node.*--device cpu"):
        choose_device(TrainConfig(), Ranks(0, 0, 4, 4))


@pytest.mark.parametrize(
    ("processors", "ranks", "device", "workers"),
    [(2, 1, "cpu", 0), (2, 4, "cpu", 0), (16, 1, "cpu", 4), (64, 4, "cpu", 4), (128, 1, "cpu", 8)]
    + [(2, 1, "cuda", 1), (8, 1, "cuda", 7), (64, 4, "cuda", 8), (4, 8, "cuda", 1)],
)
def test_loader_processes_follow_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, ranks: int, device: str, workers: int
) -> None:
    monkeypatch.setattr(device_module, "available_processors", lambda: processors)
    local = Ranks(0, 0, ranks, ranks)
    assert choose_workers(TrainConfig(), local, torch.device(device)) == workers
    assert choose_workers(TrainConfig(num_workers=3), local, torch.device(device)) == 3


THREADS = """
import torch
from train.config import TrainConfig
from train.engine import device
from train.engine.device import configure
device.available_processors = lambda: 8
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
