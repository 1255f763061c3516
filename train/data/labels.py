"""Labels as people write them: one class in two spellings, labels that stand for none, mangled names."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import combinations

from serve.contract.errors import UserError
from train.data.text_encoding import likely_encodings, reads_as

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
# What pandas and spreadsheets write for a missing value; as a folder's name, too, it is an accident
ACCIDENTS = {"nan", "NaN", "NAN", "-nan", "-NaN", "<NA>", "NaT", "#N/A", "#NA", "#VALUE!", "#REF!"}
ACCIDENTS |= {"#NAME?", "#DIV/0!", "#NULL!", "#NUM!"}
MISSING = ACCIDENTS | {"", "None", "NA", "NULL", "Null", "null", "(null)", "N/A", "n/a", "N.A.", "n.a."}
# but not none or na: there are such classes
PLACEHOLDER = re.compile(r"[?.\-\u2013\u2014]+")


def normal(label: str) -> str:
    """One text for what is surely one label: composed (NFC, where a Mac writes NFD), no space around it."""
    return unicodedata.normalize("NFC", label).strip()


def unify(labels: dict[str, str], source: str, notes: list[str]) -> dict[str, str]:
    """The labels in their normal form.

    Raises:
        UserError: two of them are probably one class, or one is no text.
    """
    counts = Counter(labels.values())
    check_white_space(counts, source)
    names = {label: normal(label) for label in counts}
    of_name: Counter[str] = Counter()
    for label, count in counts.items():
        of_name[names[label]] += count
    if twice := [name for name, forms in Counter(names.values()).items() if forms > 1]:
        notes.append(
            f"{source}: labels in two Unicode forms (NFC and NFD) are one class: {', '.join(twice[:3])}"
            f"{', ...' if twice[3:] else ''}"
        )
    for name in of_name:
        _check_text(name, source)
        if name in ACCIDENTS:
            notes.append(f"warning: {source}: {name!r} is trained as a class; it often stands for no label")
        if (meant := _unmangled(name)) != name:
            notes.append(f"warning: {source}: the class {name!r} is probably {meant!r}, decoded wrongly")
    _check_spellings(of_name, source, notes)
    if all(label == name for label, name in names.items()):
        return labels
    return {path: names[label] for path, label in labels.items()}


def check_white_space(counts: Iterable[str], source: str) -> None:
    """Raises UserError when two labels differ by the white space around them alone."""
    spellings: dict[str, str] = {}
    for label in counts:
        composed = unicodedata.normalize("NFC", label)
        other = spellings.setdefault(composed.strip(), composed)
        if other != composed:
            raise UserError(
                f"{source}: the labels {other!r} and {label!r} differ by white space alone: remove it"
            )


def _check_text(name: str, source: str) -> None:
    if "\ufffd" in name:
        raise UserError(
            f"{source}: the label {name!r} has lost characters when it was converted (U+FFFD stands for "
            "them): make it anew from the original"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        likely = likely_encodings([os.fsencode(name)])
        raise UserError(
            f"{source}: the label {os.fsencode(name)!r} is not UTF-8; it {reads_as(likely)}; rename its "
            f"folder or files: convmv -r --notest -f {next(iter(likely), 'ENCODING')} -t utf-8 FOLDER"
        ) from error


def _check_spellings(counts: Mapping[str, int], source: str, notes: list[str]) -> None:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        groups[spelling(name)].append(name)
    pairs = [pair for names in groups.values() for pair in combinations(sorted(names), 2)]
    small = [pair for pair in pairs if _may_differ(*pair)]
    if doubtful := [pair for pair in pairs if not _may_differ(*pair)]:
        a, b = doubtful[0]
        shown = _shown(a, b)
        others = ", ".join(" and ".join(_shown(*pair)) for pair in doubtful[1:4])
        raise UserError(
            f"{source}: the labels {shown[0]} ({counts[a]} images) and {shown[1]} ({counts[b]} images) "
            f"differ by {_difference(a, b)} alone{f' (so do {others})' if others else ''}: give them one "
            "name if they are one class, and names that differ by more if they are two"
        )
    if small:
        a, b = small[0]
        notes.append(
            f"{source}: classes that differ by {_difference(a, b)} alone are trained as two: {a!r} and "
            f"{b!r}{f', ... ({len(small)} pairs)' if small[1:] else ''}"
        )


def check_known(unknown: Collection[str], class_names: Collection[str], source: str) -> None:
    """Raises UserError when one of the unknown labels is another spelling of a known class."""
    known = {spelling(name): name for name in class_names}
    for name in unknown:
        if other := known.get(spelling(name)):
            ours, theirs = _shown(name, other)
            raise UserError(
                f"--val-data {source} has the label {ours}, the training data have {theirs}: they "
                f"differ by {_difference(name, other)} alone; give them one name"
            )


def spelling(name: str) -> str:
    """The same text for labels that are probably one class."""
    text = unicodedata.normalize("NFKC", _unmangled(name).translate(LOOK_ALIKE))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").strip()  # Cf: invisible
    if NUMBER.fullmatch(text):
        return f"={Fraction(Decimal(text.replace(',', '.')))}"
    return LEADING_ZEROS.sub("", SEPARATORS.sub(" ", text.casefold()))


def _may_differ(a: str, b: str) -> bool:
    """Whether two labels of one spelling are ordinary classes: a and A in sets of letters, a1 and a01."""
    if not NUMBER.fullmatch(a) and LEADING_ZEROS.sub("", a) == LEADING_ZEROS.sub("", b):
        return True
    words = SEPARATORS.sub(" ", a).split(" "), SEPARATORS.sub(" ", b).split(" ")
    differing = [(x, y) for x, y in zip(*words, strict=False) if x != y]
    letters = all(len(x) == len(y) == 1 and not x.isdecimal() for x, y in differing)
    return len(words[0]) == len(words[1]) and bool(differing) and letters


def _difference(a: str, b: str) -> str:
    if NUMBER.fullmatch(a) and NUMBER.fullmatch(b):
        return "the way to write a number"
    if a.casefold() == b.casefold():
        return "upper and lower case"
    if SEPARATORS.sub(" ", a) == SEPARATORS.sub(" ", b):
        return "'_', '-' and spaces"
    if LEADING_ZEROS.sub("", a) == LEADING_ZEROS.sub("", b):
        return "leading zeros"
    return "how they are typed (case, separators, width, invisible characters, another alphabet, encoding)"


def _shown(a: str, b: str) -> tuple[str, str]:
    """With escapes where both look the same."""
    show = ascii if a.translate(LOOK_ALIKE) == b.translate(LOOK_ALIKE) else repr
    return show(a), show(b)


def _unmangled(name: str) -> str:
    """UTF-8 that was decoded as something else and saved: 'caf\u00c3\u00a9' is 'caf\u00e9'."""
    if name.isascii():
        return name
    for encoding in ("cp1252", "latin-1", "cp437"):
        try:
            return normal(name.encode(encoding).decode("utf-8"))
        except UnicodeError:
            continue
    return name


def missing(labels: Iterable[str]) -> set[str]:
    """Those that stand for no label in a table. A placeholder such as - is a class among other signs."""
    names = set(labels)
    signs = {
        c for name in names if len(c := name.strip()) == 1 and not (c.isalnum() or PLACEHOLDER.match(c))
    }
    return {
        name
        for name in names
        if (text := name.strip()) in MISSING or (PLACEHOLDER.fullmatch(text) and not signs)
    }


def check_none_missing(counts: Mapping[str, int], where: str, meant: str, certain: Collection[str]) -> None:
    """Raises UserError when a label that is not `certain` stands for none; `meant`: how to write one."""
    if absent := missing(counts).difference(certain):
        images, total = sum(counts[name] for name in absent), sum(counts.values())
        raise UserError(
            f"{where}: {', '.join(map(repr, sorted(absent)))} stands for no label ({images} of "
            f"{total} images); leave these images out or label them, or, if it is a class, {meant}"
        )
