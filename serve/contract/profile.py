"""What a model file knows of its validation images: against which scoring compares the images of a job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from serve.contract.confidence import Threshold
from serve.contract.looks import Looks


@dataclass(frozen=True)
class ValidationProfile:
    threshold: Threshold | None = None
    """Of the provider and precision in use; None: no accuracy is estimated."""
    class_counts: dict[str, int] = field(default_factory=dict)
    """Labels of the validation images."""
    predicted: dict[str, int] = field(default_factory=dict)
    """Likeliest classes of their served answers."""
    looks: Looks = field(default_factory=Looks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": asdict(self.threshold) if self.threshold else None,
            "class_counts": self.class_counts,
            "predicted": self.predicted,
            "looks": self.looks.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError, ValueError or AttributeError for what `to_dict` did not make."""
        threshold = Threshold(**values["threshold"]) if values["threshold"] else None
        labels, guesses = (
            {str(name): int(count) for name, count in values[key].items()}
            for key in ("class_counts", "predicted")
        )
        return cls(threshold, labels, guesses, Looks.from_dict(values["looks"]))
