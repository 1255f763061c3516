"""CUDA: NVIDIA GPUs through cuDNN, in float32, or in TF32 with --precision tf32."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.providers.base import Provider, Runtime
from serve.providers.cpu import Cpu


class Cuda(Provider):
    name, full_name = "cuda", "CUDAExecutionProvider"
    precisions = ("fp32", "tf32")
    on_gpu = True
    requirements = (
        "it needs an NVIDIA GPU with its driver, onnxruntime-gpu, and CUDA and cuDNN of the major version "
        "that it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]')"
    )

    def why_absent(self) -> str:
        # Without a driver, onnxruntime would print errors before it falls back.
        return super().why_absent() or ("" if has_nvidia_driver() else "no NVIDIA driver")

    def configure(
        self, options: ort.SessionOptions, runtime: Runtime, model_precision: str
    ) -> list[Any] | None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
            # CUDA and cuDNN as pip installs them, which the system's loader does not search
            ort.preload_dlls()
        half = model_precision == "fp16"
        own = {
            "device_id": str(runtime.device_id),
            # The default, 1, keeps 10 bits of the mantissa: not fp32. With 0, half precision gets no tensor
            # cores either.
            "use_tf32": str(int(half or runtime.precision == "tf32")),
            # The default, EXHAUSTIVE, times every algorithm again for each batch size, also for the last.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        if half:  # whose convolutions tensor cores compute in this layout
            own["prefer_nhwc"] = "1"
        return [(self.full_name, own), Cpu.full_name]


def has_nvidia_driver() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
