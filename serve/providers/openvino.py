"""OpenVINO: Intel processors, in float32 or bfloat16; a plug-in that is installed beside onnxruntime."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata
from serve.processors import processor_flags
from serve.providers.base import Provider, Runtime

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")


class OpenVino(Provider):
    name, full_name = "openvino", "OpenVINOExecutionProvider"
    precisions = ("fp32", "bf16")
    requirements = "pip install onnxruntime-ep-openvino"

    def why_absent(self) -> str:
        return "" if importlib.util.find_spec("onnxruntime_ep_openvino") else "not installed"

    def configure(
        self, options: ort.SessionOptions, path: Path, runtime: Runtime, metadata: ModelMetadata
    ) -> list[Any] | None:
        try:
            devices = openvino_devices()
        except Exception as error:  # onnxruntime's own exception types share no public base
            raise UserError(f"the OpenVINO plug-in does not load: {error}") from error
        if not devices:
            raise UserError(
                "the OpenVINO plug-in finds no processor that it takes: as of its version 1.8 it takes "
                "Intel's only; use --provider cpu"
            )
        if runtime.precision == "bf16" and not computes_bf16(devices[0]):
            raise UserError(
                f"this processor has no bf16 arithmetic ({', '.join(BF16_FLAGS)}): use --precision fp32"
            )
        config = {
            # by default, OpenVINO takes bf16 where the processor has it
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[runtime.precision],
            "INFERENCE_NUM_THREADS": options.intra_op_num_threads,
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same processors
        }
        options.add_provider_for_devices(devices[:1], {"load_config": json.dumps({"CPU": config})})
        return None


@functools.cache
def openvino_devices() -> tuple[Any, ...]:
    """Load the plug-in, once in a process, and return its devices that are processors."""
    import onnxruntime_ep_openvino as plugin  # optional, and 20 ms

    try:
        ort.register_execution_provider_library("openvino", plugin.get_library_path())
    except Exception as error:  # onnxruntime's own exception types share no public base
        # a copy of this module, in a logged model of MLflow, may have loaded it
        if "already registered" not in str(error):
            raise
    return tuple(
        device
        for device in ort.get_ep_devices()
        if device.ep_name == plugin.get_ep_name() and device.ep_metadata.get("ov_device") == "CPU"
    )


def computes_bf16(device: Any) -> bool:
    """Return whether OpenVINO computes in bf16 on this device: else it takes fp32 without a warning."""
    if "BF16" not in device.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "").split():
        return False
    flags = processor_flags()  # with AVX-512 alone, OpenVINO would offer bf16 and emulate it
    return not flags or not flags.isdisjoint(BF16_FLAGS)
