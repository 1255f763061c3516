"""Device, threads, memory and number format: the choices that make a step fast without changing what it
computes."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from statistics import median

import joblib
import torch

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.distributed import Ranks, max_over_ranks
from train.precision import Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TIMED_STEPS = 3
LONG_STEP_SECONDS = 1.0  # one such step is timed truly enough
TURNS, TURNS_OF_LONG_STEPS = 5, 3  # in which all options are timed one after the other
CLEARLY_BETTER = 0.9  # of the default's seconds, which other work on the machine does not explain
MOST_TURNS = 0.8  # in which an option must be so much better
HOPELESS = 1.5  # times the default's seconds in the first turn


def choose_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """Raises UserError when CUDA is asked for, or needed by each process, and not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or fix the driver")
    if config.device == "cpu" or not available:
        if config.precision == "fp16":
            raise UserError("--precision fp16 is for CUDA; on the CPU use bf16 or fp32")
        return torch.device("cpu")
    if ranks.local_world_size > torch.cuda.device_count():
        raise UserError(
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


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether it has instructions for that, with which bf16 is the usual choice: of an x86 processor
    more than `has_bf16`, which AVX-512 alone satisfies."""
    if device.type == "cuda" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_option(options: list[Precision], bf16: bool) -> Precision:
    """Of the options that the settings leave: bf16 on a device that multiplies it, else fp32."""
    usual = [option for option in options if option.autocast == ("bfloat16" if bf16 else "")]
    return (usual or options)[0]


def choose_precision(
    options: list[Precision],
    default: Precision,
    make_step: Callable[[Precision], Callable[[], None]],
    device: torch.device,
) -> tuple[Precision, dict[str, float]]:
    """Return the default or a clearly faster option, and seconds a step of each on the slowest rank.

    `make_step` returns a function that does one whole training step on a copy of the model. The options are
    timed in turns, so that what else the machine does meets all of them, and one copy is there at a time.
    """
    if len(options) == 1:
        return options[0], {}
    times: dict[Precision, list[float]] = {option: [] for option in options}
    timed, turns = options, TURNS
    while len(times[default]) < turns:
        for option in timed:
            times[option].append(time_step(make_step(option), device, 1)[1])
        first = times[default][0]
        timed = [option for option in timed if times[option][0] < HOPELESS * first]
        turns = TURNS_OF_LONG_STEPS if first >= LONG_STEP_SECONDS else TURNS
        if timed == [default]:
            break
    seconds = {str(option): median(times[option]) for option in options}
    return choose_option(times, default), seconds


def choose_option(times: dict[Precision, list[float]], default: Precision) -> Precision:
    """Return the fastest of the options that are clearly faster than the default in most turns, or else the
    default. `times` are the seconds of each turn; an option that was given up has fewer."""
    best = default
    for option, seconds in times.items():
        wins = sum(mine < CLEARLY_BETTER * its for mine, its in zip(seconds, times[default], strict=False))
        clearly = median(seconds) < CLEARLY_BETTER * median(times[default])
        if clearly and wins >= MOST_TURNS * len(times[default]) and median(seconds) < median(times[best]):
            best = option
    return best


def time_step(
    step: Callable[[], None], device: torch.device, most: int = TIMED_STEPS
) -> tuple[float, float]:
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
    while times[0] < LONG_STEP_SECONDS and len(times) < most:
        times.append(once())
    return first, median(times)


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
