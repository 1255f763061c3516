"""CUDA: NVIDIA GPUs through cuDNN, in float32, or in TF32 with --precision tf32."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.metadata import ModelMetadata
from serve.providers.base import Provider, Runtime
from serve.providers.cpu import Cpu

REQUIREMENTS = (
    "it needs an NVIDIA GPU with its driver, onnxruntime-gpu, and CUDA and cuDNN of the major version that "
    "it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]')"
)


class Cuda(Provider):
    name, full_name = "cuda", "CUDAExecutionProvider"
    precisions: tuple[str, ...] = ("fp32", "tf32")
    on_gpu = True
    requirements = REQUIREMENTS

    def why_absent(self) -> str:
        # Without a driver, onnxruntime would print errors before it falls back.
        return super().why_absent() or ("" if has_nvidia_driver() else "no NVIDIA driver")

    def configure(
        self, options: ort.SessionOptions, path: Path, runtime: Runtime, metadata: ModelMetadata
    ) -> list[Any] | None:
        name, own = cuda_options(runtime)
        if metadata.precision == "fp16":  # whose convolutions tensor cores compute in this layout
            own["prefer_nhwc"] = "1"
            own["use_tf32"] = "1"  # without it, cuDNN takes no tensor cores for half precision either
        return [(name, own), Cpu.full_name]


def cuda_options(runtime: Runtime) -> tuple[str, dict[str, str]]:
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
        ort.preload_dlls()  # CUDA and cuDNN as pip installs them, which the system's loader does not search
    return Cuda.full_name, {
        "device_id": str(runtime.device_id),
        # the default, 1, keeps 10 bits of the mantissa: not fp32
        "use_tf32": str(int(runtime.precision == "tf32")),
        # The default, EXHAUSTIVE, times every algorithm again for each batch size, so for the last batch.
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def has_nvidia_driver() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
