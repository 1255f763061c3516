"""What was verified: the export's own verification in the model file's metadata, all others beside it.

verification.json is the report of model.onnx on the CPU; under "pairings" it has those of every other file,
provider and precision, failed ones too. Later verification leaves the model file as it is: its sha256
identifies it, to scoring jobs and in MLflow.
"""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx

from export.report import Verification
from serve.contract.command_line import command
from serve.contract.errors import UserError
from serve.contract.files import atomic_write, file_sha256
from serve.contract.metadata import VALIDATION_KEY, VERIFIED_BYTES_KEY, VERIFIED_KEY, ModelMetadata
from serve.verification import RECORD, pairing_of, read_metadata, read_reports
from train.checkpoint import checkpoint_folder

MODEL_FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}
"""Precision of a file's own layers -> its name in the run's export folder."""


def stamp(file: Path, report: Verification) -> None:
    """Append to the metadata of a file that is not published yet the provider and precision of the report,
    the sha256 of the bytes that passed, and the profile of the validation images.

    The bytes that were verified stay as they are: of two protobuf messages, one behind the other, repeated
    fields are joined (protobuf.dev/programming-guides/encoding, "Last One Wins").
    """
    pairing = pairing_of(report.to_dict())
    entry = onnx.ModelProto()
    props = {
        VERIFIED_KEY: json.dumps([pairing.to_dict()]),
        VERIFIED_BYTES_KEY: f"{file.stat().st_size} {file_sha256(file)}",
    }
    if report.validation:
        props[VALIDATION_KEY] = json.dumps(report.validation)
    onnx.helper.set_model_props(entry, props)
    with file.open("ab") as opened:
        opened.write(entry.SerializeToString())
        opened.flush()
        os.fsync(opened.fileno())
    report.model_sha256 = file_sha256(file)


def publish_verified(unverified: Path, published: Path, report: Verification) -> bool:
    """Record the report of a new file on the CPU, and publish the file if it passed.

    From then on, a file of that name is one that this call verified; model.onnx, from which the others are
    made, takes them with it.
    """
    folder, is_first = published.parent, published.name == MODEL_FILES["fp32"]
    report.file, report.model_sha256 = published.name, file_sha256(unverified)
    if report.passed:
        stamp(unverified, report)
    for name in MODEL_FILES.values() if is_first else (published.name,):
        if name != published.name and (folder / name).exists():
            print(f"{name} of the earlier export is gone: make it again where it is needed")
        (folder / name).unlink(missing_ok=True)
    kept = [] if is_first else [entry for entry in _read(folder) if entry["file"] != published.name]
    _write(folder, [*kept, report.to_dict()])
    report.print()
    if report.passed:
        unverified.replace(published)
    else:
        print(f"error: {published.name} is not published; see {folder / RECORD}", file=sys.stderr)
    return report.passed


def add_report(folder: Path, report: Verification) -> None:
    """Add a report, or replace that of the same file, provider and precision."""
    new = report.to_dict()
    entries = _read(folder)
    known = [i for i, entry in enumerate(entries) if _key(entry) == _key(new)]
    if known:
        entries[known[0]] = new
    else:
        entries.append(new)
    _write(folder, entries)


def check_models_replaceable(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raises UserError when a file of these names is no model that was published there."""
    for file in (folder / name for name in names):
        if file.is_file() and not overwrite and not _is_published(file):
            raise UserError(
                f"{file} is not the file that {RECORD} beside it describes: move it away, or give "
                "--overwrite to replace it"
            )


def _is_published(file: Path) -> bool:
    with suppress(UserError):  # without a record it is another's
        return file_sha256(file) in {entry["model_sha256"] for entry in _read(file.parent)}
    return False


def published_model(run: Path, precision: str) -> tuple[Path, ModelMetadata, Path]:
    """(the run's model file of this precision, its metadata, the checkpoint that it was exported from).

    Raises:
        UserError: there is none, it is not the one that was verified, or its checkpoint is gone.
    """
    file = run / "export" / MODEL_FILES[precision]
    if not file.is_file():
        to = "" if precision == "fp32" else f" --to {precision}"
        program = command("export/quantize.py" if to else "export/main.py")
        raise UserError(f"{file} does not exist; make it with {program}{to} --run {run}")
    if file_sha256(file) not in {report["model_sha256"] for report in reports_of(file)}:
        raise UserError(f"{file} is not the file that {RECORD} beside it describes: export the run again")
    metadata = read_metadata(file)
    for checkpoint in sorted(checkpoint_folder(run).glob("*.pt")):
        if file_sha256(checkpoint) == metadata.checkpoint_sha256:
            return file, metadata, checkpoint
    raise UserError(
        f"{file} was exported from a checkpoint that is no longer in {checkpoint_folder(run)}: "
        "export the run again"
    )


def verified_model(run: Path, precision: str) -> tuple[Path, ModelMetadata, Path]:
    """`published_model`, if it may still be served somewhere: later verification can withdraw it.

    Raises:
        UserError: it may not, or there is none.
    """
    file, metadata, checkpoint = published_model(run, precision)
    if not metadata.verified:
        raise UserError(
            f"{file} failed verification and is not to be used: see {RECORD} beside it, and export the run "
            "again"
        )
    return file, metadata, checkpoint


def reports_of(file: Path) -> list[dict[str, Any]]:
    """Return the record's reports about a model file, that of its export first."""
    return [entry for entry in _read(file.parent) if entry["file"] == file.name]


def _read(folder: Path) -> list[dict[str, Any]]:
    """Return every report, that of model.onnx on the CPU first."""
    try:
        return read_reports(folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / RECORD} cannot be read ({error!r}): export the run again") from error


def _write(folder: Path, entries: list[dict[str, Any]]) -> None:
    with atomic_write(folder / RECORD, "w") as file:
        file.write(json.dumps({**entries[0], "pairings": entries[1:]}, indent=2) + "\n")


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["file"], entry["provider"], entry["precision"]
