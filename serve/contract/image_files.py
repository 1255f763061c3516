"""Files that the values of a column stand for, in and below the folder of a table.

A value is a path, or lacks a suffix (".jpg"), the folders in which the images are, or names folders of
another machine. One rule for all rows is sought, and checked in each of them.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import islice, takewhile
from typing import NamedTuple
from urllib.parse import unquote

from serve.contract.archive import split_member
from serve.contract.errors import UserError
from serve.contract.listing import has_image_suffix, walk_images
from serve.contract.urls import is_remote

SAMPLE_ROWS = 200
NEARLY_ALL, HALF = 0.9, 0.5
PROBES = 20
MOST_NAMINGS = 40
MOST_FILES = 3_000_000  # that are listed below the folder of a table
PART = re.compile(
    "(?:(?P<train>train(?:ing|val)?|trn|treino|entrenamiento|entra[iî]nement|훈련|학습|训练|訓練|学習)"
    "|(?P<val>val|valid(?:at(?:e|ion))?|dev|validierung|validaci[oó]n|valida[cç][aã]o|검증|验证|驗證|検証)"
    "|(?P<test>test(?:ing)?|tst|eval(?:uation)?|pred(?:ict(?:ion)?s?)?|holdout|unlabell?ed|submission"
    "|prueba|teste|시험|테스트|测试|測試|テスト))(?:sets?|data|images?|imgs?|용|셋|데이터|集|データ)?"
)
"""Words in the names of files and folders that stand for a part of a data set."""
APART = "move the wrong one elsewhere, or put the table into the folder of its images"
USUAL = {"image", "images", "img", "imgs", "data", "photos", "pictures", "jpeg", "jpg", "jpegs", "input"}
"""Words in the names of folders of images."""
DERIVED_KINDS = (
    "mask|annot(?:ation)?|label|trimap|segm?|segmentation|gt|ground_?truth|matte|overlay|bbox"
    "|thumb(?:nail)?|preview|heatmap|depth|visuali[sz]ation"
)
DERIVED = re.compile(
    f"(?:(?:{DERIVED_KINDS})(?:e?s)?|labelids|truth|annotated|segmented|segmentation(class|object))"
)
"""Words in the names of images that are made of other images, and of their folders."""


class Naming(NamedTuple):
    """Rule that makes paths, relative to the table's folder, of the values of a column."""

    listed: bool = False
    """Values are paths as they are."""
    dropped: str = ""
    """Beginning of every value that is left out, as in "/content/"."""
    folder: str = ""
    """Folder of all images, as in "train/"."""
    suffix: str | None = ""
    """Added where the value has none; None: whichever the file of this name has."""
    anywhere: bool = False
    """Images are in several folders below `folder`; their names are distinct."""

    def describe(self) -> str:
        added = {None: ", with their suffixes added", "": ""}.get(
            self.suffix, f", with {self.suffix} added"
        )
        where = f" in {self.folder}" if self.folder else ""
        if self.anywhere:
            where = f" in the folders below {self.folder or 'its own'}"
        without = f", without {self.dropped!r}" if self.dropped else ""
        return where + added + without


LISTED = Naming(listed=True)


