"""onnxruntime's own provider, which every build has."""

from typing import Any

import onnxruntime as ort

from serve.providers.base import Provider, Runtime


class Cpu(Provider):
    name, full_name = "cpu", "CPUExecutionProvider"

    def configure(
        self, options: ort.SessionOptions, runtime: Runtime, model_precision: str
    ) -> list[Any] | None:
        return [self.full_name]
