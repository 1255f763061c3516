"""onnxruntime's own provider, which every build has."""

from pathlib import Path
from typing import Any

import onnxruntime as ort

from serve.contract.metadata import ModelMetadata
from serve.providers.base import Provider, Runtime


class Cpu(Provider):
    name, full_name = "cpu", "CPUExecutionProvider"

    def configure(
        self, options: ort.SessionOptions, path: Path, runtime: Runtime, metadata: ModelMetadata
    ) -> list[Any] | None:
        return [self.full_name]