class ImageFiles:
    """Files in the folder of a table and below, each folder listed once, when it is needed."""

    def __init__(self, table: str, part: str):
        """`part`: train, val or test, which is preferred where parts have images of the same names, unless
        the table's own name holds another one."""
        self.table, self.folder = table, os.path.dirname(table) or "."
        own = _part(os.path.splitext(os.path.basename(table))[0])
        self.part = own or part
        self.is_of_training = own == "train"
        self._names: dict[str, Collection[str] | None] = {}
        self._other_parts: set[str] = set()

    def is_listed(self, path: str) -> bool:
        """Return whether a path, absolute or relative to the folder, is a file or in a tar file."""
        name = path.rpartition("/")[2]
        parent = path[: len(path) - len(name)]
        if parent not in self._names:
            self._names[parent] = _file_names(os.path.join(self.folder, parent))
        names = self._names[parent]
        return bool(name) and (names is None or name in names)

    @cached_property
    def below(self) -> dict[str, list[str]]:
        """Paths of images without their suffixes, as `_key` compares them -> paths."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for path in islice(_image_paths(self.folder), MOST_FILES):
            folder = path.rpartition("/")[0]
            if self.is_of_training and folder and part_of(folder) == "test":
                self._other_parts.add(folder)
            else:
                found[_key(os.path.splitext(path)[0])].append(path)
        return dict(found)

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """The same by the last parts of the paths."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for key, paths in self.below.items():
            found[key.rpartition("/")[2]] += paths
        return dict(found)

    def find(self, value: str, naming: Naming) -> list[str]:
        """Return the images that a value stands for: one, unless the rule is wrong or ambiguous."""
        if naming.listed:
            if self.is_listed(value):
                return [value]
            return [path for path in (clean(value),) if self.is_listed(path)]
        name = clean(value)
        if not name.startswith(naming.dropped):
            return []
        stem, suffix = _split(name.removeprefix(naming.dropped))
        if naming.anywhere:
            end = "/" + _key(stem)
            paths = self.by_name.get(end.rpartition("/")[2], [])
            hits = [path for path in paths if path.startswith(naming.folder)]
            hits = [path for path in hits if ("/" + _key(os.path.splitext(path)[0])).endswith(end)]
        else:
            hits = self.below.get(_key(naming.folder + stem), [])
        if wanted := suffix or naming.suffix:
            hits = [path for path in hits if os.path.splitext(path)[1].casefold() == wanted.casefold()]
            if len(hits) > 1:  # a.jpg and A.JPG
                hits = [path for path in hits if path == naming.folder + stem + wanted] or hits
        return hits

    def path_of(self, value: str, naming: Naming) -> str:
        """Return the path of the image that a value stands for, or of the one that is missing.

        Raises UserError when there are several.
        """
        hits = self.find(value, naming)
        if len(hits) > 1:
            raise UserError(f"{self.table}: {value!r} may be {hits[0]!r} or {hits[1]!r}: {APART}")
        if hits:
            return hits[0]
        whole = naming.listed or is_remote(value)
        return value if whole else naming.folder + clean(value) + (naming.suffix or "")

    def locate(self, values: Sequence[str]) -> tuple[Naming, int]:
        """Return the rule by which most of the distinct values stand for one image, and for how many.

        Raises UserError when two rules fit that lead to different images.
        """
        listed = self._count(values, LISTED)
        if listed >= HALF * len(values):  # the others are lost, even if one of their names is elsewhere
            return LISTED, listed
        sample = values[:: max(1, len(values) // SAMPLE_ROWS)]
        tried = {naming: self._count(sample, naming) for naming in self._namings(values)}
        fair = [n for n, count in tried.items() if count and count >= NEARLY_ALL * max(tried.values())]
        counts = {LISTED: listed} | {n: self._count(values, n) for n in fair if not n.anywhere}
        if max(counts.values()) < len(values):  # which then must find more than a folder alone
            counts |= {naming: self._count(values, naming) for naming in fair if naming.anywhere}
        most = max(counts.values())
        best = sorted((n for n, count in counts.items() if count == most), key=self._rank)
        rivals = [naming for naming in best[1:] if self._rank(naming)[:2] == self._rank(best[0])[:2]]
        for value in values if rivals else ():
            hits = sorted(
                {clean(path) for naming in (best[0], *rivals) for path in self.find(value, naming)}
            )
            if len(hits) > 1:
                raise UserError(f"{self.table}: {value!r} may be {hits[0]!r} or {hits[1]!r}: {APART}")
        if "submission" in words(os.path.basename(self.table)) and part_of(best[0].folder) == "train":
            raise UserError(
                f"{self.table}: only {best[0].folder!r} has images of these names, and they are those to "
                "train on: unpack the test images beside it"
            )
        return best[0], most

    def describe(self, value: str) -> str:
        """Return where the image of a value was sought, and what was found instead."""
        if is_remote(value):
            return "a URL is no file: copy the images into a folder beside the table and name them there"
        folders = {path.rpartition("/")[0] for paths in self.below.values() for path in paths}
        where = f"it was sought in {self.folder!r} and {len(folders)} folders of images below or beside"
        if self._other_parts:
            where += f", but not in {sorted(self._other_parts)[0]!r}, which is another part by its name"
        if similar := self.by_name.get(_key(_split(clean(value))[0].rpartition("/")[2])):
            return f"{where}, and {similar[0]!r} was found"
        first = next(iter(self.below.values()), None)
        if not first:
            return f"{where}; there are no images: unpack them beside the table"
        return f"{where}, which have names as {first[0]!r}"

    def _count(self, values: Sequence[str], naming: Naming) -> int:
        return sum(len(self.find(value, naming)) == 1 for value in values)

    def _namings(self, values: Sequence[str]) -> list[Naming]:
        """Return the rules that fit some of the values."""
        votes: Counter[Naming] = Counter()
        for value in values[:: max(1, len(values) // PROBES)]:
            stem, suffix = _split(clean(value))
            names = stem.split("/")
            for path in self.by_name.get(_key(names[-1]), ()):
                found, own = os.path.splitext(path)
                folders = found.split("/")
                pairs = zip(reversed(names), reversed(folders), strict=False)
                same = sum(1 for _ in takewhile(lambda pair: _key(pair[0]) == _key(pair[1]), pairs))
                dropped = "".join(f"{name}/" for name in names[: len(names) - same])
                folder = "".join(f"{name}/" for name in folders[: len(folders) - same])
                lost = part_of(dropped) not in ("", _part(os.path.basename(os.path.abspath(self.folder))))
                moved = dropped.strip("/") and folder
                if not moved and not lost and suffix.casefold() in ("", own.casefold()):
                    votes[Naming(False, dropped, folder, "" if suffix else own)] += 1
        namings = [naming for naming, _ in votes.most_common(MOST_NAMINGS)]
        if not namings:
            return []
        suffixes = Counter((naming.dropped, naming.folder) for naming in namings)
        namings += [Naming(False, *place, None) for place, count in suffixes.items() if count > 1]
        tops = {naming.folder.removeprefix("../").partition("/")[0] for naming in namings}
        mine = [f"{top}/" for top in tops if part_of(top) == self.part]
        added = "" if all(has_image_suffix(clean(value)) for value in values[:PROBES]) else None
        return namings + [Naming(folder=top, suffix=added, anywhere=True) for top in (*mine, "")]

    def _rank(self, naming: Naming) -> tuple[bool, int, bool]:
        """Return a rule's sort key: the best rule has the smallest."""
        part = part_of(naming.folder)
        plain = all(map(_is_plain, naming.folder.removeprefix("../").split("/")[:-1]))
        if not naming.folder:
            place = 7 if naming.anywhere else 0
        elif part:
            place = 6 if part != self.part else 1 if plain else 2
        else:
            place = 3 if plain else 4
        place += 20 * any(map(DERIVED.fullmatch, words(naming.folder)))
        return naming.anywhere, place + 10 * naming.folder.startswith("../"), naming.suffix is None


def clean(value: str) -> str:
    """Return a path without what spreadsheets, Windows and Label Studio add to it: spaces, backslashes,
    "./", "/data/local-files/?d="."""
    path = value.strip().replace("\\", "/")
    if "?d=" in path:
        path = unquote(path.partition("?d=")[2])
    while path.startswith("./"):
        path = path[2:]
    return path


def _part(name: str) -> str:
    return next((found.lastgroup or "" for found in map(PART.fullmatch, words(name)) if found), "")


@cache
def part_of(folder: str) -> str:
    """Return the part that the first of its parents that is called by one stands for."""
    return next(filter(None, map(_part, folder.split("/"))), "")


def _is_plain(name: str) -> bool:
    """Return whether a folder's name has no words but those of folders of images: train, train_images."""
    return all(word in USUAL or PART.fullmatch(word) for word in words(name)) and not re.search(r"\d", name)


def words(name: str) -> list[str]:
    """Return the words of a name in lower case: trainImages_2017 -> train, images; 007 -> 007."""
    found = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return [word.lower() for word in found or [name]]


def _key(path: str) -> str:
    """Return a text that is the same for names which a Mac or Windows takes for one."""
    return path.casefold() if path.isascii() else unicodedata.normalize("NFC", path).casefold()


def _split(name: str) -> tuple[str, str]:
    return os.path.splitext(name) if has_image_suffix(name) else (name, "")


def _file_names(folder: str) -> Collection[str] | None:
    """Return the names of the files in a folder; None for a tar file, whose members are read later."""
    try:
        with os.scandir(folder) as scan:
            return {entry.name for entry in scan if not entry.is_dir()}
    except OSError:
        return None if split_member(os.path.join(folder, "x")) else ()


def _image_paths(folder: str) -> Iterator[str]:
    """Yield the paths of images below a folder and in folders beside it that are named as those of images.

    A linked folder directly in one of them is followed, one further below is not.
    """
    yield from _images_below(folder, "")
    above = os.path.realpath(os.path.join(folder, os.pardir))
    own = os.path.basename(os.path.realpath(folder))
    with suppress(OSError):
        for name in sorted(os.listdir(above)):
            beside = os.path.join(above, name)
            if name != own and _is_plain(name) and os.path.isdir(beside):
                yield from _images_below(beside, f"../{name}/")


def _images_below(folder: str, prefix: str) -> Iterator[str]:
    for path, kind, problem in walk_images(folder):
        if kind == "image":
            yield prefix + path
        elif problem.startswith("linked") and "/" not in path:
            with suppress(OSError):
                for below, kind_below, _ in walk_images(os.path.join(folder, path)):
                    if kind_below == "image":
                        yield f"{prefix}{path}/{below}"
