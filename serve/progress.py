"""How far a scoring job is, and what it prints at its start and at its end."""

import time
from contextlib import suppress
from dataclasses import dataclass, field

import PIL

from serve.contract.doubts import Doubts
from serve.contract.errors import print_line
from serve.contract.formats import count_by_name
from serve.contract.metadata import ModelMetadata
from serve.contract.urls import redact
from serve.inputs.sources import Source
from serve.outputs.layout import Row
from serve.predictor import Predictor
from serve.shards import Manifest
from serve.summary import JobSummary, summary_of

PRINT_SECONDS = 5.0


@dataclass
class Progress:
    total: int
    done: int = 0
    resumed: int = 0
    """Rows that an earlier call has scored."""
    doubts: Doubts = field(default_factory=Doubts)
    summary: JobSummary = field(default_factory=JobSummary)
    """Of the pieces that are finished."""
    started: float = field(default_factory=time.perf_counter)
    printed: float = field(default_factory=time.perf_counter)

    def add(self, row: Row) -> None:
        self.done += 1
        if row.doubt:
            self.doubts.add(row.path, row.doubt)
        now = time.perf_counter()
        if now - self.printed >= PRINT_SECONDS:
            rate = (self.done - self.resumed) / (now - self.started)
            left = (self.total - self.done) / rate
            print_line(f"{self.done}/{self.total} {rate:.0f} images/s {left:.0f} s left")
            self.printed = now

    def restart(self) -> None:
        self.done = self.resumed = 0
        self.doubts, self.summary = Doubts(), JobSummary()

    def skip(self, manifest: Manifest) -> None:
        self.done += manifest.rows
        self.resumed += manifest.rows
        self.summary.join(summary_of(manifest))

    def print_end(self, output: str, source: Source) -> None:
        seconds = time.perf_counter() - self.started
        resumed = f", {self.resumed} rows from before" if self.resumed else ""
        with suppress(OSError):  # the rows are written, whoever still listens
            print(
                f"{self.done} rows in {redact(output)}: {self.summary.scored} scored, "
                f"{self.summary.errors} errors{resumed}; {seconds:.1f} s, "
                f"{(self.done - self.resumed) / seconds:.0f} images/s",
                flush=True,
            )
        warnings = [*self.doubts.lines(), *source.describe_left_out()]
        if self.summary.transient:
            warnings.insert(0, f"{self.summary.transient} errors may pass: see the column error")
        for line in warnings:
            print_line(f"warning: {line}")
        if source.ignored:
            kinds = count_by_name(source.inputs.left_out.others)
            print_line(f"ignored {source.ignored} files without an image suffix ({kinds})")


def print_start(which: str, model: str, predictor: Predictor, source: Source) -> None:
    """`which` names the images, and the part of them that is scored."""
    names = predictor.metadata.class_names
    print_line(
        f"scoring {redact(which)} with {redact(model)}; "
        f"classes: {', '.join(names[:10])}{', ...' if names[10:] else ''}\n"
        f"provider {predictor.provider} at {predictor.precision}, {predictor.share}"
        + (f" (auto: {predictor.reason})" if predictor.reason else "")
    )
    if warning := resampling_warning(predictor.metadata):
        print_line(warning)
    if repeated := source.inventory.repeated:
        print_line(f"warning: {repeated} inputs are named twice and scored once")


def resampling_warning(metadata: ModelMetadata) -> str:
    """Warn of a Pillow of another major version, whose resampling may differ; "" for the verified one."""
    verified = metadata.versions.get("pillow", PIL.__version__)
    if verified.partition(".")[0] == PIL.__version__.partition(".")[0]:
        return ""
    return (
        f"warning: this model was verified with Pillow {verified}, this is {PIL.__version__}: "
        "resized pixels can differ a little"
    )
