"""From inputs to an output file: in one go, or as a part that survives a kill."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import onnxruntime as ort
import PIL

from serve.batch import score
from serve.changes import SetDigest, digest_stamps, digesting, unchanged
from serve.contract.doubts import Doubts
from serve.contract.files import atomic_write, file_sha256
from serve.contract.listing import has_image_suffix
from serve.inputs.inventory import Entry
from serve.inputs.sources import Source
from serve.local_copy import LocalCopy
from serve.outputs.join import join
from serve.outputs.kaggle import KAGGLE
from serve.outputs.layout import Format, Layout, Row
from serve.predictor import Predictor
from serve.shards import (
    Job,
    Manifest,
    cut,
    difference,
    finished,
    manifest_path,
    pieces_folder,
    remove_pieces,
)

PROGRESS_SECONDS = 5.0
TRIES = 3  # when another process has finished the same part and cleaned up under our hands


@dataclass
class Progress:
    total: int
    done: int = 0
    errors: int = 0
    transient: int = 0
    """Of the errors, those that may pass."""
    resumed: int = 0
    """Rows that were there already."""
    doubts: Doubts = field(default_factory=Doubts)
    started: float = field(default_factory=time.perf_counter)
    reported: float = field(default_factory=time.perf_counter)

    def add(self, row: Row) -> None:
        self.done += 1
        self.errors += bool(row.error)
        self.transient += row.transient
        if row.doubt:
            self.doubts.add(row.path, row.doubt)
        now = time.perf_counter()
        if now - self.reported >= PROGRESS_SECONDS:
            rate = (self.done - self.resumed) / (now - self.started)
            left = (self.total - self.done) / rate
            print(f"{self.done}/{self.total} {rate:.0f} images/s {left:.0f} s left", file=sys.stderr)
            self.reported = now

    def restart(self) -> None:
        self.done = self.errors = self.transient = self.resumed = 0
        self.doubts = Doubts()

    def skip(self, manifest: Manifest) -> None:
        self.done += manifest.rows
        self.resumed += manifest.rows
        self.errors += manifest.errors


def is_an_image(entry: Entry) -> bool:
    """Kaggle counts rows: a folder that could not be entered, or a tar file that is cut, is none."""
    return not entry.problem or has_image_suffix(entry.name)


@dataclass(frozen=True)
class Scoring:
    """What stays the same over all parts and pieces."""

    predictor: Predictor
    source: Source
    form: Format
    layout: Layout
    batch_size: int
    workers: int
    image_timeout: float

    def write(
        self, rows: range, file: IO[bytes], progress: Progress, contents: SetDigest | None = None
    ) -> Counter[str]:
        """Score the inputs of these numbers into a file: how many rows, errors, transient ones. What is
        read is added to `contents`."""
        writer = self.form.open_writer(file, self.layout)
        counts: Counter[str] = Counter()
        scored = score(
            self.predictor,
            self._entries(rows),
            self.source.read if contents is None else digesting(self.source.read, contents),
            self.batch_size,
            self.workers,
            self.image_timeout,
            self.layout.embeddings,
        )
        with closing(scored):  # also when the disk is full
            for row in scored:
                writer.write(row)
                counts.update(rows=1, errors=int(bool(row.error)), transient=int(row.transient))
                progress.add(row)
        writer.close()
        return counts

    def _entries(self, rows: range) -> Iterator[Entry]:
        entries = self.source.inventory.entries(rows.start, rows.stop)
        return filter(is_an_image, entries) if self.form is KAGGLE else entries

    def job(self) -> Job:
        settings = {
            "format": self.form.name,
            "top_k": self.layout.top_k,
            "embeddings": self.layout.embeddings,
            "batch_size": self.batch_size,
            "precision": self.predictor.precision,
            "images": self.source.location,
        }
        inventory = self.source.inventory
        return Job(file_sha256(self.predictor.path), inventory.digest(), len(inventory), settings)

    def made_with(self) -> dict[str, str]:
        versions = {"numpy": np.__version__, "pillow": PIL.__version__, "onnxruntime": ort.__version__}
        return {"provider": self.predictor.provider, **versions}


def earlier_manifest(part: Path, copy: LocalCopy, model: Path) -> Manifest | None:
    """Return what an earlier call with these bytes of a model left: the manifest of the part, or of its
    first piece."""
    for path in (part, _piece(part, 0)):
        copy.fetch(manifest_path(path))
        with suppress(ValueError):
            manifest = Manifest.read(path)
            if manifest.job.model_sha256 == file_sha256(model):
                return manifest
    return None


def score_part(
    scoring: Scoring,
    part: Path,
    rows: range,
    part_size: int,
    progress: Progress,
    resume: bool,
    keep_manifest: bool,
    copy: LocalCopy | None = None,
) -> None:
    """Write `part`, in pieces of `part_size` rows that a later call with `resume` does not score again.

    Another process may do the same at the same time. With `copy`, a later call may be on another
    machine: what is finished is published at once.
    """
    job = scoring.job()
    copy = copy or LocalCopy(part.parent)
    if resume:
        copy.fetch(part, manifest_path(part))
    pieces = list(cut(rows, part_size, scoring.batch_size))
    for attempt in range(1, TRIES + 1):
        progress.restart()
        if resume and (manifest := finished(part, job, rows)) and unchanged(scoring.source, manifest):
            progress.skip(manifest)
            _clean(part, copy)
            return
        if resume and attempt == 1 and (changed := difference(part, job)):
            print(f"{part.name} has another {changed}: it is scored again", file=sys.stderr)
        folder = pieces_folder(part)
        folder.mkdir(exist_ok=True)
        if resume and len(pieces) > 1:
            copy.fetch_folder(folder)
        try:
            if len(pieces) > 1:
                manifest = _join_pieces(scoring, job, part, pieces, progress, resume, copy)
            else:
                manifest = _score_piece(scoring, job, part, rows, progress, folder)
            copy.publish(part)
            if keep_manifest:
                manifest.write(part, folder)
                copy.publish(manifest_path(part))
        except FileNotFoundError as error:  # another process has finished this part and removed the pieces
            if attempt == TRIES:
                raise OSError(f"{folder} was removed {TRIES} times while it was in use: {error}") from error
            resume = True
        else:
            # Of errors that may pass, a later call repeats what the pieces have, and not the rest.
            if not (keep_manifest and manifest.transient and len(pieces) > 1):
                _clean(part, copy)
            return


def _piece(part: Path, number: int) -> Path:
    return pieces_folder(part) / f"{number:05}{part.suffix}"


def _clean(part: Path, copy: LocalCopy) -> None:
    remove_pieces(part)
    copy.remove_folder(pieces_folder(part))


def _score_piece(
    scoring: Scoring, job: Job, path: Path, rows: range, progress: Progress, folder: Path
) -> Manifest:
    stamps, contents = digest_stamps(scoring.source, rows), SetDigest()
    with atomic_write(path, folder=folder) as file:
        counts = scoring.write(rows, file, progress, contents)
        assert counts["rows"] == len(rows), f"{counts['rows']} rows for {len(rows)} inputs"
    errors, transient = counts["errors"], counts["transient"]
    return Manifest(
        job,
        rows.start,
        len(rows),
        errors,
        file_sha256(path),
        scoring.made_with(),
        transient=transient,
        stamps=stamps,
        contents=contents.hexdigest(),
    )


def _join_pieces(
    scoring: Scoring,
    job: Job,
    part: Path,
    pieces: list[range],
    progress: Progress,
    resume: bool,
    copy: LocalCopy,
) -> Manifest:
    folder = pieces_folder(part)
    paths, manifests = [], []
    for number, rows in enumerate(pieces):
        path = _piece(part, number)
        manifest = finished(path, job, rows) if resume else None
        if manifest is None or not unchanged(scoring.source, manifest):
            manifest = _score_piece(scoring, job, path, rows, progress, folder)
            manifest.write(path, folder)
            copy.publish(path, manifest_path(path))
        else:
            progress.skip(manifest)
        paths.append(path)
        manifests.append(manifest)
    try:
        with atomic_write(part, folder=folder) as file:
            join(paths, manifests, file)
    except ValueError as error:
        raise OSError(f"{error}: does another job write to the same output?") from error
    errors = sum(manifest.errors for manifest in manifests)
    transient = sum(manifest.transient for manifest in manifests)
    first, stop = pieces[0].start, pieces[-1].stop
    stamps, contents = SetDigest(), SetDigest()
    for manifest in manifests:
        stamps.add_digest(manifest.stamps)
        contents.add_digest(manifest.contents)
    return Manifest(
        job,
        first,
        stop - first,
        errors,
        file_sha256(part),
        scoring.made_with(),
        transient=transient,
        stamps=stamps.hexdigest(),
        contents=contents.hexdigest(),
    )
