"""Open a session on the provider asked for, really in use and at the precision asked for, or fail.

onnxruntime by itself falls back to the CPU without a warning, and OpenVINO defaults to bfloat16.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.metadata import INPUT_NAME, PROBABILITIES_NAME, ModelMetadata
from serve.processors import available_processors
from serve.providers.base import Runtime
from serve.providers.registry import ALL_PRECISIONS, PRECISIONS, PROVIDERS, why_absent

ONNXRUNTIME_VERSION: str = ort.__version__
DEFAULT = "cpu"
CLEARLY_FASTER = 1.05  # than the default; less may be the noise of the timing
NOWHERE = "/nonexistent"  # as in Debian's passwd: a folder that is never made


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
        """Nodes that the provider runs, as in "52 of 54 nodes"."""
        return f"{self.nodes[PROVIDERS[self.provider].full_name]} of {sum(self.nodes.values())} nodes"


def open_session(
    path: Path, runtime: Runtime, metadata: ModelMetadata, allow_unverified: bool = False
) -> Opened:
    """Open a session whose provider and precision are those asked for.

    auto takes the installed provider that was verified with this file at this precision and was clearly
    the fastest where it was verified: `Opened.reason` says why.

    Raises:
        UserError: the provider is unknown or absent, has no such precision, was given no node of this
            graph, or was never verified with this file (unless `allow_unverified`).
    """
    if runtime.provider not in ("auto", *PROVIDERS):
        raise UserError(f"--provider {runtime.provider!r} must be one of {', '.join(('auto', *PROVIDERS))}")
    if runtime.precision not in ALL_PRECISIONS:
        raise UserError(f"--precision {runtime.precision!r} must be one of {', '.join(ALL_PRECISIONS)}")
    if runtime.provider == "auto":
        return _open_fastest(path, runtime, metadata, allow_unverified)
    _check_precision(runtime.provider, runtime.precision)
    if reason := why_absent(runtime.provider):
        requirements = PROVIDERS[runtime.provider].requirements
        raise UserError(f"provider {runtime.provider!r} cannot be used: {reason}; {requirements}")
    if not allow_unverified:
        check_verified(path, metadata, runtime.provider, runtime.precision)
    return _open(path, runtime.provider, runtime, metadata, "")


def check_verified(path: Path, metadata: ModelMetadata, provider: str, precision: str) -> None:
    """Raise UserError when this file was never verified on this provider at this precision."""
    if metadata.is_verified(provider, precision):
        return
    known = ", ".join(f"{p.provider}:{p.precision}" for p in metadata.verified)
    history = f"was verified on {known}, never" if known else "was never verified as it is now"
    of = "" if metadata.precision == "fp32" else f" --model-precision {metadata.precision}"
    verify = f"{command('export/main.py')} --run RUN{of} --verify-provider {provider}:{precision}"
    raise UserError(
        f"{path} ({metadata.precision}) {history} on {provider}:{precision}; verify it on this machine "
        f"({verify}), or score without proof with --allow-unverified"
    )


def _check_precision(provider: str, precision: str) -> None:
    if precision in PRECISIONS[provider]:
        return
    others = [name for name, precisions in PRECISIONS.items() if precision in precisions]
    raise UserError(
        f"the {provider} provider has no {precision} arithmetic: use --precision "
        f"{' or '.join(PRECISIONS[provider])}, or --provider {' or '.join(others)}"
    )


def _open_fastest(path: Path, runtime: Runtime, metadata: ModelMetadata, allow_unverified: bool) -> Opened:
    precision, notes, speeds = runtime.precision, dict[str, str](), dict[str, float]()
    verified = {p.provider: p for p in metadata.verified if p.precision == precision}
    for name, provider in PROVIDERS.items():
        if not provider.chosen_by_auto:
            continue
        if reason := why_absent(name):
            notes[name] = reason
        elif precision not in PRECISIONS[name]:
            notes[name] = f"has no {precision}"
        elif name not in verified:
            notes[name] = f"never verified with this model at {precision}"
        else:
            speed = verified[name].speed
            notes[name] = _describe_speed(speed)
            speeds[name] = 1.0 if name == DEFAULT else speed if speed >= CLEARLY_FASTER else 0.0
    notes.pop(DEFAULT, None)
    for name in sorted(speeds, key=lambda name: speeds[name], reverse=True):
        try:
            reason = _joined(notes) + _faster_precision(precision, metadata)
            return _open(path, name, runtime, metadata, reason)
        except ValueError as error:
            notes[name] = str(error)
    try:
        _check_precision(DEFAULT, precision)
    except ValueError as error:
        raise UserError(f"{error}; of the others, {_joined(notes)}") from error
    if not allow_unverified:
        check_verified(path, metadata, DEFAULT, precision)
    return _open(path, DEFAULT, runtime, metadata, _joined(notes))


def _joined(notes: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {note}" for name, note in notes.items())


def _describe_speed(speed: float) -> str:
    return f"{speed:.2f} times as fast as {DEFAULT} where it was verified"


def _faster_precision(precision: str, metadata: ModelMetadata) -> str:
    """Name a verified pairing of another precision that was faster: the caller may choose it."""
    own = max((p.speed for p in metadata.verified if p.precision == precision), default=1.0)
    others = [p for p in metadata.verified if p.precision != precision and not why_absent(p.provider)]
    best = max(others, key=lambda p: p.speed, default=None)
    if best is None or best.speed <= CLEARLY_FASTER * max(own, 1.0):
        return ""
    return f"; {best.provider} with --precision {best.precision}: {_describe_speed(best.speed)}"


def _open(path: Path, name: str, runtime: Runtime, metadata: ModelMetadata, reason: str) -> Opened:
    provider = PROVIDERS[name]
    threads = runtime.threads  # 0: a provider that serialises its calls takes every processor for each
    if not threads and provider.on_gpu:
        threads = 1
    if name == DEFAULT:  # whose callers run at the same time
        threads = max(1, (threads or available_processors()) // runtime.workers)
    options = _session_options(threads)
    providers = provider.configure(options, path, runtime, metadata)
    try:
        session = _create(path, options, providers)
    except ValueError as error:
        hint = f"; provider {name!r}: {provider.requirements}" if provider.requirements else ""
        raise UserError(f"{str(error).strip()}{hint}") from error
    # The GPU build lists CUDA and TensorRT on any machine and falls back silently: ask the session.
    if (got := session.get_providers()[0]) != provider.full_name:
        raise UserError(
            f"provider {name!r} cannot be used, the session got {got!r}: {provider.requirements}; or use "
            "--provider cpu"
        )
    nodes = Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    if not nodes[provider.full_name]:
        raise UserError(
            f"{path}: provider {name!r} took none of the graph's nodes, {dict(nodes)}: it cannot run this "
            "model; use --provider cpu"
        )
    if name != DEFAULT:
        _try(session, metadata, name)
    return Opened(session, name, reason, nodes)


def _try(session: ort.InferenceSession, metadata: ModelMetadata, provider: str) -> None:
    """Score one black image: a GPU without room, or without the code for its kind, opens all the same."""
    size = metadata.preprocess.size
    try:
        session.run([PROBABILITIES_NAME], {INPUT_NAME: np.zeros((1, size, size, 3), np.uint8)})
    except Exception as error:  # onnxruntime's own exception types share no public base
        raise UserError(f"provider {provider!r} opens this model and cannot run it: {error}") from error


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # onnxruntime would size its pool by the host's processors, not by those this process may use.
    options.intra_op_num_threads = threads or available_processors()
    options.log_severity_level = 3
    # A model from elsewhere could name any file beside it as its weights; ours are whole files.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _create(path: Path, options: ort.SessionOptions, providers: list[Any] | None) -> ort.InferenceSession:
    try:
        # enable_fallback: a provider that fails while it runs would be replaced by the CPU, too
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exception types share no public base
        hint = "; a model must be one file, without external data" if NOWHERE in str(error) else ""
        raise UserError(f"{path}: onnxruntime cannot load this model: {error}{hint}") from error
