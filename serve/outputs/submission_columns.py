"""What the columns of a submission hold, as the values and the header of the contest's sample show."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import UserError
from serve.outputs.sample import Sample, few

Cells = Callable[[NDArray[np.float32]], list[str]]
Values = Literal["", "probability", "class"]
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)  # as a class's name
CHOOSE = "add --submission-values probability or --submission-values class"


@dataclass(frozen=True)
class Column:
    """What the cells of a row hold."""

    cells: Cells
    unreadable: list[str]
    """Cells for an image without probabilities: every row needs a value."""
    meaning: str
    """Description for the user."""


def find_column(sample: Sample, class_names: Sequence[str], values: Values) -> Column:
    """Return what the columns hold; `values` decides where the sample does not.

    Raises:
        UserError: that is not clear, or a class has no column.
    """
    single = len(sample.columns) == 1
    return (_one_column if single else _column_of_each_class)(sample, class_names, values)


def _one_column(sample: Sample, class_names: Sequence[str], values: Values) -> Column:
    """Return what the only column beside the ids holds: a probability, a class's name, or its number."""
    name, count = sample.columns[0], len(class_names)
    shown = sample.values - {""}
    numeric = all(map(NUMBER.fullmatch, class_names))
    names = names_shown(shown, class_names)
    ranked = ranked_names(shown, names)
    first = int("2" in shown and shown <= {"1", "2"})
    is_number = count == 2 and not numeric and shown <= {str(first), str(first + 1)}
    is_class = shown <= set(names) or is_number or bool(ranked)
    is_probability = count == 2 and all(map(is_share, shown))
    described = f"{sample}: the column {name!r} holds {few(sorted(shown)) or 'nothing'}"
    if not values and is_class and is_probability:
        raise UserError(f"{described}, which may be a probability or a class: {CHOOSE}")
    if values == "probability" and count != 2:
        raise UserError(f"{sample}: one column {name!r} cannot hold the probabilities of {count} classes")
    if not (values or is_class or is_probability):
        raise UserError(
            f"{described}, and the model's {count} classes are {few(class_names)}: add "
            "--submission-values class if the column holds placeholders; if these are numbers of classes, "
            "train on them as labels"
        )

    at = positive(class_names, name)
    if values == "probability" or not (values or is_class):
        meaning = f"{name!r} is the probability of {class_names[at]!r}"
        return Column(lambda p: [str(p[at])], ["0.5"], meaning)
    if ranked:
        return Column(
            lambda p: [" ".join(class_names[i] for i in np.argsort(-p, kind="stable")[:ranked])],
            sample.first,
            f"{name!r} is the names of the {ranked} likeliest classes",
        )
    are_numbers = bool(shown) and all(map(NUMBER.fullmatch, shown))
    if count == 2 and are_numbers and not numeric and not shown <= set(names):
        texts = [str(first + int(i == at)) for i in range(2)]
        what = f"the class's number: {texts[0]} for {class_names[0]!r}, {texts[1]} for {class_names[1]!r}"
    else:
        written = {names[text]: text for text in shown if text in names}
        texts, what = [written.get(c, c) for c in class_names], "the class's name"
        if changed := [c for c in class_names if written.get(c, c) != c]:
            if unseen := [c for c in class_names if c not in written]:
                raise UserError(
                    f"{described}, which spells {changed[0]!r} otherwise and does not show how it spells "
                    f"{few(unseen)}: write the spelling of each class into a row of the sample"
                )
            what += f", spelled as in the sample ({written[changed[0]]!r} for {changed[0]!r})"
    fallback = sample.first if sample.first[0] in texts else [texts[0]]
    return Column(lambda p: [texts[int(p.argmax())]], fallback, f"{name!r} is {what}")


def names_shown(shown: Iterable[str], class_names: Sequence[str]) -> dict[str, str]:
    """Return text -> class, for the names themselves and for texts that spell one otherwise."""
    spelled = spellings(class_names)
    names = {text: class_names[spelled[folded(text)]] for text in shown if folded(text) in spelled}
    return names | {name: name for name in class_names}


