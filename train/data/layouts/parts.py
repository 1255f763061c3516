"""Rules that find folders which are no classes: parts, slices, variants and copies of a data set.

A rule takes the folders that would be classes and returns an error that names the folder to give instead,
or "". Names only suggest a part, since a vehicle may be called train; what is inside decides.
"""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import PurePath

from serve.contract.errors import UserError
from serve.contract.image_files import DERIVED
from train.data.layouts.folder_tree import Folder, words
from train.data.layouts.masks import ENDING, has_derived_word

PART = re.compile(
    "(?:(?P<train>train(?:ing|val)?|trn|treino|entrenamiento|entra[iî]nement|훈련|학습|训练|訓練|学習)"
    "|(?P<val>val|valid(?:at(?:e|ion))?|dev|validierung|validaci[oó]n|valida[cç][aã]o|검증|验证|驗證|検証)"
    "|(?P<test>test(?:ing)?|tst|eval(?:uation)?|pred(?:ict(?:ion)?s?)?|holdout|unlabell?ed"
    "|prueba|teste|시험|테스트|测试|測試|テスト))(?:sets?|data|images?|imgs?|용|셋|데이터|集|データ)?"
)
PICTURES = re.compile("(?:images?|imgs?|pictures|photos|jpegimages|rgb|inputs?)")
SLICES = re.compile(rf"(?:k?folds?|cv|splits?|shards?|chunks?|{PICTURES.pattern})")
VARIANTS = re.compile(  # of one data set; most of these words may be a class too
    rf"(?:{SLICES.pattern}|{DERIVED.pattern}|parts?|partitions?|sections?|batch|group|(?:sub|data)?sets?|data"
    "|archive|disk|volume|folder|dir|copy|backup|raw|originals?|(?:pre)?processed|resized|cropped|augmented"
    "|augmentation|aug|extra|samples?|colou?r|gr[ae]yscale)"
)
ORIGINALS = re.compile(rf"(?:{PICTURES.pattern}|colou?r|originals?)")
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
    if names := part_names(classes):
        warnings.append(
            f"{_quoted(names)} are taken for classes; if they are parts, give one of them to {source.flag}"
        )
    return facts, warnings


def _describe_inside(classes: Folders, source: DataSource) -> tuple[list[str], list[str]]:
    """Return (facts, warnings) about folders inside of classes, which may be the classes themselves."""
    inside = _folders_inside(classes)
    divided = [set(folders) for folders in inside.values() if part_names(folders)]
    nested = 1 < len(inside) == len(classes)  # no class holds images itself
    common = set.intersection(*map(set, inside.values())) if nested else set()
    several = [name for name in classes if len(inside.get(name, ())) > 1]
    if divided or len(common) > 1:
        names = (divided or [common])[0]
        line = f"each class holds the folders {_quoted(names)}: all of them are used, as one set"
        if divided:
            return [], [line]
        if all(_consists_of(VARIANTS, name) for name in names):
            return [line], []
        return [], [f"{line}; if these are the classes, {_one_alone(classes, several[0], source)}"]
    if nested and 2 * len(several) > len(classes):  # SUN397: a/abbey, b/basketball_court
        few = ", ".join(repr(f"{name}/{min(inside[name])}") for name in several[:3])
        cure = _one_alone(classes, several[0], source)
        return [], [
            f"the folders {_quoted(classes)} are taken for the classes, and hold no images but folders "
            f"({few}, ...); if those are the classes, {cure}"
        ]
    return [], []


def _parts(classes: Folders, source: DataSource) -> str:
    """train, val: beside nothing but parts, or with classes inside; pets, pets-test with the same ones."""
    names = part_names(classes)
    for name in () if names else classes:
        part, rest_of_name = split_name(name)
        rest = [other for other in classes if part and tuple(words(other)) == rest_of_name]
        if rest and _hold_the_same(classes[name], classes[rest[0]]):
            return _looks_like_parts(classes, rest, source)
    alone = names and _others_are_parts(classes, names)
    return _looks_like_parts(classes, names, source) if alone or _hold_classes(classes, names) else ""


def _variants(classes: Folders, source: DataSource) -> str:
    """fold1, fold2; set_images_1, set_images_2; and part_1, part_2; color, gray with the same classes."""
    names = [name for name in classes if _consists_of(VARIANTS, name)]
    alike = {tuple(words(name)) for name in classes}
    if len(alike) == 1 < len(classes) and any(map(SLICES.fullmatch, *alike)):
        return _looks_like_parts(classes, list(classes)[:1], source)
    if len(names) < 2 or not _others_are_parts(classes, names):
        return ""
    slices = Counter(tuple(words(n)) for n in names if _consists_of(SLICES, n) and re.search(r"\d", n))
    same_classes = all(_hold_the_same(classes[names[0]], classes[name]) for name in names[1:])
    if not same_classes and max(slices.values(), default=0) < 2:
        return ""
    originals = [name for name in names if not _consists_of(DERIVED, name)]
    return _looks_like_parts(classes, (originals or names)[:1], source)


