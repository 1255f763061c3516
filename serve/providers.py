"""Execution providers: the one asked for, really in use and at the precision asked for, or an error.

onnxruntime by itself falls back to the CPU without a word, and OpenVINO takes bfloat16 unless told not to.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata, Pairing
from serve.execution_providers import PRECISIONS, PROVIDERS, Runtime, add_openvino, cuda, tensorrt
from serve.processors import available_processors

ONNXRUNTIME_VERSION: str = ort.__version__
DEFAULT = "cpu"
AUTO = ("cuda", "openvino", DEFAULT)  # TensorRT builds its engines for minutes: only when asked for
CLEARLY_FASTER = 1.05  # than the default; less may be the noise of the timing
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

    auto takes the provider of `AUTO` that was verified with this file at this precision, is there, and was
    clearly the fastest where it was verified: `Opened.reason` says why.

    Raises:
        UserError: the provider is not to be had, has no such precision, was given no node of this graph,
            or was never verified with this file (unless `allow_unverified`). The message says what to do.
    """
    if runtime.provider != "auto":
        _check_precision(runtime.provider, runtime.precision)
        if reason := absent(runtime.provider):
            raise UserError(
                f"provider {runtime.provider!r} is not to be had: {reason}; {INSTALL[runtime.provider]}"
            )
        if not allow_unverified:
            check_verified(path, metadata, runtime.provider, runtime.precision)
        return _open(path, runtime.provider, runtime, metadata, "")
    notes, ranked = {}, []
    for provider in AUTO:
        why_not = _why_not(provider, runtime.precision, metadata)
        if not why_not:
            ranked.append(provider)
        if provider != DEFAULT:
            notes[provider] = why_not or _described(metadata.pairing(provider, runtime.precision))
    ranked.sort(key=lambda name: _expected_speed(name, runtime.precision, metadata), reverse=True)
    for provider in ranked:
        reason = "; ".join(f"{name}: {note}" for name, note in notes.items())
        try:
            return _open(path, provider, runtime, metadata, reason + _hint(runtime.precision, metadata))
        except ValueError as error:
            notes[provider] = str(error)
    reason = "; ".join(f"{name}: {note}" for name, note in notes.items())
    try:
        _check_precision(DEFAULT, runtime.precision)
    except ValueError as error:
        raise UserError(f"{error}; of the others, {reason}") from error
    if not allow_unverified:
        check_verified(path, metadata, DEFAULT, runtime.precision)
    return _open(path, DEFAULT, runtime, metadata, reason)


def check_verified(path: Path, metadata: ModelMetadata, provider: str, precision: str) -> None:
    """Raises UserError when this file was never verified on this provider at this precision."""
    if metadata.is_verified(provider, precision):
        return
    known = ", ".join(f"{p.provider}:{p.precision}" for p in metadata.verified) or "nothing"
    of = "" if metadata.precision == "fp32" else f" --model-precision {metadata.precision}"
    command = f"python export/main.py --run RUN{of} --verify-provider {provider}:{precision}"
    raise UserError(
        f"{path} ({metadata.precision}) was verified on {known}, never on {provider}:{precision}; verify "
        f"it on this machine ({command}), or take its answers unproven with --allow-unverified"
    )


def _check_precision(provider: str, precision: str) -> None:
    if precision in PRECISIONS[provider]:
        return
    others = [name for name, precisions in PRECISIONS.items() if precision in precisions]
    raise UserError(
        f"the {provider} provider has no {precision} arithmetic: use --precision "
        f"{' or '.join(PRECISIONS[provider])}, or --provider {' or '.join(others)}"
    )


def absent(provider: str) -> str:
    """Why a provider is not to be had, as far as that is known without loading it; "" when it may be."""
    if provider == "openvino":
        return "" if importlib.util.find_spec("onnxruntime_ep_openvino") else "not installed"
    if PROVIDERS[provider] not in ort.get_available_providers():
        return "this onnxruntime was built without it"
    # Without a driver, onnxruntime would print errors before it falls back.
    return "" if provider == "cpu" or _has_nvidia_driver() else "no NVIDIA driver"


def _why_not(provider: str, precision: str, metadata: ModelMetadata) -> str:
    """Why auto passes a provider over without loading it; "" when it does not."""
    if reason := absent(provider):
        return reason
    if precision not in PRECISIONS[provider]:
        return f"has no {precision}"
    if not metadata.is_verified(provider, precision):
        return f"never verified with this model at {precision}"
    return ""


def _expected_speed(provider: str, precision: str, metadata: ModelMetadata) -> float:
    """Images a second as a multiple of the default provider's, to choose by."""
    pairing = metadata.pairing(provider, precision)
    if provider == DEFAULT or pairing is None:
        return 1.0
    if not pairing.speed:  # an earlier version verified it: a GPU may be taken to be faster
        return math.inf if provider == "cuda" else 0.0
    return pairing.speed if pairing.speed >= CLEARLY_FASTER else 0.0


def _described(pairing: Pairing | None) -> str:
    if pairing is None or not pairing.speed:
        return "verified, but not timed; --verify-provider times it"
    return f"{pairing.speed:.2f} times as fast as {DEFAULT} where it was verified"


def _hint(precision: str, metadata: ModelMetadata) -> str:
    """Say that a verified pairing of another precision was faster; the precision is the caller's choice."""
    own = max((p.speed for p in metadata.verified if p.precision == precision), default=0.0)
    others = [p for p in metadata.verified if p.precision != precision and not absent(p.provider)]
    best = max(others, key=lambda p: p.speed, default=None)
    if best is None or best.speed <= CLEARLY_FASTER * max(own, 1.0):
        return ""
    return f"; {best.provider} with --precision {best.precision}: {_described(best)}"


def _open(path: Path, provider: str, runtime: Runtime, metadata: ModelMetadata, reason: str) -> Opened:
    threads = runtime.threads  # 0: a provider that serialises its calls takes every processor for each
    if not threads and provider == DEFAULT:
        threads = max(1, available_processors() // runtime.workers)
    options = _session_options(threads)
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
        raise UserError(f"{str(error).strip()}{hint}") from error
    # The GPU build lists CUDA and TensorRT on any machine and falls back silently: ask the session.
    got = next(short for short, name in PROVIDERS.items() if name == session.get_providers()[0])
    if got != provider:
        raise UserError(
            f"provider {provider!r} was asked for and the session got {got!r}: {INSTALL[provider]}; or use "
            "--provider cpu"
        )
    nodes = Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    if not nodes[PROVIDERS[provider]]:
        raise UserError(
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
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise UserError(f"{path}: onnxruntime cannot load this model: {error}") from error


def _has_nvidia_driver() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
