"""Rules that find folders which are no classes: parts, slices, variants and copies of a data set.

A rule takes the folders that would be classes and returns an error that names the folder to give instead,
or "". Names only suggest a part, since a vehicle may be called train; what is inside decides.
"""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import PurePath

from serve.contract.errors import UserError
from serve.contract.image_files import DERIVED, PART, words
from train.data.labels import listed
from train.data.layouts.folder_tree import Folder
from train.data.layouts.masks import ENDING, has_derived_word

SLICES = re.compile(
    "(?:k?folds?|cv|splits?|shards?|chunks?|images?|imgs?|pictures|photos|jpegimages|rgb|inputs?)"
)
VARIANTS = re.compile(  # of one data set; most of these words may be a class too
    rf"(?:{SLICES.pattern}|{DERIVED.pattern}|parts?|partitions?|sections?|batch|group|(?:sub|data)?sets?|data"
    "|archive|disk|volume|folder|dir|copy|backup|raw|originals?|(?:pre)?processed|resized|cropped|augmented"
    "|augmentation|aug|extra|samples?|colou?r|gr[ae]yscale|public|private)"
)
Folders = Mapping[str, Folder]


@dataclass(frozen=True)
class DataSource:
    """The data set that a flag names."""

    path: str
    flag: str = "--data"
    in_tars: bool = False

    def quote(self, *folders: str) -> str:
        return shlex.quote(str(PurePath(self.path, *folders)))

    @property
    def hint(self) -> str:
        how = f"name the images in a label file for {self.flag}"
        return f"; if these are classes, or to use several parts, {how}"


def check_folders(classes: Folders, source: DataSource) -> tuple[list[str], list[str]]:
    """Return (facts, warnings) about folders that would be classes. Raises UserError by a rule."""
    for rule in RULES:
        if error := rule(classes, source):
            raise UserError(error)
    facts, warnings = _describe_inside(classes, source)
    if names := part_names(classes) or _named_as_tests(classes):
        warnings.append(
            f"taken for classes: {listed(sorted(names))}; parts belong elsewhere, or one of them to "
            f"{source.flag}"
        )
    return facts, warnings


def _describe_inside(classes: Folders, source: DataSource) -> tuple[list[str], list[str]]:
    """Return (facts, warnings) about folders inside of classes, which may be the classes themselves."""
    inside = _folders_inside(classes)
    several = [name for name in classes if len(inside.get(name, ())) > 1]
    if len(classes) == 1 or len(inside) < len(classes) or 2 * len(several) <= len(classes):
        return [], []
    few = listed([f"{name}/{min(inside[name])}" for name in several], 3)
    line = f"the folders {listed(sorted(classes))} are the classes, and hold no images but folders ({few})"
    if all(split_name(folder) == ("", ()) for name in several for folder in inside[name]):
        return [line], []
    flags = flags_for({several[0]: classes[several[0]]}, source)
    return [], [
        f"{line}; if those are the classes, name the images in a label file for {source.flag}, or give one "
        f"of the folders, as in {flags}"
    ]


def _parts(classes: Folders, source: DataSource) -> str:
    """train, val; pets, pets-test; fold1, fold2; color, gray; images, masks.

    Their names decide where no ordinary class is beside them, and what is in them elsewhere.
    """
    known = part_names(classes)
    for names in _siblings(classes):
        parts = [name for name in names if name in known]
        others = {name: split_name(name) for name in classes.keys() - names if classes[name].images}
        alone = all(part or not rest for part, rest in others.values())  # no ordinary class
        slices = Counter(tuple(found) for found in map(words, names) if any(map(SLICES.fullmatch, found)))
        named = alone and (parts or max(slices.values(), default=0) > 1)
        if named or _hold_classes(classes, parts) or _share_classes(classes, names):
            original = min(names, key=lambda name: (has_derived_word(name), bool(_part(name))))
            return _looks_like_parts(classes, parts or [original], source)
        derived = [name for name in names if alone and has_derived_word(name)]
        for name, other in product(names, derived):
            stems = _stems(classes[other])
            if name not in derived and 2 * len(stems & _stems(classes[name])) >= len(stems):
                return _looks_like_parts(classes, [name], source)
    return ""


def _data_set_beside_classes(classes: Folders, source: DataSource) -> str:
    """A folder of parts, or of copies of the classes, that holds no images itself."""
    inside = _folders_inside(classes)
    divided = [name for name in inside if part_names(inside[name])]
    for name, folders in inside.items():
        parts = part_names(folders)
        alone = len(classes) == 1 or (len(divided) == len(classes) and not _hold_classes(folders, parts))
        copies = folders.keys() & classes.keys()
        if (parts and not alone) or (len(copies) > 1 and 2 * len(copies) >= len(folders)):
            return (
                f"{name!r} in {source.path} holds {listed(sorted(folders))}: a data set, not a class. "
                f"Give {flags_for({name: classes[name]}, source)}, or move {name!r} elsewhere{source.hint}"
            )
    return ""


def _one_folder(classes: Folders, source: DataSource) -> str:
    """The only folder holds the classes, or images with labels in their names."""
    ((name, folder), *others) = classes.items() or (("", Folder()),)
    if others or source.flag != "--data" or not folder.class_names():
        return ""
    where = "their file names" if folder.unwrap()[1].images else "folders inside"
    return (
        f"{source.path} has the one folder of images {name!r}, and a classifier needs two classes or more: "
        f"if they are in {where}, give {flags_for(classes, source)}"
    )


