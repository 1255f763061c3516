"""Scoring with exported models: `from serve import Classifier` classifies images from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.classifier import Classifier as Classifier


def __getattr__(name: str) -> Any:
    """Import the classifier when it is first used: training and merging do without onnxruntime."""
    if name != "Classifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve.classifier import Classifier

    return Classifier
