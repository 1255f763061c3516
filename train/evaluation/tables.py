"""Tables for people (Markdown) and for programs (CSV)."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.files import atomic_write


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are padded, so that it also reads well on a terminal."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def check_reports_replaceable(reports: Mapping[Path, str], overwrite: bool) -> None:
    """Raise UserError if a file of other origin would be replaced, unless `overwrite` is given.

    `reports` are the files that one command writes together, texts with their first characters, and figures
    with "", which are replaced if one of the texts is.
    """
    existing = [] if overwrite else [path for path in reports if path.exists()]
    ours = {path for path in existing if reports[path] and _begins(path, reports[path])}
    for path in existing:
        if path not in ours and (reports[path] or not ours):
            raise UserError(
                f"{path} exists, and this command did not write it: choose another folder, or give "
                "--overwrite to replace it"
            )


def _begins(path: Path, start: str) -> bool:
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(start)) == start
    return False


def write_table(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] = (),
    errors: str = "backslashreplace",
) -> None:
    """Write a CSV file with these or the first row's columns, and replace an older one whole. `errors` is
    that of `open`."""
    with atomic_write(path, "w", newline="", errors=errors) as file:
        writer = csv.DictWriter(
            file, columns or list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
        )
        writer.writeheader()
        writer.writerows(rows)
