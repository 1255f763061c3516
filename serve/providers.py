"""Execution providers: the one asked for, really in use and at the precision asked for, or an error.

onnxruntime by itself falls back to the CPU without a word, and OpenVINO takes bfloat16 unless told not to.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.metadata import INPUT_NAME, ModelMetadata
from serve.processors import available_processors

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
AUTO = ("cuda", "openvino", "cpu")  # TensorRT builds its engines for minutes: only when asked for
INSTALL = {
    "cpu": "",
    "cuda": "it needs an NVIDIA GPU with its driver, onnxruntime-gpu, and CUDA and cuDNN of the major "
    "version that it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]')",
    "tensorrt": "it needs what cuda needs, and the TensorRT libraries (pip install tensorrt)",
    "openvino": "pip install onnxruntime-ep-openvino",
}
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

    def __post_init__(self) -> None:
        if self.provider not in ("auto", *PROVIDERS):
            known = ", ".join(("auto", *PROVIDERS))
            raise ValueError(f"provider {self.provider!r} is none of {known}")
        if self.precision not in ALL_PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is none of {', '.join(ALL_PRECISIONS)}")
        if self.threads < 0:
            raise ValueError(f"threads {self.threads} must be 0 (one a processor) or more")
        if self.device_id < 0:
            raise ValueError(f"device_id {self.device_id} must be 0 or more")


@dataclass(frozen=True)
class Opened:
    session: ort.InferenceSession
    provider: str
    """Never "auto"."""
    reason: str
    """Why auto took it; empty when it was asked for by name."""
    nodes: Mapping[str, int]
    """onnxruntime's name of a provider -> how many of the graph's nodes it was given."""

    @property
    def share(self) -> str:
        """As in "52 of 54 nodes"."""
        return f"{self.nodes[PROVIDERS[self.provider]]} of {sum(self.nodes.values())} nodes"


def read_metadata(path: Path) -> ModelMetadata:
    """What a model file says of itself; nothing is optimised or built for that.

    Raises:
        ValueError: not an exported model.
    """
    options = _session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = _create(path, options, [PROVIDERS["cpu"]])
    try:
        return ModelMetadata.from_props(session.get_modelmeta().custom_metadata_map)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_session(
    path: Path, runtime: Runtime, metadata: ModelMetadata, allow_unverified: bool = False
) -> Opened:
    """A session whose provider and precision are those asked for.

    auto takes the first of `AUTO` that is there and was verified with this file, and says why.

    Raises:
        ValueError: the provider is not to be had, has no such precision, was given no node of this graph,
            or was never verified with this file (unless `allow_unverified`). The message says what to do.
    """
    if runtime.provider != "auto":
        _check_precision(runtime.provider, runtime.precision)
        if absent := _absent(runtime.provider):
            raise ValueError(
                f"provider {runtime.provider!r} is not to be had: {absent}; {INSTALL[runtime.provider]}"
            )
        if not allow_unverified:
            check_verified(path, metadata, runtime.provider, runtime.precision)
        return _open(path, runtime.provider, runtime, metadata, "")
    passed_over = []
    for provider in AUTO[:-1]:
        if why_not := _why_not(provider, runtime.precision, metadata):
            passed_over.append(f"{provider}: {why_not}")
            continue
        try:
            reason = "; ".join([*passed_over, f"{provider}: verified"])
            return _open(path, provider, runtime, metadata, reason)
        except ValueError as error:
            passed_over.append(f"{provider}: {error}")
    reason = "; ".join(passed_over)
    try:
        _check_precision(AUTO[-1], runtime.precision)
    except ValueError as error:
        raise ValueError(f"{error}; of the others, {reason}") from error
    if not allow_unverified:
        check_verified(path, metadata, AUTO[-1], runtime.precision)
    return _open(path, AUTO[-1], runtime, metadata, reason)


def check_verified(path: Path, metadata: ModelMetadata, provider: str, precision: str) -> None:
    """Raises ValueError when this file was never verified on this provider at this precision."""
    if metadata.is_verified(provider, precision):
        return
    known = ", ".join(f"{p.provider}:{p.precision}" for p in metadata.verified) or "nothing"
    of = "" if metadata.precision == "fp32" else f" --model-precision {metadata.precision}"
    raise ValueError(
        f"{path} ({metadata.precision}) was verified on {known}, never on {provider}:{precision}; verify "
        f"it on this machine (python export/main.py --run RUN{of} --verify-provider {provider}:{precision}), "
        "or take its answers unproven with --allow-unverified"
    )


def _check_precision(provider: str, precision: str) -> None:
    if precision in PRECISIONS[provider]:
        return
    others = [name for name, precisions in PRECISIONS.items() if precision in precisions]
    raise ValueError(
        f"the {provider} provider has no {precision} arithmetic: use --precision "
        f"{' or '.join(PRECISIONS[provider])}, or --provider {' or '.join(others)}"
    )


def _absent(provider: str) -> str:
    """Why a provider is not to be had, as far as that is known without loading it; "" when it may be."""
    if provider == "openvino":
        return "" if importlib.util.find_spec("onnxruntime_ep_openvino") else "not installed"
    if PROVIDERS[provider] not in ort.get_available_providers():
        return "this onnxruntime was built without it"
    # Without a driver, onnxruntime would print errors before it falls back.
    return "" if provider == "cpu" or _has_nvidia_driver() else "no NVIDIA driver"


def _why_not(provider: str, precision: str, metadata: ModelMetadata) -> str:
    """Why auto passes a provider over without loading it; "" when it does not."""
    if absent := _absent(provider):
        return absent
    if precision not in PRECISIONS[provider]:
        return f"has no {precision}"
    if not metadata.is_verified(provider, precision):
        return f"never verified with this model at {precision}"
    return ""


def _open(path: Path, provider: str, runtime: Runtime, metadata: ModelMetadata, reason: str) -> Opened:
    options = _session_options(runtime.threads)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Of each provider the fallbacks that are its own: where TensorRT cannot run a node, CUDA may.
    build: dict[str, Callable[[], list[Any] | None]] = {
        "cpu": lambda: [PROVIDERS["cpu"]],
        "cuda": lambda: [_cuda(runtime), PROVIDERS["cpu"]],
        "tensorrt": lambda: [_tensorrt(path, runtime, metadata), _cuda(runtime), PROVIDERS["cpu"]],
        "openvino": lambda: _add_openvino(options, runtime),
    }
    session = _create(path, options, build[provider]())
    # The GPU build lists CUDA and TensorRT on any machine and falls back silently: ask the session.
    got = next(short for short, name in PROVIDERS.items() if name == session.get_providers()[0])
    if got != provider:
        raise ValueError(
            f"provider {provider!r} was asked for and the session got {got!r}: {INSTALL[provider]}; or use "
            "--provider cpu"
        )
    nodes = Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    if not nodes[PROVIDERS[provider]]:
        raise ValueError(
            f"{path}: provider {provider!r} took none of the graph's nodes, {dict(nodes)}: it cannot run "
            "this model; use --provider cpu"
        )
    return Opened(session, provider, reason, nodes)


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # onnxruntime would size its pool by the host's processors, not by those this process may use.
    options.intra_op_num_threads = threads or available_processors()
    options.log_severity_level = 3
    return options


def _create(path: Path, options: ort.SessionOptions, providers: list[Any] | None) -> ort.InferenceSession:
    try:
        # enable_fallback: a provider that fails while it runs would be replaced by the CPU, too
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise ValueError(f"{path}: onnxruntime cannot load this model: {error}") from error


def _cuda(runtime: Runtime) -> tuple[str, dict[str, str]]:
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
        ort.preload_dlls()  # CUDA and cuDNN as pip installs them, which the system's loader does not search
    return PROVIDERS["cuda"], {
        "device_id": str(runtime.device_id),
        "use_tf32": "0",  # the default, 1, keeps 10 bits of the mantissa: not fp32
        # The default, EXHAUSTIVE, times every algorithm anew for each batch size, so for the last batch.
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def _tensorrt(path: Path, runtime: Runtime, metadata: ModelMetadata) -> tuple[str, dict[str, str]]:
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
    base = runtime.engine_cache
    if base is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(home) / "purebred" / "tensorrt"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = base / f"{digest[:32]}-{runtime.precision}-onnxruntime-{ort.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--engine-cache: cannot make {str(folder)!r}: {error.strerror}") from error
    return folder


def _add_openvino(options: ort.SessionOptions, runtime: Runtime) -> None:
    try:
        devices = _openvino_devices()
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise ValueError(f"the OpenVINO plug-in does not load: {error}") from error
    if not devices:
        raise ValueError(
            "the OpenVINO plug-in finds no processor that it takes: as of its version 1.8 it takes Intel's "
            "only; use --provider cpu"
        )
    if runtime.precision == "bf16" and "BF16" not in _capabilities(devices[0]):
        raise ValueError(
            "this processor has no bf16 arithmetic (avx512_bf16, amx_bf16), and OpenVINO would compute in "
            "fp32: use --precision fp32"
        )
    config = {
        # always said: without it, OpenVINO takes bf16 where the processor has it
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[runtime.precision],
        "INFERENCE_NUM_THREADS": options.intra_op_num_threads,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same processors
    }
    options.add_provider_for_devices(devices[:1], {"load_config": json.dumps({"CPU": config})})


@functools.cache
def _openvino_devices() -> tuple[Any, ...]:
    """The plug-in's devices that are processors; loads the plug-in, once in a process."""
    import onnxruntime_ep_openvino as plugin  # optional, and 20 ms

    ort.register_execution_provider_library("openvino", plugin.get_library_path())
    return tuple(
        device
        for device in ort.get_ep_devices()
        if device.ep_name == plugin.get_ep_name() and device.ep_metadata.get("ov_device") == "CPU"
    )


def _capabilities(device: Any) -> list[str]:
    words: str = device.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "")
    return words.split()


def _has_nvidia_driver() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