def _column_of_each_class(sample: Sample, class_names: Sequence[str], values: Values) -> Column:
    """Return what a column for each class holds: probabilities, or 1 for the likeliest and else 0."""
    order, notes = match_columns(sample, class_names)
    shown = sample.values - {""}
    kind = values
    if not kind and shown <= {"0", "1"} and "1" in shown:
        raise UserError(
            f"{sample}: its columns hold 0 and 1, which may be probabilities or a class: {CHOOSE}"
        )
    if kind == "class":
        one_of = sorted(sample.first) == sorted(one_hot(0, len(order)))
        fallback = sample.first if one_of else one_hot(0, len(order))
        meaning = f"each column is 1 for the likeliest of {len(order)} classes, else 0"
        return Column(lambda p: one_hot(int(p[order].argmax()), len(order)), fallback, meaning + notes)
    equal = [str(np.float32(1 / len(order)))] * len(order)
    meaning = f"each of {len(order)} columns is the probability of its class"
    return Column(lambda p: [str(value) for value in p[order]], equal, meaning + notes)


def one_hot(place: int, count: int) -> list[str]:
    return ["1" if i == place else "0" for i in range(count)]


def match_columns(sample: Sample, class_names: Sequence[str]) -> tuple[list[int], str]:
    """Return the class of each column, matched by its name or else its spelling, and a note on the latter.

    Raises:
        UserError: a column is no class, a class has no column, or one has two.
    """
    exact = {name: i for i, name in enumerate(class_names)}
    spelled = spellings(class_names)
    found = [exact.get(name, spelled.get(folded(name), -1)) for name in sample.columns]
    unknown = [name for name, i in zip(sample.columns, found, strict=True) if i < 0]
    known = set(found)
    absent = [name for i, name in enumerate(class_names) if i not in known]
    if unknown or absent or len(known) < len(found):
        parts = [f"the columns {few(unknown)} are no classes of the model"] if unknown else []
        parts += [f"the classes {few(absent)} have no column"] if absent else []
        raise UserError(f"{sample}: {' and '.join(parts) or 'two columns are the same class'}")
    other = [(c, class_names[i]) for c, i in zip(sample.columns, found, strict=True) if c != class_names[i]]
    note = f"; {len(other)} are spelled otherwise ({other[0][0]!r} for {other[0][1]!r})" if other else ""
    return found, note


def spellings(class_names: Sequence[str]) -> dict[str, int]:
    """Return folded name -> number of the class, without those that two classes share."""
    counts = Counter(map(folded, class_names))
    return {folded(name): i for i, name in enumerate(class_names) if counts[folded(name)] == 1}


def folded(name: str) -> str:
    """Return one text for the spellings of a name: ice_cream, Ice Cream, ice-cream. Numbers have one."""
    if NUMBER.fullmatch(name):
        return name
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip() or name


def positive(class_names: Sequence[str], column: str) -> int:
    """Return which of two classes a single column is about: the one that its header names, alone or among
    other words, or else the greater number (by name, 1 is before -1) or the second name."""
    names = [folded(name) for name in class_names]
    named = [name for name in names if f" {name} " in f" {folded(column)} "]
    longest = max(named, key=len, default="")
    if named and all(name in longest for name in named):  # has_cactus, or no_cactus, which holds both
        return names.index(longest)
    if all(map(NUMBER.fullmatch, class_names)):
        return max(range(len(class_names)), key=lambda i: float(class_names[i]))
    return 1


def is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def ranked_names(shown: Iterable[str], names: Iterable[str]) -> int:
    """Return how many class names with spaces between them each value holds; 0 where one may be a name."""
    known, lengths = set(names), set()
    for text in shown:
        words = text.split()
        if text in known or not known.issuperset(words):
            return 0
        lengths.add(len(words))
    return lengths.pop() if len(lengths) == 1 else 0
