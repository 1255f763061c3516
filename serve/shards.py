"""Big jobs: shards scored by many processes, parts that survive a kill, and the proof that they fit.

A job's inputs, in their sorted order, are cut into N shards, and a shard's output is a part file with a
manifest beside it:

    part-00003-of-00008.csv         a finished shard
    part-00003-of-00008.csv.json    of what: model, inputs, settings, which rows, the part's sha256

A big shard is scored in pieces, which are joined when all are written. Until then they lie, each with its
manifest, in the hidden folder .part-00003-of-00008.csv.pieces, and a killed job loses one piece at most.
Every file appears by a rename, and the same inputs give the same bytes: two processes at the same shard
write the same files over one another.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from serve.contract.errors import UserError
from serve.contract.files import atomic_write, file_sha256
from serve.schedulers import array_task

MANIFEST_VERSION = 1
MAX_SHARDS = 1_000_000
PART_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})(\.[a-z]+)")


@dataclass(frozen=True)
class Shard:
    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Return shard "3/8", or the one that the cluster's scheduler gives this task: "auto" or "auto/8".

        Raises:
            UserError: no such shard, or serve.schedulers.array_task cannot tell.
        """
        index, slash, count = text.partition("/")
        if text == "auto":
            return cls._checked(text, *array_task())
        if not (slash and count.isdecimal() and (index == "auto" or index.isdecimal())):
            raise UserError(f"--shard {text!r} is not I/N, auto/N or auto")
        if index == "auto":
            return cls._checked(text, *array_task(int(count)))
        return cls._checked(text, int(index), int(count))

    @classmethod
    def _checked(cls, text: str, index: int, count: int) -> "Shard":
        if not index < count <= MAX_SHARDS:
            raise UserError(
                f"--shard {text}: there is no shard {index} of {count}: I goes from 0 to N-1, and N is at "
                f"most {MAX_SHARDS}"
            )
        return cls(index, count)

    def part_name(self, suffix: str) -> str:
        return f"part-{self.index:05}-of-{self.count:05}{suffix}"

    def rows(self, total: int, batch_size: int) -> range:
        """Return the inputs of this shard. Whole batches: where they are cut does not depend on N."""
        batches = -(-total // batch_size)
        first, last = (batches * i // self.count * batch_size for i in (self.index, self.index + 1))
        return range(min(first, total), min(last, total))


@dataclass(frozen=True)
class Job:
    """Values that all parts of a job have in common."""

    model_sha256: str
    inputs_sha256: str
    """Digest of the names of all inputs, each followed by NUL, in their order."""
    total: int
    """Inputs of the whole job."""
    settings: dict[str, Any]
    """What else decides about the bytes: format, top_k, embeddings, batch_size, precision, and images, the
    folder or URL that the names are relative to."""


@dataclass(frozen=True)
class Manifest:
    """Beside a part or a piece: what it is. Written after it."""

    job: Job
    first: int
    """Number of the first row's input."""
    rows: int
    errors: int
    sha256: str
    """Of the file."""
    made_with: dict[str, str]
    """Provider and library versions, for the reader; parts may differ in them."""
    format_version: int = MANIFEST_VERSION
    transient: int = 0
    """Of the errors, those that may pass: a later call with --resume tries again."""
    stamps: str = ""
    """Sum over the inputs' files as they were before they were read: sizes, times, numbers, ETags."""
    contents: str = ""
    """Sum over the bytes that were read."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the rows came to (serve/summary.py)."""

    @classmethod
    def read(cls, part: Path) -> "Manifest":
        """Read it. Raises UserError when there is none, or none that this version understands."""
        path = manifest_path(part)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format_version"] != MANIFEST_VERSION:
                raise UserError(
                    f"{path} has format_version {values['format_version']}, this version reads "
                    f"{MANIFEST_VERSION}"
                )
            m = cls(**{**values, "job": Job(**values["job"])})
            numbers = (m.first, m.rows, m.errors, m.transient, m.job.total)
            if not all(type(n) is int and n >= 0 for n in numbers) or not m.transient <= m.errors <= m.rows:
                raise TypeError(f"first, rows, errors, transient, total are {numbers}")
            if not (isinstance(m.job.settings, dict) and isinstance(m.summary, dict)):
                raise TypeError(f"settings and summary are {m.job.settings!r} and {m.summary!r}")
            return m
        except OSError as error:
            raise UserError(f"{path} cannot be read, so {part.name} is unfinished: {error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no manifest: {error!r}") from error

    def write(self, part: Path, scratch: Path | None = None) -> None:
        with atomic_write(manifest_path(part), folder=scratch) as file:
            file.write(json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n")


def manifest_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def is_manifest(file: IO[bytes]) -> bool:
    """Return whether a file is one, of any version, whole or damaged."""
    return is_json_of(file, "job", "sha256", "format_version")


def is_json_of(file: IO[bytes], *keys: str) -> bool:
    """Return whether a file is empty, or a JSON object with these keys."""
    data = file.read()
    try:
        return not data.strip() or set(keys) <= set(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return False


def pieces_folder(part: Path) -> Path:
    return part.with_name(f".{part.name}.pieces")


def finished_part(part: Path, job: Job, rows: range) -> Manifest | None:
    """Return the manifest of a part that is whole, of this job, and without errors that may have passed;
    None: it must be made."""
    try:
        manifest = Manifest.read(part)
        if (manifest.job, manifest.first, manifest.rows) != (job, rows.start, len(rows)):
            return None
        if manifest.transient:
            return None
        return manifest if file_sha256(part) == manifest.sha256 else None
    except (ValueError, OSError):
        return None


def difference(part: Path, job: Job) -> str:
    """Name what differs between the manifest of a part and this job, as in "model, batch_size"; "" when
    nothing is known to."""
    try:
        other = Manifest.read(part).job
    except ValueError:
        return ""
    then, now = (
        {"model": j.model_sha256, "list of inputs": j.inputs_sha256, **j.settings} for j in (other, job)
    )
    return ", ".join(name for name in now | then if now.get(name) != then.get(name))


def cut(rows: range, part_size: int, batch_size: int) -> Iterator[range]:
    """Yield pieces of about part_size rows, of whole batches."""
    step = -(-part_size // batch_size) * batch_size
    for first in range(rows.start, rows.stop, step):
        yield range(first, min(first + step, rows.stop))


def remove_pieces(part: Path) -> None:
    shutil.rmtree(pieces_folder(part), ignore_errors=True)  # another process may do the same
