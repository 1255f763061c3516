"""Labels of a data set as people write them, and checks for two spellings of a class and missing labels."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from statistics import median

from serve.contract.errors import UserError
from serve.contract.text_encoding import is_undecoded, likely_encodings, reads_as

NUMBER = re.compile(r"[-+]?\d+([.]\d*|,\d{1,2})?(e[-+]?\d{1,3})?", re.IGNORECASE)
SEPARATORS = re.compile(r"(?<=[^\W_])([\s_]+|\s*-\s*)(?=[^\W_])")
LEADING_ZEROS = re.compile(r"(?<![\d.,])0+(?=\d)")
# Cyrillic and Greek letters that look like Latin ones, typographic quotes and dashes
LOOK_ALIKE = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0408\u0405"
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf"
    "\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212",
    "ABEKMHOPCTYXIJSaeopcyxijsABEZHIKMNOPTYXo''\"\"------",
)
# What pandas and spreadsheets write for a missing value; not none or na, which are classes too
ACCIDENTAL = {"nan", "NaN", "NAN", "-nan", "-NaN", "<NA>", "NaT", "#N/A", "#NA", "#VALUE!", "#REF!"}
ACCIDENTAL |= {"#NAME?", "#DIV/0!", "#NULL!", "#NUM!", "#N/A N/A"}  # as the name of a folder, too
ACCIDENTAL |= {"\\N", "1.#QNAN", "-1.#QNAN", "1.#IND", "-1.#IND"}  # MySQL's, Windows'
MISSING = ACCIDENTAL | {"", "None", "NA", "NULL", "Null", "null", "(null)", "N/A", "n/a", "N.A.", "n.a."}
# In words; such a class is rarely meant, and never an error
UNLABELLED = re.compile(r"(?:no|without|missing) ?(?:a )?labels?|(?:un|not ?|non ?)(?:labell?ed|annotated)")
PLACEHOLDER = re.compile(r"[?.\-\u2013\u2014]+")
MOST_COUNTED = 12  # classes whose numbers of images are printed one by one
DIFFER = "differ only by case, white space, separators, how a number is written or look-alike characters"


class RowsError(UserError):
    """Rows of a label file are wrong, and most of its rows name images that exist."""


@dataclass(frozen=True)
class LabelledPaths:
    """Images and labels that a layout found in a data set (see layouts/registry.py)."""

    root: Path
    labels: dict[str, str]
    """Path -> label; paths are relative to `root` (a label file may name absolute ones)."""
    layout: str
    """Description of the layout and of what was left out on purpose."""
    warnings: list[str] = field(default_factory=list)
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    """Soft labels: path -> class -> probability, for the images that have some."""
    validation: dict[str, str] = field(default_factory=dict)
    """Path -> label of the images that the data set itself sets aside for validation."""


def listed(names: Collection[str], most: int = 10) -> str:
    """Return names for a message: the first `most`, and how many there are if there are more."""
    few = ", ".join(repr(name) for _, name in zip(range(most), names, strict=False))
    return f"{few}, ... ({len(names)})" if len(names) > most else few


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return numbers of images by class for a line of text: of many classes the range, the median and the
    three smallest."""
    if len(counts) <= MOST_COUNTED:
        return ", ".join(f"{name!r} {count}" for name, count in counts.items())
    if len(set(counts.values())) == 1:
        return f"{len(counts)} classes, {min(counts.values())} in each"
    smallest = sorted(counts, key=counts.__getitem__)[:3]
    named = ", ".join(f"{name!r} {counts[name]}" for name in smallest)
    return (
        f"{len(counts)} classes, {min(counts.values())} to {max(counts.values())} in each, median "
        f"{median(counts.values()):g}; smallest: {named}"
    )


def warn_of_classes(names: Collection[str], lack: str) -> list[str]:
    """Return one line that warns of the classes that lack something, or none."""
    if not names:
        return []
    if len(names) == 1:
        return [f"warning: class {listed(names)} has {lack}"]
    return [f"warning: {len(names)} classes have {lack}: {listed(names)}"]


def normal(label: str) -> str:
    """Return the label composed (NFC, where a Mac writes NFD) and without white space around it."""
    return unicodedata.normalize("NFC", label).strip()


