"""What an exported ONNX file says about itself: enough to score with the file alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from serve.preprocess import Preprocess

METADATA_KEY = "purebred"  # in the ONNX file's metadata_props
FORMAT_VERSION = 1
INPUT_NAME = "images"  # uint8 [N, size, size, 3], RGB
LOGITS_NAME = "logits"  # float32 [N, num_classes]
PROBABILITIES_NAME = "probabilities"  # float32 [N, num_classes], rows sum to 1
EMBEDDINGS_NAME = "embeddings"  # float32 [N, features], the last layer's input; only if asked for at export


@dataclass(frozen=True)
class ModelMetadata:
    class_names: tuple[str, ...]
    """In the order of the logits."""
    preprocess: Preprocess
    model: str = ""
    """Architecture name, as given to `--model`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the exported checkpoint."""
    temperature: float = 1.0
    """What the graph divides the network's logits by."""
    flip_tta: bool = False
    """Whether the graph averages the logits of an image and of its mirror image."""
    clip_probabilities: float = 0.0
    """Smallest probability that the graph gives."""
    run_name: str = ""
    run_id: str = ""
    """MLflow run; empty when the run was not tracked."""
    epoch: int = 0
    """Epochs trained when the checkpoint was written."""
    data_digest: str = ""
    """sha256 over the training data's names, labels and contents."""
    checkpoint_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions at export."""

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(f"a classifier needs two classes or more, not {self.class_names}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class names repeat: {self.class_names}")

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["preprocess"] = self.preprocess.to_dict()
        return json.dumps({"format_version": FORMAT_VERSION, **values}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError when the text is not metadata that this version understands."""
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"model metadata is not readable: {error!r}") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"model metadata has format_version {version}, this version reads {FORMAT_VERSION}; "
                "export the model again or update purebred"
            )
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError(f"model metadata fields {sorted(values)} are not {sorted(known)}")
        try:
            values["class_names"] = tuple(values["class_names"])
            values["preprocess"] = Preprocess.from_dict(values["preprocess"])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"model metadata hold a value of the wrong type: {error}") from error

    @classmethod
    def from_props(cls, props: Mapping[str, str]) -> Self:
        """From the ONNX file's metadata_props. Raises ValueError when there is none of ours."""
        if METADATA_KEY not in props:
            raise ValueError(
                f"no {METADATA_KEY!r} metadata in this ONNX file: it was not made by export/main.py"
            )
        return cls.from_json(props[METADATA_KEY])
