"""Device, threads, memory and number format: the choices that make a step fast without changing what it
computes."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import joblib
import torch

from train.config import TrainConfig
from train.distributed import Ranks, max_over_ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TIMED_STEPS = 3
LONG_STEP_SECONDS = 1.0  # one such step is timed truly enough


@dataclass(frozen=True)
class Precision:
    """`autocast` is a torch dtype's name, or "" for plain float32."""

    autocast: str = ""
    channels_last: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.autocast) if self.autocast else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        name = {"": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.autocast]
        return f"{name}, {'channels_last' if self.channels_last else 'contiguous'}"


def choose_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """Raises ValueError when CUDA is asked for, or needed by each process, and not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu or fix the driver")
    if config.device == "cpu" or not available:
        if config.precision == "fp16":
            raise ValueError("--precision fp16 is for CUDA; on the CPU use bf16 or fp32")
        return torch.device("cpu")
    if ranks.local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"{ranks.local_world_size} processes on this machine and {torch.cuda.device_count()} CUDA "
            "devices: lower --nproc_per_node or use --device cpu"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def choose_workers(config: TrainConfig, ranks: Ranks, device: torch.device) -> int:
    """Loader processes of each rank. On a CPU with two processors or less to a rank they only compete."""
    if config.num_workers >= 0:
        return config.num_workers
    share = int(joblib.cpu_count()) // ranks.local_world_size
    if device.type == "cuda":
        return max(1, min(8, share - 1))
    return 0 if share <= 2 else min(8, share // 4)


def configure(config: TrainConfig, ranks: Ranks, device: torch.device, num_workers: int) -> None:
    """Process-wide settings; call before the first tensor is made.

    The machine's processors are divided among its ranks. torchrun's OMP_NUM_THREADS=1 is meant to
    prevent that each rank takes all of them, and leaves most of them idle.
    """
    keep_freed_memory()
    share = joblib.cpu_count() // ranks.local_world_size
    torch.set_num_threads(max(1, share - num_workers if device.type == "cpu" else share // 2))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)


def keep_freed_memory() -> None:
    """Tell glibc to keep big blocks instead of giving them back to the system after each step.

    Otherwise each step's activations are faulted in anew, page by page. No effect elsewhere.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def candidates(config: TrainConfig, device: torch.device) -> list[Precision]:
    """What `config` leaves open, most faithful first."""
    if config.precision != "auto":
        dtypes = [{"fp32": "", "bf16": "bfloat16", "fp16": "float16"}[config.precision]]
    elif config.deterministic:
        dtypes = [""]  # a timing must not decide a result
    elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes = ["", "float16"]
    elif device.type == "cpu" and not has_bf16():
        dtypes = [""]
    else:
        dtypes = ["", "bfloat16"]
    if config.channels_last is not None:
        formats = [config.channels_last]
    else:
        formats = [True] if config.deterministic else [True, False]
    return [Precision(dtype, channels_last) for dtype in dtypes for channels_last in formats]


def has_bf16() -> bool:
    """The processor multiplies bf16; elsewhere that is emulated, and a step can take minutes."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(
    options: list[Precision],
    make_step: Callable[[Precision], Callable[[], None]],
    device: torch.device,
) -> tuple[Precision, dict[str, float]]:
    """The option whose steps are fastest on the slowest rank, and seconds a step of each.

    `make_step` returns a function that does one whole training step on a copy of the model.
    """
    if len(options) == 1:
        return options[0], {}
    seconds = {str(option): time_step(make_step(option), device)[1] for option in options}
    return min(options, key=lambda option: seconds[str(option)]), seconds


def time_step(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of the first call, with allocation, kernel selection and compilation, and of a later one."""

    def once() -> float:
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        # every rank takes part, since the ranks share processors and must agree
        return max_over_ranks(time.perf_counter() - started)

    first = once()
    times = [once()]
    while times[0] < LONG_STEP_SECONDS and len(times) < TIMED_STEPS:
        times.append(once())
    return first, sorted(times)[len(times) // 2]


def compile_note(plain: float, first: float, compiled: float, steps_per_epoch: int) -> str:
    """When compiling pays; all in seconds, of a step."""
    note = f"compiled in {first:.0f} s: {compiled:.3f} s a step, {plain:.3f} without: "
    if compiled >= plain:
        return f"warning: {note}it does not pay here, leave --compile out"
    epochs = first / (plain - compiled) / steps_per_epoch
    return f"{note}it pays after {epochs:.1f} epochs of each image size"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
