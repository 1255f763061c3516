"""Submissions to contests: header, ids and order of the sample, and what its values show."""

import io
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from serve.contract.errors import UserError, print_line
from serve.contract.listing import has_image_suffix
from serve.contract.urls import redact
from serve.inputs.inventory import Entry, Inventory
from serve.outputs.layout import Format, Row, Writer
from serve.outputs.sample import Sample, few
from serve.outputs.submission_columns import Column, Values, find_column

MOST_NAMED = 20  # unreadable images, each in a warning of its own


@dataclass(frozen=True)
class Submission:
    sample: Sample
    column: Column
    inventory: Inventory
    """The images that the sample names, in its order."""
    left_out: list[str]
    """Images that the sample does not name, as literals, and folders that could not be read."""
    key_of: Callable[[str], str]
    """What an image's name is found by."""
    positions: dict[str, int]
    """Key -> number of the row."""

    def print_start(self) -> None:
        print_line(f"submission as {redact(self.sample.path)}: {self.column.meaning}")
        if self.left_out:
            names = ", ".join(self.left_out[:5]) + (", ..." if self.left_out[5:] else "")
            print_line(f"{len(self.left_out)} inputs are not in it and get no row: {names}")

    @property
    def form(self) -> Format:
        # whose work a file of this form is cannot be seen: another model's, or labels
        return Format("submission", ".csv", lambda file, _: SubmissionWriter(file, self), lambda _: False)


class SubmissionWriter(Writer):
    def __init__(self, file: IO[bytes], submission: Submission):
        self.submission, self.unreadable = submission, 0
        self.text = io.TextIOWrapper(file, submission.sample.encoding, "surrogateescape", newline="")
        self.text.write(submission.sample.header)

    def write(self, row: Row) -> None:
        submission, cells = self.submission, self.submission.column.unreadable
        if row.probabilities is not None:
            cells = submission.column.cells(row.probabilities)
        else:
            self.unreadable += 1
            if self.unreadable <= MOST_NAMED:
                filler = f"{cells[0]}, ..." if cells[1:] else cells[0]
                print_line(f"warning: {row.path!r} cannot be scored, its row gets {filler}: {row.error}")
        row_id = submission.sample.ids[submission.positions[submission.key_of(row.path)]]
        self.text.write(submission.sample.line(row_id, cells))

    def close(self) -> None:
        self.text.flush()
        self.text.detach()
        if self.unreadable > MOST_NAMED:
            print_line(
                f"warning: {self.unreadable} images are not scored; without --sample-submission each one's "
                "row has the reason"
            )


def make_submission(
    sample: Sample, class_names: Sequence[str], values: Values, inventory: Inventory
) -> Submission:
    """Decide what the sample's columns hold, and find the image of each of its ids.

    Raises:
        UserError: that is not clear, a class has no column, or an id no image.
    """
    column = find_column(sample, class_names, values)
    key_of, positions = match_images(sample, lambda: filter(_is_image, inventory.entries()))
    left_out: list[str] = []

    def ordered() -> Iterable[Entry]:
        for entry in inventory.entries():
            position = positions.get(key_of(entry.name)) if _is_image(entry) else None
            if position is None:
                left_out.append(f"{entry.name!r}{entry.problem and f' ({entry.problem})'}")
            else:
                yield entry._replace(key=f"{position:010}")

    images = Inventory.sort(ordered())
    images.repeated = inventory.repeated
    return Submission(sample, column, images, left_out, key_of, positions)


def _is_image(entry: Entry) -> bool:
    """Return whether it can have an id: not a folder that was not entered, or a tar file that is cut."""
    return not entry.problem or has_image_suffix(entry.name)


def match_images(
    sample: Sample, entries: Callable[[], Iterable[Entry]]
) -> tuple[Callable[[str], str], dict[str, int]]:
    """Return the key of an image's name, and key -> number of the row, by the first rule that finds each id
    exactly one image: path, path without suffix, file name, file name without suffix.

    Raises:
        UserError: an id has no image, or two.
    """
    ids = sample.ids
    errors = [(len(ids) + 1, "several ids name the same image")]
    for id_key, name_key in RULES:
        positions = {id_key(text): i for i, text in enumerate(ids)}
        if len(positions) < len(ids):
            continue
        found: dict[int, str] = {}
        twice = example = ""
        for entry in entries():
            example = example or entry.name
            position = positions.get(name_key(entry.name))
            if position is None:
                continue
            if position in found:
                twice = (
                    twice or f"{found[position]!r} and {entry.name!r} have the same id {ids[position]!r}"
                )
            found[position] = entry.name
        if len(found) == len(ids) and not twice:
            return name_key, positions
        absent = [text for i, text in enumerate(ids) if i not in found]
        error = twice
        if absent:
            error = f"{len(absent)} of {len(ids)} ids have no image in --images: {few(absent)}; images are "
            error += f"named as {example!r}"
        errors.append((len(absent), error))
    raise UserError(f"{sample}: {min(errors)[1]}")


def _path(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip().replace("\\", "/")).removeprefix("./")


def _file(text: str) -> str:
    return _path(text).rpartition("/")[2]


def _without_suffix(text: str) -> str:
    path = _path(text)
    return path.rpartition(".")[0] if has_image_suffix(path) else path


def _stem(text: str) -> str:
    return _file(_without_suffix(text))


# (key of an id, key of an image's name), the strictest first
RULES = (
    (_path, _path),
    (_path, _without_suffix),
    (_path, _file),
    (_path, _stem),
    (_file, _file),
    (_stem, _stem),
)
