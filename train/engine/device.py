"""Device, loader processes, threads and memory of a process."""

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from serve.contract.errors import UserError
from serve.processors import available_processors
from train.config import TrainConfig
from train.data.workers import first_line
from train.distributed import Ranks, may_share_gpus

DRIVER = Path("/proc/driver/nvidia/version")  # also in a container without its devices
CONTROL_DEVICE = Path("/dev/nvidiactl")
OUT_OF_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator|_STATUS_ALLOC_FAILED")
MOST_WORKERS = 16  # loader processes of a rank that trains on a GPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """Return this process's device.

    Raises:
        UserError: CUDA is required, or needed by each process, and not there; or torch cannot use the GPU.
    """
    available = torch.cuda.is_available()
    if config.device != "cpu" and not available and (reason := why_unusable()):
        raise UserError(f"--device {config.device}: {reason}; or train on the CPU with --device cpu")
    if config.device == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device; fix the driver or use --device cpu")
    if config.device == "cpu" or not available:
        if config.precision in ("fp16", "tf32"):
            raise UserError(f"--precision {config.precision} is for CUDA; on the CPU use bf16 or fp32")
        return torch.device("cpu")
    device = torch.device("cuda", gpu_number(ranks, torch.cuda.device_count()))
    check_kernels(device)
    torch.cuda.set_device(device)
    if config.precision == "tf32" and not torch.cuda.is_tf32_supported():
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--precision tf32: {name} has no TF32; use fp16 or fp32")
    return device


def gpu_number(ranks: Ranks, visible: int) -> int:
    """Return which of the visible GPUs is this rank's: the one of its local rank, or the only one.

    Each process may see one of its own, as with Slurm's --gpus-per-task, torchrun's --virtual-local-rank or
    a slice of a GPU (MIG); `distributed.check_own_gpus` finds those that all see the same.
    """
    if visible == 1:
        return 0
    processes = max(ranks.local_world_size, ranks.local_rank + 1)
    if processes > visible and not may_share_gpus():
        raise UserError(
            f"{processes} processes on this machine and {visible} CUDA devices: lower --nproc_per_node or "
            "use --device cpu"
        )
    return ranks.local_rank % visible


def uses_tf32(config: TrainConfig, device: torch.device) -> bool:
    """Return whether products of float32 numbers are TF32 (10 bits of mantissa) on this device, as they are
    on a GPU that has it unless --precision fp32 is given."""
    return device.type == "cuda" and config.precision != "fp32" and torch.cuda.is_tf32_supported()


def why_unusable() -> str:
    """Return why torch sees no GPU although there is an NVIDIA driver, and what to do.

    "" without a driver, and where CUDA_VISIBLE_DEVICES hides the GPUs: "", -1, or Slurm's NoDevFiles.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)
    if hidden or not (DRIVER.exists() or CONTROL_DEVICE.exists()):
        return ""
    driver = f"this machine has the NVIDIA driver {driver_version()}"
    if torch.version.cuda is None:
        return f"{driver}, but torch {torch.__version__} is built without CUDA: install one with CUDA"
    if not CONTROL_DEVICE.exists():
        return (
            f"{driver}, but no device {CONTROL_DEVICE} for torch's CUDA {torch.version.cuda}: give the "
            "container its GPUs (docker run --gpus all; in Kubernetes the limit nvidia.com/gpu)"
        )
    chosen = "" if visible is None else f"check CUDA_VISIBLE_DEVICES={visible}, "
    return (
        f"{driver}, but torch cannot use its GPU with CUDA {torch.version.cuda}: {chosen}install a newer "
        "driver, or a torch for an older CUDA"
    )


def driver_version() -> str:
    """Return the version of the loaded NVIDIA driver."""
    found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text() if DRIVER.exists() else "")
    return found[0] if found else "(version unknown)"


def check_kernels(device: torch.device) -> None:
    """Raise UserError when torch has no kernels for this GPU: neither for its generation nor as PTX."""
    capability = torch.cuda.get_device_capability(device)
    names = torch.cuda.get_arch_list()
    known = re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(names))  # ROCm names its own otherwise
    for kind, major, minor in known:
        built = int(major), int(minor)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return
    if known:
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
            f"and torch {torch.__version__} has kernels for {', '.join(names)} only: install a torch built "
            "for it, or train on the CPU with --device cpu"
        )


def choose_workers(config: TrainConfig, ranks: Ranks, device: torch.device) -> int:
    """Return the loader processes of each rank.

    On a CPU with two processors or less to a rank they only compete with it.
    """
    if config.num_workers >= 0:
        return config.num_workers
    share = available_processors() // ranks.local_world_size
    if device.type == "cuda":
        return max(1, min(MOST_WORKERS, share - 1))
    return 0 if share <= 2 else min(8, share // 4)


def configure(config: TrainConfig, ranks: Ranks, device: torch.device, num_workers: int) -> None:
    """Make the process-wide settings; call before the first tensor is made.

    The machine's processors are divided among its ranks. torchrun's OMP_NUM_THREADS=1 is meant to
    prevent that each rank takes all of them, and leaves most of them idle.
    """
    keep_freed_memory()
    share = available_processors() // ranks.local_world_size
    torch.set_num_threads(max(1, share - num_workers if device.type == "cpu" else share // 2))
    if device.type == "cuda":
        tf32 = uses_tf32(config, device)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32  # of convolutions
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic cuBLAS
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)  # of AlexNet's pooling


def free_memory(device: torch.device) -> float:
    """Return the bytes of a GPU's memory that no process holds, this one's allocator neither; of a CPU
    infinity."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch had no memory for a tensor, by the message of torch, cuBLAS, cuDNN or nccl."""
    return isinstance(error, RuntimeError) and bool(
        isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(str(error))
    )


@contextmanager
def explained_out_of_memory(config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Raise UserError, which names the settings that need less memory, where torch has too little."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{device} has too little memory for --batch-size {config.batch_size} with --accumulation "
            f"{config.accumulation} on {ranks.world_size} ranks ({first_line(error)}): raise "
            "--accumulation, which keeps the batch and the result, or lower --batch-size"
        ) from error


def keep_freed_memory() -> None:
    """Let glibc keep big blocks instead of giving them back to the system after each step.

    Otherwise each step's activations are faulted in anew, page by page. No effect elsewhere.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
