"""Scoring with exported models: `from serve import Classifier` classifies images from Python."""

TYPE_CHECKING = False  # type checkers take it for typing's, which costs 4 ms before signals are handled
if TYPE_CHECKING:
    from serve.classifier import Classifier as Classifier


def __getattr__(name: str) -> object:
    """Import the classifier when it is first used: training and merging do without onnxruntime."""
    if name != "Classifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve.classifier import Classifier

    return Classifier
