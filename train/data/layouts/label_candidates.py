"""Columns of a label file that hold labels: one named label, the only one that can be, or one a class."""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from serve.contract.errors import UserError
from serve.contract.image_column import GEOMETRY, NUMBERING
from serve.contract.image_files import PART
from serve.contract.listing import has_image_suffix
from serve.contract.tables import TableRow
from serve.contract.urls import is_remote
from train.data.labels import listed
from train.data.layouts.soft_labels import SOFT_COLUMN

SPLIT_COLUMNS = {"split", "subset", "partition", "set", "phase", "usage", "fold", "kfold", "folds"}
"""Names of columns in which a number names a part."""
FOLDS = {"fold", "kfold", "folds"}
MOST_PARTS = 3
NUMBERED_PART = re.compile(r"(?:k?fold|split|part)?[\s_-]*-?\d+(?:\.0)?")
IS_PART = re.compile(
    r"is[\s_.-]*(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?:[\s_.-]*(?:image|set))?", re.IGNORECASE
)
"""Names of columns of 0 and 1: fastai's is_valid, is_test, is_training_image."""
YES, NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}
BOXES = re.compile(r"\S+(?: -?\d+(?:\.\d+)?){4}(?: |$)")
MOST_MEASURED = 20  # different fractions that may still be classes, in a column that is named as the label
FEW_ROWS = 20
FEW_IMAGES = 0.9  # different texts for each row, at most, of a column that may still hold classes
SHOWN = 6
MANY = "differs in nearly every row"
MEASURED = "holds measurements"
GROUPS = re.compile(
    r"(?:patient|subject|lesion|case|participant|animal|slide)s?[\s_.-]*(?:id|no|number)?|k?folds?",
    re.IGNORECASE,
)
"""Names of columns in which images have a value in common that belong on one side of a split."""


class ColumnsError(UserError):
    """Several columns may hold the images or the labels."""


def find_label_columns(
    source: str, columns: Sequence[str], rows: Sequence[TableRow], image: int
) -> list[int]:
    """Return the column of the labels, or those of the classes, exactly one of which is 1 in each row.

    Raises UserError when no column or more than one can be the label, or rows have several classes.
    """
    named = [i for i, name in enumerate(columns) if name.casefold() == "label"]
    if named:
        return named[:1]
    others = [i for i in range(len(columns)) if i != image and not columns[i].startswith(SOFT_COLUMN)]
    distinct = {i: {row.cells[i].strip() for row in rows} for i in others}
    single = {i: {text for text in distinct[i] if not text.startswith("[")} for i in others}
    measures = [i for i in others if GEOMETRY.fullmatch(columns[i]) and _numbers(single[i])]
    if len(measures) == 1 and len(columns[measures[0]]) == 1:  # y without x is the target
        measures = []
    signs = [i for i in others if {text.casefold() for text in distinct[i]} <= YES | NO]
    if not all(len(classes_of(row, signs)) == 1 for row in rows):  # as of the classes left, right and train
        signs = [i for i in signs if i not in measures and not _holds_parts(columns[i], distinct[i])]
    varied = [i for i in signs if len(distinct[i]) > 1]
    reasons = {i: _reason(columns[i], distinct[i], len(rows)) for i in others if i not in varied}
    reasons |= {i: "measures pictures or boxes" for i in measures if len(distinct[i] - {""}) > 1}
    candidates = [[i] for i, reason in reasons.items() if not reason]
    if len(varied) > 1 and (not candidates or all(len(classes_of(row, signs)) == 1 for row in rows)):
        candidates.append(signs)
    else:
        candidates += [[i] for i in varied]
    names = [i for (i, *more) in candidates if not more and not _numbers(distinct[i])]
    candidates = [
        found
        for found in candidates
        if len(found) > 1 or found[0] in names or not any(_are_one_to_one(rows, found[0], i) for i in names)
    ]
    if candidates:  # classes of one or two images each, as of a small sample, are doubtful, not nothing
        few = [i for i in others if reasons.get(i) == MANY and len(distinct[i]) <= FEW_IMAGES * len(rows)]
        candidates += [[i] for i in few if not _numbers(distinct[i])]
    if len(candidates) == 1:
        return candidates[0]
    likely = [columns[i] for found in candidates for i in found]
    if twice := [name for name in likely if likely.count(name) > 1]:
        raise UserError(f"{source} has the column {twice[0]} twice: remove one of them")
    if candidates:
        flags = [column_flag(columns[image], *(columns[i] for i in found)) for found in candidates[:2]]
        raise ColumnsError(
            f"{source}: the labels may be in the columns {listed(likely, SHOWN)}: name that of the images "
            f"and that of the labels, as in {' or '.join(flags)}"
        )
    raise UserError(_no_label(source, columns, rows, image, reasons))


def classes_of(row: TableRow, columns: Iterable[int]) -> list[int]:
    """Return those of the columns that are 1 in the row."""
    return [i for i in columns if row.cells[i].strip().casefold() in YES]


def check_labels_are_classes(source: str, column: str, labels: Iterable[str]) -> None:
    """Raise UserError when the distinct labels are measurements."""
    values = set(labels)
    if len(values) > MOST_MEASURED and _is_measured(values):
        raise UserError(
            f"{source}: the column {column!r} holds {len(values)} different numbers with fractions, such "
            f"as {min(values)}: measurements, not classes; write a class for each range of them"
        )


