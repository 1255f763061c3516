"""Execution providers: the one asked for, really in use and at the precision asked for, or an error.

onnxruntime by itself falls back to the CPU without a word, and OpenVINO takes bfloat16 unless told not to.
"""

import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.accelerators import PRECISIONS, PROVIDERS, Runtime, add_openvino, cuda, tensorrt
from serve.heap import reused_heap
from serve.metadata import ModelMetadata
from serve.processors import available_processors

ONNXRUNTIME_VERSION: str = ort.__version__
AUTO = ("cuda", "openvino", "cpu")  # TensorRT builds its engines for minutes: only when asked for
NOWHERE = "/nonexistent"  # as in Debian's passwd: a folder that is never made
INSTALL = {
    "cpu": "",
    "cuda": "it needs an NVIDIA GPU with its driver, onnxruntime-gpu, and CUDA and cuDNN of the major "
    "version that it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]')",
    "tensorrt": "it needs what cuda needs, and the TensorRT libraries (pip install tensorrt)",
    "openvino": "pip install onnxruntime-ep-openvino",
}


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
    command = f"python export/main.py --run RUN{of} --verify-provider {provider}:{precision}"
    raise ValueError(
        f"{path} ({metadata.precision}) was verified on {known}, never on {provider}:{precision}; verify "
        f"it on this machine ({command}), or take its answers unproven with --allow-unverified"
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
    providers: list[Any] | None = None  # OpenVINO's plug-in is named in the options
    if provider == "openvino":
        add_openvino(options, runtime)
    elif provider == "tensorrt":  # where TensorRT cannot run a node, CUDA may
        providers = [tensorrt(path, runtime, metadata), cuda(runtime), PROVIDERS["cpu"]]
    elif provider == "cuda":
        providers = [cuda(runtime), PROVIDERS["cpu"]]
    else:
        providers = [PROVIDERS["cpu"]]
    try:
        session = _create(path, options, providers)
    except ValueError as error:
        hint = f"; provider {provider!r}: {INSTALL[provider]}" if INSTALL[provider] else ""
        raise ValueError(f"{str(error).strip()}{hint}") from error
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
    # A model from elsewhere could name any file beside it as its weights; ours are whole files.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
    return options


def _create(path: Path, options: ort.SessionOptions, providers: list[Any] | None) -> ort.InferenceSession:
    try:
        # enable_fallback: a provider that fails while it runs would be replaced by the CPU, too
        with reused_heap():
            return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise ValueError(f"{path}: onnxruntime cannot load this model: {error}") from error


def _has_nvidia_driver() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
