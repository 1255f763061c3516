"""What each execution provider is told: options of CUDA, TensorRT and OpenVINO, and the one plug-in."""

import contextlib
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.errors import UserError
from serve.contract.files import cache_folder, file_sha256
from serve.contract.metadata import INPUT_NAME, ModelMetadata
from serve.processors import processor_flags

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# What each can be told to compute a float32 model's layers in.
PRECISIONS = {
    "cpu": ("fp32",),
    "cuda": ("fp32",),
    "tensorrt": ("fp32", "fp16", "bf16"),
    "openvino": ("fp32", "bf16"),
}
ALL_PRECISIONS = tuple(dict.fromkeys(p for precisions in PRECISIONS.values() for p in precisions))
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
# Engines are built for a range of batch sizes, and once more for each batch outside of it.
TENSORRT_BATCHES = {"min": 1, "opt": 32, "max": 256}


@dataclass(frozen=True)
class Runtime:
    """What a model is to be run with."""

    provider: str = "auto"
    precision: str = "fp32"
    """Of the provider's arithmetic; what the file's own weights are in is `ModelMetadata.precision`."""
    threads: int = 0
    """Inference threads on the processor; 0: one for each processor this process may use."""
    device_id: int = 0
    """Which GPU."""
    engine_cache: Path | None = None
    """Folder for TensorRT's engines; unset: in the user's cache folder."""
    workers: int = 1
    """Threads that call the session at the same time."""

    def __post_init__(self) -> None:
        if self.provider not in ("auto", *PROVIDERS):
            known = ", ".join(("auto", *PROVIDERS))
            raise UserError(f"--provider {self.provider!r} is none of {known}")
        if self.precision not in ALL_PRECISIONS:
            raise UserError(f"--precision {self.precision!r} is none of {', '.join(ALL_PRECISIONS)}")
        if self.threads < 0:
            raise UserError(f"--threads {self.threads} must be 0 (one a processor) or more")
        if self.device_id < 0:
            raise UserError(f"--device-id {self.device_id} must be 0 or more")


def cuda(runtime: Runtime) -> tuple[str, dict[str, str]]:
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
        ort.preload_dlls()  # CUDA and cuDNN as pip installs them, which the system's loader does not search
    return PROVIDERS["cuda"], {
        "device_id": str(runtime.device_id),
        "use_tf32": "0",  # the default, 1, keeps 10 bits of the mantissa: not fp32
        # The default, EXHAUSTIVE, times every algorithm anew for each batch size, so for the last batch.
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def tensorrt(path: Path, runtime: Runtime, metadata: ModelMetadata) -> tuple[str, dict[str, str]]:
    if runtime.precision == "fp32":
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT's builder has no option of its own
    folder = str(_engine_folder(path, runtime))
    size = metadata.preprocess.size
    options = {
        "device_id": str(runtime.device_id),
        "trt_fp16_enable": str(int(runtime.precision == "fp16")),
        "trt_bf16_enable": str(int(runtime.precision == "bf16")),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    for limit, batch in TENSORRT_BATCHES.items():
        options[f"trt_profile_{limit}_shapes"] = f"{INPUT_NAME}:{batch}x{size}x{size}x3"
    return PROVIDERS["tensorrt"], options


def _engine_folder(path: Path, runtime: Runtime) -> Path:
    """One for each content of a model file: onnxruntime names an engine by the graph, not by its weights,
    and would take an engine of other weights for this model's."""
    base = runtime.engine_cache or cache_folder("--engine-cache") / "tensorrt"
    folder = base / f"{file_sha256(path)[:32]}-{runtime.precision}-onnxruntime-{ort.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--engine-cache: cannot make {str(folder)!r}: {error.strerror}") from error
    return folder


def add_openvino(options: ort.SessionOptions, runtime: Runtime) -> None:
    try:
        devices = openvino_devices()
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise UserError(f"the OpenVINO plug-in does not load: {error}") from error
    if not devices:
        raise UserError(
            "the OpenVINO plug-in finds no processor that it takes: as of its version 1.8 it takes Intel's "
            "only; use --provider cpu"
        )
    if runtime.precision == "bf16" and not has_bf16(devices[0]):
        raise UserError(
            f"this processor has no bf16 arithmetic ({', '.join(BF16_FLAGS)}): use --precision fp32"
        )
    config = {
        # always said: without it, OpenVINO takes bf16 where the processor has it
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[runtime.precision],
        "INFERENCE_NUM_THREADS": options.intra_op_num_threads,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same processors
    }
    options.add_provider_for_devices(devices[:1], {"load_config": json.dumps({"CPU": config})})


@functools.cache
def openvino_devices() -> tuple[Any, ...]:
    """The plug-in's devices that are processors; loads the plug-in, once in a process."""
    import onnxruntime_ep_openvino as plugin  # optional, and 20 ms

    ort.register_execution_provider_library("openvino", plugin.get_library_path())
    return tuple(
        device
        for device in ort.get_ep_devices()
        if device.ep_name == plugin.get_ep_name() and device.ep_metadata.get("ov_device") == "CPU"
    )


def has_bf16(device: Any) -> bool:
    """Whether OpenVINO computes in bf16 here: where it cannot, it takes fp32 without a word."""
    if "BF16" not in device.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "").split():
        return False
    flags = processor_flags()  # with AVX-512 alone, OpenVINO would offer bf16 and emulate it
    return not flags or not flags.isdisjoint(BF16_FLAGS)
