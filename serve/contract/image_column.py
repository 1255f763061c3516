"""Column of a table that names images: which one it is."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from serve.contract.errors import UserError
from serve.contract.image_files import HALF, ImageFiles, Naming, clean
from serve.contract.listing import has_image_suffix
from serve.contract.tables import Table, TableRow
from serve.contract.urls import is_remote

NUMBERING = re.compile(r"|Unnamed: \d+(?:\.\d+)*|index|level_\d+", re.IGNORECASE)
GEOMETRY = re.compile(  # of boxes and pictures, as detectors' exports have it
    r"(?:.*\.)?(?:(?:image|img|bbox|box|object|roi|rect|region|orig(?:inal)?|file)[\s_.-]*)?"
    r"(?:width|height|depth|channels"
    r"|[xywh](?:[\s_.-]*(?:min|max|cent(?:er|re)|\d))?|[xy]?(?:min|max)[xy]?|left|top|right|bottom|area|size"
    r"|b?box(?:es)?|bndbox|segmentation|polygons?|points)",
    re.IGNORECASE,
)
UNLIKELY = re.compile(f"{NUMBERING.pattern}|{GEOMETRY.pattern}", re.IGNORECASE)


class _Found(NamedTuple):
    column: int
    distinct: int
    images: list[str]
    """Of the rows that were read, "" where none is found."""
    naming: Naming


def find_image_columns(table: Table, rows: Sequence[TableRow], files: ImageFiles) -> list[int]:
    """Return the columns most of whose values in these rows stand for images; the column label never does.

    Of columns with the same images the first one is returned; a numbering without a name, and a column with
    far fewer values, are left out beside another one. Names of files that do not exist count beside numbers
    that resemble names. Raises UserError when the only one may be two images.
    """
    found: list[_Found] = []
    lost: list[int] = []
    ambiguous = ""
    for i in range(len(table.columns)):
        values = list(dict.fromkeys(row.cells[i] for row in rows if row.cells[i].strip()))
        if not values or i in table.find("label"):
            continue
        try:
            naming, count = files.locate(values)
        except UserError as error:  # of numbers that only look like names of images, if another column fits
            ambiguous = ambiguous or str(error)
            continue
        if count >= max(1, HALF * len(values)):
            paths = {value: (files.find(value, naming) or [""])[0] for value in values}
            found.append(_Found(i, len(values), [paths.get(row.cells[i], "") for row in rows], naming))
        elif all(has_image_suffix(clean(value)) and not is_remote(value) for value in values):
            lost.append(i)
    if ambiguous and not found:
        raise UserError(ambiguous)
    most = max((column.distinct for column in found), default=0)
    kept = [c for c in found if not UNLIKELY.fullmatch(table.columns[c.column])]
    kept = [column for column in kept or found if 2 * column.distinct > most]
    kept.sort(key=lambda column: (not column.naming.listed, column.naming.suffix != ""))
    columns = [c.column for i, c in enumerate(kept) if not any(c.images == k.images for k in kept[:i])]
    if any(has_image_suffix(clean(row.cells[i])) for row in rows for i in columns):
        return columns
    return columns and columns + lost