def _derived(classes: Folders, source: DataSource) -> str:
    """rgb, depth_preview; images, masks: with images of the same names."""
    pictures = [name for name in classes if _consists_of(ORIGINALS, name)]
    derived = [name for name in classes if name not in pictures and has_derived_word(name)]
    if not pictures or not derived or not _others_are_parts(classes, pictures + derived):
        return ""
    for name, other in product(pictures, derived):
        stems = _stems(classes[other])
        if 2 * len(stems & _stems(classes[name])) >= len(stems):
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
                f"{name!r} in {source.path} holds {_quoted(folders)}: a data set, not a class. Give "
                f"{flags_for({name: classes[name]}, source)}, or move {name!r} elsewhere{source.hint}"
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


RULES = (_parts, _variants, _derived, _data_set_beside_classes, _one_folder)


def _looks_like_parts(classes: Folders, names: Sequence[str], source: DataSource) -> str:
    flags = flags_for({name: classes[name] for name in names}, source)
    how = "in tar files of its own" if source.in_tars else f"as in {flags}"
    return (
        f"the classes of {source.path} would be {_quoted(classes)}, which looks like parts of a data set: "
        f"give one of them to {source.flag}, {how}{source.hint}"
    )


def _one_alone(classes: Folders, name: str, source: DataSource) -> str:
    """Return how to train on the folders inside of a class as classes."""
    flags = flags_for({name: classes[name]}, source)
    return f"name the images in a label file for {source.flag}, or give one of the folders, as in {flags}"


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

    names = part_names(parent.folders)
    if not names:
        return f"{source.flag} {source.quote(prefix)}"
    train = next(name for name in names if _part(name) == "train")
    known = parent.folders[train].class_names()
    others = [n for n in names if _part(n) != "train" and known & parent.folders[n].class_names()]
    others.sort(key=lambda name: _part(name) != "val")
    if source.flag != "--data":
        return f"{source.flag} {path((others or names)[0])}"
    return f"--data {path(train)}" + (f" --val-data {path(others[0])}" if others else "")


def part_names(folders: Folders) -> list[str]:
    """Return the names that differ only by the part: seg_train, seg_test; train2017, val2017.

    Names of training parts alone count if no others are there: train1, train2. Where there are none: names
    of parts that hold the classes of the training part: Training, PublicTest.
    """
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in folders:
        part, rest = split_name(name)
        if part:
            groups[rest].append(name)
    found = []
    bare = all(_part(name) and len(words(name)) == 1 for name in folders)
    for group in groups.values():
        kinds = {_part(name) for name in group}
        if "train" in kinds and (len(kinds) > 1 or bare):
            found += group
    named = [name for group in groups.values() for name in group]
    if not found and len({_part(name) for name in named}) > 1 and _share_classes(folders, named):
        return named
    return found


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """Return (train, val, test or ""; the other words): train_cats -> train, (cats,)."""
    for i, word in enumerate(found := words(name)):
        if match := PART.fullmatch(word):
            rest = found[:i] + found[i + 1 :]
            return match.lastgroup or "", tuple(w for w in rest if not VARIANTS.fullmatch(w))
    return "", ()


def _part(name: str) -> str:
    return split_name(name)[0]


def _consists_of(kind: re.Pattern[str], name: str) -> bool:
    """Return whether the name has no words but those of this kind: part_b of VARIANTS, masks of DERIVED."""
    found = [word for word in words(name) if len(word) > 1]
    return bool(found) and all(map(kind.fullmatch, found))


def _others_are_parts(classes: Folders, names: Sequence[str]) -> bool:
    """Return whether no other folder is an ordinary class, with images in it and not named as a part."""
    others = (name for name in classes if name not in names)
    return not any(classes[n].images and not _part(n) and not _consists_of(VARIANTS, n) for n in others)


def _folders_inside(classes: Folders) -> dict[str, Folders]:
    """Return class -> the folders in it, of the classes that hold no images themselves."""
    return {name: folder.unwrap()[1].folders for name, folder in classes.items() if not folder.images}


def _stems(folder: Folder) -> set[str]:
    """Return the paths of its images without suffixes and the endings of masks: cat/1_mask.png -> cat/1."""
    return {ENDING.sub("", os.path.splitext(path)[0]) for path in folder.image_paths()}


def _hold_the_same(one: Folder, other: Folder) -> bool:
    """Return whether most classes of the two are the same."""
    a, b = one.class_names(), other.class_names()
    return len(a & b) > 1 and 2 * len(a & b) >= min(len(a), len(b))


def _share_classes(folders: Folders, parts: Sequence[str]) -> bool:
    """Return whether another part holds the classes of the training part."""
    train = next((name for name in parts if _part(name) == "train"), "")
    return any(_hold_the_same(folders[train], folders[name]) for name in parts if train and name != train)


def _hold_classes(folders: Folders, parts: Sequence[str]) -> bool:
    """Return whether the training part holds classes: those of another part, or folders and no images."""
    training = [folders[name] for name in parts if _part(name) == "train"][:1]
    alone = any(not folder.images and folder.class_names() for folder in training)
    return alone or _share_classes(folders, parts)


def _quoted(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(map(repr, listed[:6])) + (f", ... ({len(listed)})" if len(listed) > 6 else "")
