"""What verification found: the report in verification.json, and on the terminal."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.providers.session import ONNXRUNTIME_VERSION

BATCH_SIZES = (1, 2, 7, 32)


@dataclass
class Verification:
    """Goes to verification.json."""

    passed: bool = False
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be decided."""
    num_images: int = 0
    num_noise_images: int = 0
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    file: str = "model.onnx"
    model_precision: str = "fp32"
    """Of the file's own layers: fp32, int8 or fp16."""
    provider: str = ""
    precision: str = "fp32"
    """Of the provider's arithmetic."""
    nodes: str = ""
    """How many of the graph's nodes the provider runs."""
    max_accuracy_drop: float | None = None
    """The limit, as a share of images; none for float32, which is held to its probabilities."""
    max_difference_logits: float = 0.0
    max_difference_probabilities: float = 0.0
    max_difference_validation: float = 0.0
    """Of probabilities, of validation images alone."""
    largely_changed: int = 0
    """Validation images with a probability that differs by more than `gate.LARGE_CHANGE`."""
    max_difference_embeddings: float = 0.0
    """On noise; 0 too when the file has none."""
    argmax_agreement: float = 0.0
    """Share of images, noise included, with the same likeliest class."""
    validation_agreement: float = 0.0
    """The same of validation images alone."""
    accuracy_pytorch: float = 0.0
    accuracy_served: float = 0.0
    """By class name, as a user of the file reads it."""
    gained: int = 0
    """Validation images that only the served model has right."""
    lost: int = 0
    """Validation images that only PyTorch has right."""
    accuracy_trained: float = 0.0
    """As recorded when the checkpoint was written."""
    log_loss_pytorch: float = 0.0
    log_loss_served: float = 0.0
    onnxruntime: str = ONNXRUNTIME_VERSION
    conversion: dict[str, Any] = field(default_factory=dict)
    """How an int8 file was made."""
    images_per_second: dict[str, float] = field(default_factory=dict)
    """As in {"model.onnx openvino:bf16": 302.0}, timed in turn with cpu:fp32 of the same file."""
    threshold: dict[str, Any] | None = None
    """By which scoring estimates its accuracy (serve/contract/confidence.py)."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Profile of the validation images that goes into the file (serve/contract/profile.py)."""
    checkpoint_sha256: str = ""
    model_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def print(self) -> None:
        print(
            f"verification with {self.num_images} validation images and {self.num_noise_images} of noise, "
            f"{self.provider}:{self.precision}, {self.nodes}\n"
            f"  largest difference  logits {self.max_difference_logits:.2e}, "
            f"probabilities {self.max_difference_probabilities:.2e}\n"
            f"  same class          {self.argmax_agreement:.2%}\n"
            f"  accuracy            PyTorch {self.accuracy_pytorch:.4f}, "
            f"served {self.accuracy_served:.4f}\n"
            f"  log loss            PyTorch {self.log_loss_pytorch:.4f}, served {self.log_loss_served:.4f}"
        )
        if self.images_per_second:
            print(f"on this machine: {describe_rates(self.images_per_second)}")
        for note in self.notes:
            print(f"note: {note}")
        for failure in self.failures:
            print(f"FAILED: {failure}", file=sys.stderr)


def describe_rates(rates: Mapping[str, float]) -> str:
    """Describe images a second as in "model.onnx cpu:fp32 48.2 images/s; model.onnx openvino:bf16 302
    images/s (6.27 times)", the slowest first."""
    ordered = sorted(rates.items(), key=lambda item: item[1])
    base = ordered[0][1]
    return "; ".join(
        f"{name} {rate:,.{0 if rate >= 100 else 1}f} images/s"
        + (f" ({rate / base:.2f} times)" if rate > base else "")
        for name, rate in ordered
    )
