"""Device, loader processes and threads: what is required is what is used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import execute, fork
from train_data import CPU

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.distributed import Ranks
from train.engine import device as device_module
from train.engine.device import choose_device, choose_workers, configure, gpu_number, uses_tf32

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture(autouse=True)
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(device_module, "CONTROL_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@no_gpu
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--device cuda.*--device cpu"):
        choose_device(TrainConfig(device="cuda"), Ranks())


@no_gpu
def test_auto_takes_the_cpu_without_a_gpu_and_refuses_what_only_gpus_have() -> None:
    assert choose_device(TrainConfig(), Ranks()) == CPU
    for device in ("auto", "cpu"):
        for precision in ("fp16", "tf32"):
            with pytest.raises(UserError, match=rf"--precision {precision}.*bf16.*fp32"):
                choose_device(TrainConfig(precision=precision, device=device), Ranks())


VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build\n"


@no_gpu
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("version", "control", "cuda", "named"),
    [
        (VERSION, True, "13.0", r"535\.104\.05.*CUDA 13\.0"),
        ("", True, "13.0", r"unknown.*CUDA 13\.0"),
        (VERSION, False, "13.0", r"535\.104\.05.*nvidiactl.*CUDA 13\.0.*--gpus"),
        (VERSION, True, None, r"535\.104\.05.*without CUDA"),
    ],
    ids=["an old driver", "a driver of no version", "a container without devices", "a wheel for the CPU"],
)
def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_left_idle(
    version: str, control: bool, cuda: str, named: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        device_module.DRIVER.write_text(version)
    if control:
        device_module.CONTROL_DEVICE.touch()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError, match=f"--device {device}.*{named}.*--device cpu"):
        choose_device(TrainConfig(device=device), Ranks())
    assert choose_device(TrainConfig(device="cpu"), Ranks()) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"--device cpu"):
        choose_device(TrainConfig(device=device), Ranks())


@no_gpu
@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_auto_takes_the_cpu_where_the_gpus_are_hidden(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device_module.DRIVER.write_text(VERSION)
    device_module.CONTROL_DEVICE.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device(TrainConfig(), Ranks()) == CPU


@pytest.mark.parametrize(
    ("capability", "built", "usable"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_90"], True),
        ((9, 0), ["sm_75", "sm_80", "sm_90a"], True),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((10, 3), ["gfx90a"], True),
        ((7, 0), ["sm_75", "sm_80", "compute_80"], False),
        ((12, 0), ["sm_80", "sm_90", "sm_100"], False),
        ((8, 6), ["sm_75", "sm_89"], False),
    ],
)
def test_a_gpu_without_kernels_is_an_error(
    capability: tuple[int, int], built: list[str], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if usable:
        assert choose_device(TrainConfig(), Ranks()) == torch.device("cuda", 0)
    else:
        named = rf"{capability[0]}\.{capability[1]}.*{built[-1]}.*--device cpu"
        with pytest.raises(UserError, match=named):
            choose_device(TrainConfig(), Ranks())


def test_cpu_is_the_cpu() -> None:
    assert choose_device(TrainConfig(device="cpu"), Ranks()) == CPU


def test_more_processes_than_gpus_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"\b4\b.*\b2 CUDA.*--nproc_per_node.*--device cpu"):
        choose_device(TrainConfig(), Ranks(0, 0, 4, 4))


@pytest.mark.parametrize(
    ("ranks", "visible", "number"),
    [
        (Ranks(), 4, 0),
        (Ranks(3, 3, 4, 4), 4, 3),
        (Ranks(3, 3, 4, 4), 1, 0),  # each sees one of its own
        (Ranks(3, 3, 4, 1), 1, 0),
        (Ranks(3, 3, 4, 1), 4, 3),
    ],
)
def test_a_rank_has_the_gpu_of_its_number_or_the_only_one_that_it_sees(
    ranks: Ranks, visible: int, number: int
) -> None:
    assert gpu_number(ranks, visible) == number


def test_ranks_share_gpus_only_where_nccl_was_set_to_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [gpu_number(Ranks(rank, rank, 4, 4), 2) for rank in range(4)] == [0, 1, 0, 1]
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE")
    for ranks in (Ranks(0, 0, 4, 4), Ranks(2, 2, 4, 1)):
        with pytest.raises(UserError, match=r"\b2 CUDA"):
            gpu_number(ranks, 2)


@pytest.mark.parametrize(
    ("device", "precision", "has", "used"),
    [
        ("cuda", "auto", True, True),
        ("cuda", "tf32", True, True),
        ("cuda", "bf16", True, True),
        ("cuda", "fp32", True, False),
        ("cuda", "auto", False, False),
        ("cpu", "auto", True, False),
    ],
)
def test_float32_is_tf32_on_a_gpu_unless_fp32_is_given(
    device: str, precision: Any, has: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: has)
    config = TrainConfig(precision=precision)
    assert uses_tf32(config, torch.device(device)) == used
    if device == "cuda":
        products: list[str] = []
        monkeypatch.setattr(torch, "set_float32_matmul_precision", products.append)
        for name in ("set_num_threads", "use_deterministic_algorithms"):
            monkeypatch.setattr(torch, name, lambda value, **_: None)
        for name in ("allow_tf32", "benchmark"):
            monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
        configure(config, Ranks(), torch.device(device), 0)
        assert (products, torch.backends.cudnn.allow_tf32) == (["high" if used else "highest"], used)


def test_tf32_on_a_gpu_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("device_count", 1), ("is_tf32_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("get_device_name", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda device: "T4")
    monkeypatch.setattr(device_module, "check_kernels", lambda device: None)
    with pytest.raises(UserError, match=r"--precision tf32.*T4.*fp16"):
        choose_device(TrainConfig(precision="tf32"), Ranks())


@pytest.mark.parametrize(
    ("processors", "ranks", "device", "workers"),
    [(2, 1, "cpu", 0), (2, 4, "cpu", 0), (16, 1, "cpu", 4), (64, 4, "cpu", 4), (128, 1, "cpu", 8)]
    + [(2, 1, "cuda", 1), (8, 1, "cuda", 7), (64, 4, "cuda", 15), (64, 1, "cuda", 16), (4, 8, "cuda", 1)],
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
