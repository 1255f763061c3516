"""What an execution provider needs and can compute, and how a session is configured for it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.errors import UserError
from serve.contract.metadata import ModelMetadata


@dataclass(frozen=True)
class Runtime:
    """Provider, precision and resources that a model runs with."""

    provider: str = "auto"
    """auto: the fastest that is installed and was verified with the file."""
    precision: str = "fp32"
    """Of the provider's arithmetic: fp32, tf32, fp16 or bf16; that of the file's own weights is
    `ModelMetadata.precision`."""
    threads: int = 0
    """Inference threads on the processor; 0: one for each processor this process may use."""
    device_id: int = 0
    """Which GPU."""
    engine_cache: Path | None = None
    """Folder for TensorRT's engines; unset: in the user's cache folder."""
    workers: int = 1
    """Threads that call the session at the same time. With 0 `threads`, those of the cpu provider share the
    processors."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"--threads {self.threads} must be 0 (one a processor) or more")


class Provider(ABC):
    """An execution provider. A new one is a file beside this one, and a line in registry.py."""

    name: str
    """As given to --provider."""
    full_name: str
    """onnxruntime's."""
    precisions: tuple[str, ...] = ("fp32",)
    """What it can compute a float32 model's layers in."""
    chosen_by_auto = True
    on_gpu = False
    """It needs hardly any of the host's threads, and pixels of a call can travel while another one runs."""
    requirements = ""
    """What to install where it is absent."""

    def why_absent(self) -> str:
        """Return why it cannot be used, as far as that is known without loading it; "" when it may be."""
        built_in = self.full_name in ort.get_available_providers()
        return "" if built_in else "this onnxruntime was built without it"

    @abstractmethod
    def configure(
        self, options: ort.SessionOptions, path: Path, runtime: Runtime, metadata: ModelMetadata
    ) -> list[Any] | None:
        """Return onnxruntime's list of providers; None when `options` name the provider.

        Raises:
            UserError: it cannot be used with this runtime.
        """