def unify(labels: dict[str, str], source: str, notes: list[str]) -> dict[str, str]:
    """Return path -> label in its normal form; append to `notes` classes that hardly differ or look wrong.

    Raises:
        UserError: two labels are probably one class, or one is not UTF-8 or has lost characters.
    """
    counts: Counter[str] = Counter()
    names = {}
    for label, count in Counter(labels.values()).items():
        names[label] = normal(label)
        counts[unicodedata.normalize("NFC", label)] += count
    if undecoded := [os.fsencode(label) for label in counts if is_undecoded(label)]:
        likely = likely_encodings(undecoded)
        raise UserError(
            f"{source}: the label {undecoded[0]!r} is not UTF-8; it {reads_as(likely)}; rename its folder "
            f"or files: convmv -r --notest -f {next(iter(likely), 'ENCODING')} -t utf-8 FOLDER"
        )
    for name in dict.fromkeys(names.values()):
        if "\ufffd" in name:
            raise UserError(
                f"{source}: the label {name!r} holds U+FFFD in place of characters that a conversion lost: "
                "take it from the original again"
            )
        if name in ACCIDENTAL or UNLABELLED.fullmatch(spelling(name)):
            notes.append(f"warning: {source}: the class {name!r} often stands for a missing label")
        if (meant := _decode_again(name)) != name:
            notes.append(f"warning: {source}: the class {name!r} is probably {meant!r}, decoded wrongly")
    _check_spellings(counts, source, notes)
    return {path: names[label] for path, label in labels.items()}


def _check_spellings(counts: Mapping[str, int], source: str, notes: list[str]) -> None:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        groups[spelling(name)].append(name)
    pairs = [pair for names in groups.values() for pair in combinations(sorted(names), 2)]
    if doubtful := [pair for pair in pairs if not _may_differ(*pair)]:
        a, b = doubtful[0]
        first, second = _shown(a, b)
        others = ", ".join(" and ".join(_shown(*pair)) for pair in doubtful[1:4])
        raise UserError(
            f"{source}: the labels {first} ({counts[a]} images) and {second} ({counts[b]} images) {DIFFER}"
            f"{f' (so do {others})' if others else ''}: give them one name if they are one class, and "
            "names that differ by more if they are two"
        )
    if pairs:
        a, b = pairs[0]
        more = f", ... ({len(pairs)} pairs)" if pairs[1:] else ""
        notes.append(f"{source}: {a!r} and {b!r}{more} are trained as two classes")


def spelling(name: str) -> str:
    """Return one text for all labels that are probably one class."""
    text = unicodedata.normalize("NFKC", _decode_again(name).translate(LOOK_ALIKE))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").strip()  # Cf: invisible
    if NUMBER.fullmatch(text):
        return f"={Fraction(Decimal(text.replace(',', '.')))}"
    return LEADING_ZEROS.sub("", SEPARATORS.sub(" ", text.casefold()))


def spelling_hints(unknown: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return ends of a message that pair unknown classes with known ones of the same spelling."""
    by_spelling = {spelling(name): name for name in known}
    pairs = [(name, by_spelling[spelling(name)]) for name in unknown if spelling(name) in by_spelling]
    return [f"; {name!a} is probably {other!a}: give them one name" for name, other in pairs[:3]]


def _decode_again(name: str) -> str:
    """Return the text of UTF-8 that was decoded as something else: 'caf\u00c3\u00a9' is 'caf\u00e9'."""
    for encoding in () if name.isascii() else ("cp1252", "latin-1", "cp437"):
        try:
            return normal(name.encode(encoding).decode("utf-8"))
        except UnicodeError:
            continue
    return name


def _may_differ(a: str, b: str) -> bool:
    """Return whether labels of one spelling are usual classes: a and A in sets of letters, a1 and a01."""
    if not NUMBER.fullmatch(a) and LEADING_ZEROS.sub("", a) == LEADING_ZEROS.sub("", b):
        return True
    words = SEPARATORS.sub(" ", a).split(" "), SEPARATORS.sub(" ", b).split(" ")
    differing = [(x, y) for x, y in zip(*words, strict=False) if x != y]
    letters = all(len(x) == len(y) == 1 and not x.isdecimal() for x, y in differing)
    return len(words[0]) == len(words[1]) and bool(differing) and letters


def _shown(a: str, b: str) -> tuple[str, str]:
    """Return both as literals, with escapes where they look the same."""
    show = ascii if a.translate(LOOK_ALIKE) == b.translate(LOOK_ALIKE) else repr
    return show(a), show(b)


def missing(labels: Iterable[str]) -> set[str]:
    """Return those that stand for no label in a table. "-" is a class if other signs are classes too."""
    names = {label: label.strip() for label in set(labels)}
    signs = [c for c in names.values() if len(c) == 1 and not (c.isalnum() or PLACEHOLDER.match(c))]
    return {
        label
        for label, text in names.items()
        if text in MISSING or (PLACEHOLDER.fullmatch(text) and not signs)
    }


def check_none_missing(counts: Mapping[str, int], where: str, cure: str, quoted: Collection[str]) -> None:
    """Raise UserError when a label that is not in `quoted` stands for none; `cure` keeps it as a class."""
    if absent := missing(counts).difference(quoted):
        images, total = sum(counts[name] for name in absent), sum(counts.values())
        raise UserError(
            f"{where}: {', '.join(map(repr, sorted(absent)))} stands for no label ({images} of "
            f"{total} images); leave these images out or label them, or, if it is a class, {cure}"
        )