def _classes_beside_tests(classes: Folders, source: DataSource) -> str:
    """train, test_stg1; simpsons_dataset, kaggle_testset: one folder holds the classes."""
    names = _beside_tests(classes)
    return _looks_like_parts(classes, names, source) if names else ""


RULES = (_parts, _classes_beside_tests, _data_set_beside_classes, _one_folder)


def _looks_like_parts(classes: Folders, names: Sequence[str], source: DataSource) -> str:
    flags = flags_for({name: classes[name] for name in names}, source)
    how = "in tar files of its own" if source.in_tars else f"as in {flags}"
    return (
        f"the classes of {source.path} would be {listed(sorted(classes))}, which looks like parts of a "
        f"data set: give one of them to {source.flag}, {how}{source.hint}"
    )


def flags_for(folders: Folders, source: DataSource) -> str:
    """Return the flags that name the parts among `folders`, or else the folder that holds the classes."""
    prefix, parent = Folder(folders=dict(folders)).unwrap()
    if source.in_tars:
        folder = prefix or next(iter(folders))
        name = PurePath(folder).name
        command = shlex.join(["tar", "-C", folder, "-cf", f"{name}.tar", "."])
        return f"{source.flag} {shlex.quote(f'{name}.tar')}, a tar file of it alone ({command})"

    def path(name: str) -> str:
        return source.quote(prefix, name, parent.folders[name].unwrap()[0])

    names = part_names(parent.folders) or _beside_tests(parent.folders)
    if not names:
        return f"{source.flag} {source.quote(prefix)}"
    train = next((name for name in names if _part(name) == "train"), names[0])
    known = parent.folders[train].class_names()
    others = [n for n in names if _tests(n) and known & parent.folders[n].class_names()]
    others.sort(key=lambda name: _part(name) != "val")
    if source.flag != "--data":
        return f"{source.flag} {path((others or names)[0])}"
    return f"--data {path(train)}" + (f" --val-data {path(others[0])}" if others else "")


def part_names(folders: Folders) -> list[str]:
    """Return the names that differ only by the part: seg_train, seg_test; train2017, val2017.

    Names of training parts alone count if no others are there: train1, train2.
    """
    found = []
    bare = all(_part(name) and len(words(name)) == 1 for name in folders)
    for names in _siblings(folders):
        kinds = {_part(name) for name in names} - {""}
        if "train" in kinds and (len(kinds) > 1 or bare):
            found += [name for name in names if _part(name)]
    return found


def _beside_tests(folders: Folders) -> list[str]:
    """Return the only folder that is no part to validate or test on, if it holds classes, and the parts."""
    tests = [name for name in folders if _tests(name)]
    others = [name for name in folders if name not in tests]
    if not tests or len(others) != 1:
        return []
    inside = folders[others[0]].unwrap()[1]
    named = [name for name in inside.folders if split_name(name) != ("", ())]
    return others + tests if len(named) > 1 and not inside.images else []


def _named_as_tests(folders: Folders) -> list[str]:
    """Return the names that are only those of parts to validate or test on, beside two classes or more."""
    tests = [name for name in folders if _tests(name) and not split_name(name)[1]]
    return tests if len(folders) - len(tests) > 1 else []


def _tests(name: str) -> bool:
    return _part(name) in ("val", "test")


def _siblings(folders: Folders) -> list[list[str]]:
    """Return groups of names that differ only by words for parts and variants."""
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in folders:
        groups[split_name(name)[1]].append(name)
    return [names for rest, names in groups.items() if any(rest != tuple(words(name)) for name in names)]


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """Return (train, val, test or ""; the words for no part or variant): train_cats -> train, (cats,)."""
    found = words(name)
    parts = [match.lastgroup or "" for match in map(PART.fullmatch, found) if match]
    rest = [word for word in found if not (PART.fullmatch(word) or VARIANTS.fullmatch(word))]
    if not parts and len(rest) < len(found):  # Batch A, Batch B
        rest = [word for word in rest if len(word) > 1]
    return parts[0] if parts else "", tuple(rest)


def _part(name: str) -> str:
    return split_name(name)[0]


def _folders_inside(classes: Folders) -> dict[str, Folders]:
    """Return class -> the folders in it, of the classes that hold no images themselves."""
    return {name: folder.unwrap()[1].folders for name, folder in classes.items() if not folder.images}


def _stems(folder: Folder) -> set[str]:
    """Return the paths of its images without suffixes and the endings of masks: cat/1_mask.png -> cat/1."""
    return {ENDING.sub("", os.path.splitext(path)[0]) for path in folder.image_paths()}


def _share_classes(folders: Folders, names: Sequence[str]) -> bool:
    """Return whether most classes of two of the folders are the same."""
    pairs = combinations([folders[name].class_names() for name in names], 2)
    return any(len(a & b) > 1 and 2 * len(a & b) >= min(len(a), len(b)) for a, b in pairs)


def _hold_classes(folders: Folders, parts: Sequence[str]) -> bool:
    """Return whether two parts hold the same classes, or the training part holds folders and no images."""
    training = (folders[name] for name in parts if _part(name) == "train")
    return _share_classes(folders, parts) or any(not f.images and f.class_names() for f in training)
