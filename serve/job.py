"""From inputs to an output file: in one go, or as a part that survives a kill."""

import time
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime as ort
import PIL

from serve.batch import score
from serve.changes import SetDigest, digest_stamps, digesting, unchanged
from serve.contract.errors import print_line
from serve.contract.files import atomic_write, file_sha256
from serve.contract.heic import PACKAGE, heic_version
from serve.contract.images import MAX_MEGAPIXELS
from serve.inputs.sources import Source
from serve.local_copy import LocalCopy
from serve.outputs.join import join
from serve.outputs.layout import Format, Layout
from serve.predictor import Predictor
from serve.progress import Progress
from serve.shards import (
    Job,
    Manifest,
    cut,
    difference,
    finished_part,
    manifest_path,
    pieces_folder,
    remove_pieces,
)
from serve.summary import JobSummary, summary_of

TRIES = 3  # when another process has finished the same part and cleaned up under our hands


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
    max_megapixels: float = MAX_MEGAPIXELS
    named: dict[str, Any] = field(default_factory=dict)
    """How the model and the images were given, for the summary."""

    @cached_property
    def model_sha256(self) -> str:
        """Digest of the model file, computed once: a later export may replace the file while it scores."""
        return file_sha256(self.predictor.path)

    def write(
        self, rows: range, file: IO[bytes], progress: Progress, contents: SetDigest | None = None
    ) -> JobSummary:
        """Score the inputs of these numbers into a file, and return their summary. What is read is added to
        `contents`."""
        writer = self.form.open_writer(file, self.layout)
        metadata, started = self.predictor.metadata, time.perf_counter()
        profile = metadata.validation_on(self.predictor.provider, self.predictor.precision)
        summary = JobSummary(metadata.class_names, profile)
        scored = score(
            self.predictor,
            self.source.inventory.entries(rows.start, rows.stop),
            self.source.read if contents is None else digesting(self.source.read, contents),
            self.batch_size,
            self.workers,
            self.image_timeout,
            self.layout.embeddings,
            max_megapixels=self.max_megapixels,
        )
        with closing(scored):  # also when the disk is full
            for row in scored:
                writer.write(row)
                summary.add(row)
                progress.add(row)
        writer.close()
        summary.seconds = time.perf_counter() - started
        progress.summary.join(summary)
        return summary

    def facts(self) -> dict[str, Any]:
        """Return the values beside the counts of a summary."""
        metadata = self.predictor.metadata
        made_with = self.made_with()
        return {
            **self.named,
            "model_sha256": self.model_sha256,
            "model_precision": metadata.precision,
            "run_name": metadata.run_name,
            "provider": made_with.pop("provider"),
            "precision": self.predictor.precision,
            "versions": made_with,
        }

    def job(self) -> Job:
        settings = {
            "format": self.form.name,
            "top_k": self.layout.top_k,
            "embeddings": self.layout.embeddings,
            "batch_size": self.batch_size,
            "precision": self.predictor.precision,
            "images": self.source.location,
            "max_megapixels": self.max_megapixels,
        }
        inventory = self.source.inventory
        return Job(self.model_sha256, inventory.digest(), len(inventory), settings)

    def made_with(self) -> dict[str, str]:
        versions = {"numpy": np.__version__, "pillow": PIL.__version__, "onnxruntime": ort.__version__}
        return {"provider": self.predictor.provider, **versions, **heic_version()}


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


def _piece(part: Path, number: int) -> Path:
    return pieces_folder(part) / f"{number:05}{part.suffix}"


