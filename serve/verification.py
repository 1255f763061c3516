"""verification.json beside a model file: what these bytes were verified with since the export.

Verification never changes the model file, whose sha256 identifies it to scoring jobs. A file that is copied
without its record is served with what it says of itself: the cpu provider at fp32.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.contract.confidence import Threshold
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata, Pairing

RECORD = "verification.json"
DEFAULT_PAIRING = "cpu:fp32"


def read_metadata(path: Path) -> ModelMetadata:
    """Return what the file says of itself, with the pairings that the record beside it adds or withdraws.

    A record of other bytes, or one that cannot be read, changes nothing.

    Raises:
        UserError: not an exported model.
    """
    metadata = ModelMetadata.read(path)
    pairings = {(p.provider, p.precision): p for p in metadata.verified}
    entries = [entry for entry in _entries(path) if _says_more(entry, pairings)]
    digest = file_sha256(path) if entries else ""  # most records hold no more than the file
    for entry in entries:
        if entry["model_sha256"] == digest:
            key = entry["provider"], entry["precision"]
            pairings.pop(key, None)
            if entry["passed"] is True:
                pairings[key] = pairing_of(entry)
    return replace(metadata, verified=tuple(pairings.values()))


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the reports of the record in a folder, that of model.onnx on the CPU first.

    Raises:
        OSError: there is no record. ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    first = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    reports = [first, *first.pop("pairings")]
    for report in reports:
        pairing_of(report)
        if not isinstance(report["model_sha256"], str) or "passed" not in report:
            raise TypeError(f"no report: {report}")
    return reports


def _entries(path: Path) -> list[dict[str, Any]]:
    for folder in dict.fromkeys((path.parent, path.resolve().parent)):  # a link stands for its file
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return read_reports(folder)
    return []


def _says_more(entry: dict[str, Any], known: dict[tuple[str, str], Pairing]) -> bool:
    provider, precision = entry["provider"], entry["precision"]
    if (entry["passed"] is True) != ((provider, precision) in known):
        return True
    return pairing_of(entry).speed > 0 and f"{provider}:{precision}" != DEFAULT_PAIRING


def pairing_of(entry: Mapping[str, Any]) -> Pairing:
    """Return what serving needs to know of a report."""
    rates = entry["images_per_second"]  # empty where nothing was timed
    own = rates.get(f"{entry['file']} {entry['provider']}:{entry['precision']}", 0.0)
    default = rates.get(f"{entry['file']} {DEFAULT_PAIRING}", 0.0)
    return Pairing(
        provider=entry["provider"],
        precision=entry["precision"],
        num_images=entry["num_images"],
        accuracy=entry["accuracy_served"],
        argmax_agreement=entry["validation_agreement"],
        max_difference_probabilities=entry["max_difference_probabilities"],
        onnxruntime=entry["onnxruntime"],
        threshold=Threshold(**entry["threshold"]) if entry.get("threshold") else None,
        speed=float(own) / float(default) if default > 0 else 0.0,
    )