def find_split_column(
    source: str, columns: Sequence[str], rows: Sequence[TableRow], taken: Collection[int]
) -> int | None:
    """Return the column that says which rows train and which validate; None without one.

    Raises UserError when such a column holds anything else as well.
    """
    flags = [name for i, name in enumerate(columns) if i not in taken and IS_PART.fullmatch(name)]
    if len(flags) > 1:
        raise UserError(
            f"{source} has the columns {' and '.join(flags)}: replace them with one column 'split' "
            "of train, val and test"
        )
    for i, name in enumerate(columns):
        if i in taken:
            continue
        values = {row.cells[i].strip() for row in rows}
        parts = {part_of_cell(name, value) for value in values} - {""}
        meant = name.casefold() == "split" or len(parts) > 1 or (name.casefold() in SPLIT_COLUMNS and parts)
        if name.casefold() in SPLIT_COLUMNS - FOLDS and 1 < len(values) <= MOST_PARTS:
            meant = meant or all(map(str.isdecimal, values))
        odd = next((row for row in rows if not part_of_cell(name, row.cells[i])), None)
        if odd and meant:
            renamed, removed = "give the column another name", "remove the column if it does not name parts"
            raise UserError(
                f"{source} line {odd.line}: the column {name} holds {odd.cells[i]!r}, neither train, val "
                f"nor test: correct it, or {removed if len(parts) > 1 else renamed}"
            )
        if len(parts) > 1:
            if IS_PART.fullmatch(name):
                _check_most_train(source, name, [row.cells[i] for row in rows])
            return i
    return None


def _check_most_train(source: str, name: str, cells: Iterable[str]) -> None:
    """Raise UserError when a column such as is_valid sets most rows aside: it may mark usable images."""
    counts = Counter(part_of_cell(name, cell) for cell in cells)
    train = counts.pop("train")
    if counts.total() > train:
        raise UserError(
            f"{source}: by the column {name}, {counts.total()} rows validate and {train} train: if it "
            "marks usable images, rename it; else replace it with a column split of train and val"
        )


def warn_of_groups(
    columns: Sequence[str], rows: Sequence[TableRow], taken: Collection[int], images: int
) -> list[str]:
    """Return a warning about columns of patients and the like, if there are some: no split heeds them."""
    names = [
        name
        for i, name in enumerate(columns)
        if i not in taken
        and GROUPS.fullmatch(name)
        and 1 < len({row.cells[i].strip() for row in rows} - {""}) < images
    ]
    if not names:
        return []
    return [
        f"images of one {listed(names)} may be on both sides of a random split, and validation then "
        "flatters the model: a column split of train and val keeps them apart"
    ]


def part_of_cell(column: str, cell: str) -> str:
    """Return train, val or test; "" for any other cell."""
    text = cell.strip().casefold()
    if flag := IS_PART.fullmatch(column):
        part = _part_of_word(flag[1].casefold())
        return part if text in YES else ("val" if part == "train" else "train") if text in NO else ""
    return _part_of_word(text)


def _part_of_word(text: str) -> str:
    found = PART.fullmatch(text)
    return (found.lastgroup or "") if found else ""


def _holds_parts(name: str, values: Iterable[str]) -> bool:
    filled = [value.casefold() for value in values if value]
    numbered = name.casefold() in SPLIT_COLUMNS and all(map(NUMBERED_PART.fullmatch, filled))
    return numbered or all(part_of_cell(name, value) for value in filled)


def _reason(name: str, values: set[str], rows: int) -> str:
    """Return why a column holds no labels; "" if it can."""
    filled = values - {""}
    if len(filled) < 2:
        return "has one value"
    if NUMBERING.fullmatch(name):
        return "is a numbering"
    if _holds_parts(name, filled):
        return "holds parts of the data set"
    if _is_measured(filled):
        return MEASURED
    if len(filled) == rows or (rows >= FEW_ROWS and 2 * len(filled) > rows):
        return MANY
    if all(has_image_suffix(value) or is_remote(value) for value in filled):
        return "holds names of files"
    return ""


def _numbers(values: Iterable[str]) -> list[float]:
    """Return the values but "" as numbers; [] if one is none."""
    try:
        return [float(value.replace(",", ".")) for value in values if value]
    except ValueError:
        return []


def _is_measured(values: Iterable[str]) -> bool:
    return any(number != round(number) for number in _numbers(values) if abs(number) < 1e300)


def _are_one_to_one(rows: Sequence[TableRow], i: int, j: int) -> bool:
    """Return whether each value of one column has one of the other, as numbers and names of classes."""
    pairs = {(row.cells[i].strip(), row.cells[j].strip()) for row in rows}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _no_label(
    source: str, columns: Sequence[str], rows: Sequence[TableRow], image: int, reasons: dict[int, str]
) -> str:
    line = f"{source} has no column of labels beside {columns[image]!r}"
    if not reasons:
        return f"{line}: add the column label"
    known = [f"{columns[i]!r} {reason}" for i, reason in list(reasons.items())[:SHOWN]]
    more = f", ... ({len(reasons)} columns)" if len(reasons) > SHOWN else ""
    line += f": {', '.join(known)}{more}"
    for i in reasons:
        if all(BOXES.match(row.cells[i].strip()) for row in rows if row.cells[i].strip()):
            new = source.removesuffix(".csv") + ".new.csv"
            command = f"sed -E 's/ .*//' < {shlex.quote(source)} > {shlex.quote(new)}"
            return f"{line}. {columns[i]!r} lists boxes after the class; to keep the class, run: {command}"
    likely = [i for i, reason in reasons.items() if reason == MANY]
    measured = [i for i, reason in reasons.items() if reason == MEASURED]
    likely += [i for i in measured if len({row.cells[i] for row in rows}) <= MOST_MEASURED]
    flag = f". If it is the class, give {column_flag(columns[image], columns[likely[0]])}" if likely else ""
    return line + flag


def column_flag(*names: str) -> str:
    """Return --columns with these names as it is typed in a shell."""
    text = ",".join(f'"{name}"' if "," in name else name for name in names)
    return f"--columns {shlex.quote(text)}"
