"""TensorRT: NVIDIA GPUs, with engines that are built for one model file and kept."""

import os
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.errors import UserError
from serve.contract.files import cache_folder, file_sha256
from serve.contract.metadata import INPUT_NAME, ModelMetadata
from serve.providers.base import Runtime
from serve.providers.cpu import Cpu
from serve.providers.cuda import Cuda, cuda_options

# Engines are built for a range of batch sizes, and once more for each batch outside of it.
BATCHES = {"min": 1, "opt": 32, "max": 256}


class TensorRT(Cuda):
    name, full_name = "tensorrt", "TensorrtExecutionProvider"
    precisions = ("fp32", "fp16", "bf16")
    chosen_by_auto = False  # it builds its engines for minutes
    requirements = "it needs what cuda needs, and the TensorRT libraries (pip install tensorrt)"

    def configure(
        self, options: ort.SessionOptions, path: Path, runtime: Runtime, metadata: ModelMetadata
    ) -> list[Any] | None:
        if runtime.precision == "fp32":
            os.environ.setdefault(
                "NVIDIA_TF32_OVERRIDE", "0"
            )  # TensorRT's builder has no option of its own
        folder = str(_engine_folder(path, runtime))
        size = metadata.preprocess.size
        shapes = {
            f"trt_profile_{k}_shapes": f"{INPUT_NAME}:{n}x{size}x{size}x3" for k, n in BATCHES.items()
        }
        own = {
            "device_id": str(runtime.device_id),
            "trt_fp16_enable": str(int(runtime.precision == "fp16")),
            "trt_bf16_enable": str(int(runtime.precision == "bf16")),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
            **shapes,
        }
        # where TensorRT cannot run a node, CUDA may
        return [(self.full_name, own), cuda_options(runtime), Cpu.full_name]


def _engine_folder(path: Path, runtime: Runtime) -> Path:
    """Return one for each content of a model file: onnxruntime names an engine by the graph, not by its
    weights, and would take an engine of other weights for this model's."""
    base = runtime.engine_cache or cache_folder("--engine-cache") / "tensorrt"
    folder = base / f"{file_sha256(path)[:32]}-{runtime.precision}-onnxruntime-{ort.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--engine-cache: cannot make {str(folder)!r}: {error.strerror}") from error
    return folder