class PartWriter:
    """Writes a part in pieces that a later call can keep.

    Another process may do the same at the same time. With a URL in `copy`, a later call may be on
    another machine: what is finished is published at once.
    """

    def __init__(self, scoring: Scoring, part: Path, rows: range, progress: Progress, copy: LocalCopy):
        self.scoring, self.part, self.rows, self.progress = scoring, part, rows, progress
        self.copy, self.folder, self.job = copy, pieces_folder(part), scoring.job()

    def write(self, part_size: int, resume: bool, keep_manifest: bool) -> None:
        """Write the part, in pieces of `part_size` rows; with `resume` keep what is finished."""
        if resume:
            self.copy.fetch(self.part, manifest_path(self.part))
        pieces = list(cut(self.rows, part_size, self.scoring.batch_size))
        for attempt in range(1, TRIES + 1):
            self.progress.restart()
            if resume and (manifest := self._finished(self.part, self.rows)):
                self.progress.skip(manifest)
                self._update_limit(manifest)
                self._clean()
                return
            if resume and attempt == 1 and (changed := difference(self.part, self.job)):
                print_line(f"{self.part.name} has another {changed}: it is scored again")
            try:
                self.folder.mkdir(exist_ok=True)
                manifest = self._write_part(pieces, resume)
                self.copy.publish(self.part)
                if keep_manifest:
                    manifest.write(self.part, self.folder)
                    self.copy.publish(manifest_path(self.part))
            except FileNotFoundError as error:  # another process has removed the pieces
                if attempt == TRIES:
                    raise OSError(
                        f"{self.folder} was removed {TRIES} times while in use: {error}"
                    ) from error
                resume = True
            else:
                # Of errors that may pass, a later call repeats what the pieces have, and not the rest.
                if not (keep_manifest and manifest.transient and len(pieces) > 1):
                    self._clean()
                return

    def _update_limit(self, manifest: Manifest) -> None:
        """Let a part that is kept have this call's --max-errors, by which merging judges the job."""
        limit = {"max_errors": self.scoring.named.get("max_errors")}
        if manifest.summary and manifest.summary != manifest.summary | limit:
            replace(manifest, summary=manifest.summary | limit).write(self.part)
            self.copy.publish(manifest_path(self.part))

    def _write_part(self, pieces: list[range], resume: bool) -> Manifest:
        if len(pieces) <= 1:
            return self._score(self.part, self.rows)
        if resume:
            self.copy.fetch_folder(self.folder)
        paths, manifests = [], []
        for number, rows in enumerate(pieces):
            path = _piece(self.part, number)
            manifest = self._finished(path, rows) if resume else None
            if manifest:
                self.progress.skip(manifest)
            else:
                manifest = self._score(path, rows)
                manifest.write(path, self.folder)
                self.copy.publish(path, manifest_path(path))
            paths.append(path)
            manifests.append(manifest)
        return self._join(paths, manifests)

    def _finished(self, path: Path, rows: range) -> Manifest | None:
        """Return the manifest of a part or piece that can be kept."""
        manifest = finished_part(path, self.job, rows)
        if manifest is None or (manifest.errors and heic_version() and PACKAGE not in manifest.made_with):
            return None  # the errors may be of HEIC, whose package has been installed since
        return manifest if unchanged(self.scoring.source, manifest) else None

    def _score(self, path: Path, rows: range) -> Manifest:
        stamps, contents = digest_stamps(self.scoring.source, rows), SetDigest()
        with atomic_write(path, folder=self.folder) as file:
            summary = self.scoring.write(rows, file, self.progress, contents)
            assert summary.rows == len(rows), f"{summary.rows} rows for {len(rows)} inputs"
        return self._manifest(path, rows, summary, stamps, contents.hexdigest())

    def _join(self, paths: list[Path], manifests: list[Manifest]) -> Manifest:
        try:
            with atomic_write(self.part, folder=self.folder) as file:
                join(paths, manifests, file)
        except ValueError as error:
            raise OSError(f"{error}: does another job write to the same output?") from error
        stamps, contents, summary = SetDigest(), SetDigest(), JobSummary()
        for manifest in manifests:
            stamps.add_digest(manifest.stamps)
            contents.add_digest(manifest.contents)
            summary.join(summary_of(manifest))
        return self._manifest(self.part, self.rows, summary, stamps.hexdigest(), contents.hexdigest())

    def _manifest(
        self, path: Path, rows: range, summary: JobSummary, stamps: str, contents: str
    ) -> Manifest:
        return Manifest(
            self.job,
            rows.start,
            len(rows),
            summary.errors,
            file_sha256(path),
            self.scoring.made_with(),
            transient=summary.transient,
            stamps=stamps,
            contents=contents,
            summary=replace(summary, facts=self.scoring.facts()).to_dict(),
        )

    def _clean(self) -> None:
        remove_pieces(self.part)
        self.copy.remove_folder(self.folder)
