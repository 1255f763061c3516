"""What a scoring job came to: errors by kind, predicted classes, estimated accuracy, looks of its images.

Summaries of pieces and shards add up to that of the job: each lies in the manifest of its part.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Self

from serve.contract.confidence import Estimate, Threshold, estimate_accuracy
from serve.contract.errors import UserError
from serve.contract.looks import Looks, distance, quantiles
from serve.contract.profile import ValidationProfile
from serve.contract.urls import redact
from serve.outputs.layout import Row
from serve.shards import Manifest, is_json_of

SUMMARY_VERSION = 1
TOP_KINDS = 5  # printed
MAX_KINDS = 1000
MOST_TRANSIENT, MOST_TRANSIENT_SHARE = 10, 0.01  # errors that may pass; more of them are an outage
OTHER = "other errors"
CLEAR = 0.2  # distance of two distributions from which on it is named
DIGITS = 6  # of shares and seconds

_PARTS_OF_ONE_FILE = (
    (re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+"), "URL"),
    (re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""), "'...'"),
    (re.compile(r"\b0x[0-9A-Fa-f]+|\b[0-9A-Fa-f]{16,}\b"), "N"),
    (re.compile(r"(?<![\w/])~?[\w.@+-]*/[^\s:,;)]+"), "PATH"),
    (re.compile(r"\d+(?:[.,]\d+)*"), "N"),
)


def error_kind(error: str, name: str = "") -> str:
    """Return an error without what belongs to one file: its name, paths, URLs and numbers."""
    text = redact(error)
    for part in (name, name.rpartition("/")[2]):
        text = text.replace(part, "NAME") if "." in part else text  # another may be a word of the error
    for pattern, instead in _PARTS_OF_ONE_FILE:
        text = pattern.sub(instead, text)
    return " ".join(text.split())[:200]


def ranked(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts, the largest first, and equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass
class JobSummary:
    """Counts of rows; `facts` are what a reader wants beside them, and do not add up."""

    class_names: Sequence[str] = ()
    profile: ValidationProfile | None = None
    """Of the model's validation images; None: the model file has none."""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    errors: int = 0
    transient: int = 0
    """Of the errors, those that may pass."""
    seconds: float = 0.0
    above: int = 0
    """Answers above the threshold."""
    errors_by_kind: Counter[str] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)
    looks: Looks = field(default_factory=Looks)
    is_whole: bool = True
    """False when some of the rows were scored on a provider without a threshold."""

    def add(self, row: Row) -> None:
        self.rows += 1
        if row.probabilities is None:
            self.errors += 1
            self.transient += row.transient
            self._count_kind(error_kind(row.error, row.path), 1)
            return
        likeliest = int(row.probabilities.argmax())
        self.predicted[self.class_names[likeliest]] += 1
        if self.profile and self.profile.threshold:
            self.above += bool(row.probabilities[likeliest] > self.profile.threshold.probability)
        if row.look:
            self.looks.add(row.look)

    def _count_kind(self, kind: str, count: int) -> None:
        known = kind in self.errors_by_kind or len(self.errors_by_kind) < MAX_KINDS
        self.errors_by_kind[kind if known else OTHER] += count

    def join(self, other: "JobSummary") -> None:
        """Add the rows of another part of the same job."""
        if self.scored and other.scored and (self.threshold is None) != (other.threshold is None):
            self.is_whole = False
        self.profile = self.profile or other.profile
        self.facts = self.facts or other.facts
        for name in ("rows", "errors", "transient", "seconds", "above"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.errors_by_kind.items():
            self._count_kind(kind, count)
        self.predicted.update(other.predicted)
        self.looks.join(other.looks)
        self.is_whole &= other.is_whole

    @property
    def scored(self) -> int:
        return self.rows - self.errors

    @property
    def is_outage(self) -> bool:
        """Whether so much could not be read that a later call should try again."""
        if self.transient and not self.scored:
            return True
        return self.transient > max(MOST_TRANSIENT, MOST_TRANSIENT_SHARE * self.rows)

    @property
    def error_share(self) -> float:
        return self.errors / self.rows if self.rows else 0.0

    @property
    def estimate(self) -> Estimate | None:
        """Return the estimated accuracy; None of few images, or where the model holds no threshold."""
        threshold = self.threshold
        if threshold is None or not self.is_whole:
            return None
        return estimate_accuracy(self.above, self.scored, threshold)

    @property
    def threshold(self) -> Threshold | None:
        return self.profile.threshold if self.profile else None

    def differences(self) -> list[str]:
        """Return in what the images clearly differ from the validation images."""
        if self.profile is None or not self.looks.num_images or not self.profile.looks.num_images:
            return []
        mine, theirs = self.looks, self.profile.looks
        found = []
        for name, bins in (("short side", "short_side"), ("aspect", "aspect")):
            if distance(getattr(mine, bins), getattr(theirs, bins)) > CLEAR:
                low, _, high = quantiles(getattr(mine, bins))
                known_low, _, known_high = quantiles(getattr(theirs, bins))
                found.append(f"{name} {low:g} to {high:g} ({known_low:g} to {known_high:g})")
        if abs(mine.grey_share - theirs.grey_share) > CLEAR:
            found.append(f"grey {mine.grey_share:.0%} ({theirs.grey_share:.0%})")
        before = self.profile.predicted
        if distance(self.predicted, before, ordered=False) > CLEAR:
            names = {**before, **self.predicted}
            gaps = {name: self._share(self.predicted, name) - self._share(before, name) for name in names}
            name = max(gaps, key=lambda name: abs(gaps[name]))
            shares = [self._share(counts, name) for counts in (self.predicted, before)]
            found.append(f"predicted as {name!r} {shares[0]:.0%} ({shares[1]:.0%})")
        return found

    @staticmethod
    def _share(counts: Mapping[str, int], name: str) -> float:
        return counts.get(name, 0) / max(1, sum(counts.values()))

    def lines(self) -> Iterator[str]:
        """Yield what is printed at the end of a job."""
        kinds = ranked(self.errors_by_kind)
        for kind, count in list(kinds.items())[:TOP_KINDS]:
            yield f"{count} {'error' if count == 1 else 'errors'}: {kind}"
        if rest := list(kinds.values())[TOP_KINDS:]:
            yield f"{sum(rest)} errors of {len(rest)} further kinds"
        found, threshold = self.estimate, self.threshold
        if found is None or threshold is None:
            return
        yield (
            f"estimated accuracy {found.accuracy:.3f} ({found.low:.3f} to {found.high:.3f}), on the "
            f"{threshold.num_images} validation images {threshold.accuracy:.3f}"
        )
        if found.differs and found.accuracy < threshold.accuracy:
            yield (
                "warning: the answers are less sure than on the validation images, by more than chance: "
                "label some of these images, and measure the accuracy on them"
            )
        elif found.differs:
            yield (
                "warning: the answers are surer than on the validation images, by more than chance, as "
                "confident mistakes are too: label some of these images before relying on the estimate"
            )
        if differences := self.differences():
            yield (
                f"note: these images differ from the validation images in {', '.join(differences)}: the "
                "more they do, the less the estimate holds"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON file."""
        found, threshold = self.estimate, self.threshold
        return {
            "format_version": SUMMARY_VERSION,
            **self.facts,
            "rows": self.rows,
            "scored": self.scored,
            "errors": self.errors,
            "transient_errors": self.transient,
            "error_share": round(self.error_share, DIGITS),
            "errors_by_kind": ranked(self.errors_by_kind),
            "predicted": ranked(self.predicted),
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.rows / self.seconds, 3) if self.seconds else 0.0,
            "estimated_accuracy": asdict(found) if found else None,
            "validation_accuracy": threshold.accuracy if threshold else None,
            "differences": self.differences(),
            "above_threshold": self.above,
            "images_seen": self.looks.to_dict(),
            "validation": self.profile.to_dict() if self.profile else None,
            "is_whole": self.is_whole,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError, ValueError or AttributeError for what `to_dict` did not make."""
        counts = cls().to_dict().keys()
        facts = {key: value for key, value in values.items() if key not in counts}
        return cls(
            profile=ValidationProfile.from_dict(values["validation"]) if values["validation"] else None,
            facts=facts,
            rows=int(values["rows"]),
            errors=int(values["errors"]),
            transient=int(values["transient_errors"]),
            seconds=float(values["seconds"]),
            above=int(values["above_threshold"]),
            errors_by_kind=Counter(values["errors_by_kind"]),
            predicted=Counter(values["predicted"]),
            looks=Looks.from_dict(values["images_seen"]),
            is_whole=bool(values["is_whole"]),
        )

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode(errors="replace") + b"\n"


def summary_of(manifest: Manifest) -> JobSummary:
    """Return the summary of a part's rows. Raises UserError when it is damaged."""
    try:
        return JobSummary.from_dict(manifest.summary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"a part's manifest has a damaged summary ({error!r}): score the part again"
        ) from error


def is_summary(file: IO[bytes]) -> bool:
    """Return whether a file is a summary, or empty: such a one may be replaced."""
    return is_json_of(file, "errors_by_kind", "predicted", "is_whole")
