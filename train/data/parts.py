"""Parts and variants of a data set (train, val; fold1, fold2; color, grayscale) where classes are expected.

Names only suggest them: a vehicle may be called train. What is inside decides.
"""

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from serve.contract.errors import UserError
from train.data.masks import MADE, words
from train.data.tree import Tree, classes_in, folders_in, images_in, inside, unwrap

PART = re.compile(
    "(?:(?P<train>train(?:ing|val)?|trn|treino|entrenamiento|entra[iî]nement|훈련|학습|训练|訓練|学習)"
    "|(?P<val>val|valid(?:ation)?|dev|validierung|validaci[oó]n|valida[cç][aã]o|검증|验证|驗證|検証)"
    "|(?P<test>test(?:ing)?|tst|eval(?:uation)?|pred(?:ict(?:ion)?s?)?|holdout|unlabell?ed"
    "|prueba|teste|시험|테스트|测试|測試|テスト))(?:sets?|data|images?|imgs?|용|셋|데이터|集|データ)?"
)
PICTURES = re.compile("(?:images?|imgs?|pictures|photos|jpegimages|rgb|inputs?)")
SLICES = re.compile(rf"(?:k?folds?|cv|splits?|shards?|chunks?|{PICTURES.pattern})")
VARIANTS = re.compile(  # of one data set; most of these words may be a class too
    rf"(?:{SLICES.pattern}|{MADE.pattern}|parts?|partitions?|sections?|batch|group|(?:sub|data)?sets?|data|archive|disk"
    "|volume|folder|dir|copy|backup|raw|originals?|(?:pre)?processed|resized|cropped|augmented|augmentation|aug"
    "|extra|samples?|colou?r|gr[ae]yscale)"
)


@dataclass(frozen=True)
class Given:
    """What a flag named."""

    source: str
    flag: str = "--data"
    packed: bool = False
    """Its folders are in tar files."""

    def path(self, *folders: str) -> str:
        return shlex.quote(str(PurePath(self.source, *folders)))

    @property
    def way_out(self) -> str:
        how = f"name the images in a CSV manifest for {self.flag}"
        return f"; if these are classes, or to use several parts, {how}"


def check_parts(tree: Tree, given: Given) -> list[str]:
    """What a user should be warned of, when the folders of `tree` are taken for classes.

    Raises:
        UserError: some of them look like parts of a data set; the message names the folder to give.
    """
    names = _parts(tree)
    if names and (_only_parts(tree, names) or _all_bare(tree) or _like_data_sets(tree, names)):
        raise _parts_error(tree, names, given)
    for group in (_slices(tree), _variants(tree)):
        if group and _only_parts(tree, group):
            raise _parts_error(tree, group, given)
    if pair := _pictures_and_made(tree):
        pictures, made = pair
        flags = advise({pictures: tree[pictures]}, given)
        raise UserError(
            f"the classes of {given.source} would be {_quoted(tree)}, but files in {made!r} have the names "
            f"of those in {pictures!r}, as masks of images do: give {flags}{given.way_out}"
        )
    nested = _check_nested(tree, given)
    if names:
        listed = _quoted(names)
        nested.append(
            f"{listed} are taken for classes; if they are parts, give one of them to {given.flag}"
        )
    return nested


def _check_nested(tree: Tree, given: Given) -> list[str]:
    """As check_parts, of data sets and copies of the classes in folders that hold no images themselves."""
    holding = {name: inside(paths) for name, paths in tree.items() if not images_in(paths)}
    nested = [name for name, folders in holding.items() if _parts(folders)]
    for name, folders in holding.items():
        parts = _parts(folders)
        alone = len(tree) == 1 or (len(nested) == len(tree) and not _like_data_sets(folders, parts))
        alike = folders.keys() & tree.keys()
        if (parts and not alone) or (len(alike) > 1 and 2 * len(alike) >= len(folders)):
            raise UserError(
                f"{name!r} in {given.source} holds {_quoted(folders)}: a data set, not a class. Give "
                f"{advise({name: tree[name]}, given)}, or move {name!r} elsewhere{given.way_out}"
            )
    if nested:
        listed = _quoted(holding[nested[0]])
        return [f"each class holds {listed}: all of them are used, as one set that is split anew"]
    return []


def check_wrapper(tree: Tree, given: Given) -> None:
    """Raises UserError when the only folder holds the classes, or images with labels in their names."""
    if len(tree) == 1 and len(classes_in(*tree.values())) > 1:
        ((name, paths),) = tree.items()
        where = "their file names" if images_in(unwrap(paths)[1]) else "folders inside"
        raise UserError(
            f"{given.source} has the one folder of images {name!r}, and a classifier needs two classes or "
            f"more: if they are in {where}, give {advise(tree, given)}"
        )


def describe_inside(tree: Tree) -> list[str]:
    """A line on folders that all classes hold, in case these were meant as classes."""
    if len(tree) < 2 or any(images_in(paths) for paths in tree.values()):
        return []
    common = set.intersection(*(set(inside(paths)) for paths in tree.values()))
    return [f"with the folders {_quoted(common)} in each, which are no classes"] if len(common) > 1 else []


def advise(tree: Tree, given: Given) -> str:
    """The flags that name the parts in some folders, or else the folder that holds the classes."""
    if given.packed:
        return f"{given.flag} tar files of it alone"
    prefix, paths = unwrap([f"{name}/{path}" for name, below in tree.items() for path in below])
    folders = folders_in(paths)

    def path(name: str) -> str:
        return given.path(prefix, name, unwrap(folders[name])[0])

    names = _parts(folders)
    if not names:
        return f"{given.flag} {given.path(prefix)}"
    train = next(name for name in names if _kind(name) == "train")
    known = classes_in(folders[train])
    others = sorted((n for n in names if known & classes_in(folders[n])), key=lambda n: _kind(n) != "val")
    others = [name for name in others if _kind(name) != "train"]
    if given.flag != "--data":
        return f"{given.flag} {path((others or names)[0])}"
    return f"--data {path(train)}" + (f" --val-data {path(others[0])}" if others else "")


def folder_of_classes(paths: Sequence[str], class_names: Iterable[str]) -> str:
    """The folder on the way to all of `paths` that holds folders of these names; "" if there is none."""
    prefix, below = unwrap(list(paths))
    return prefix if set(class_names).intersection(folders_in(below)) else ""


def _parts_error(tree: Tree, names: Sequence[str], given: Given) -> UserError:
    if not _parts({name: tree[name] for name in names}):  # of slices and variants, one
        names = [name for name in names if not _are(MADE, name)][:1] or names[:1]
    flags = advise({name: tree[name] for name in names}, given)
    how = "in tar files of its own" if given.packed else f"as in {flags}"
    return UserError(
        f"the classes of {given.source} would be {_quoted(tree)}, which looks like parts of a data set: "
        f"give one of them to {given.flag}, {how}{given.way_out}"
    )


# names --------------------------------------------------------------------------------------------------


def _part(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(train, val or test; the other words of the name), of a name that has such a word."""
    for i, word in enumerate(found := words(name)):
        if match := PART.fullmatch(word):
            rest = found[:i] + found[i + 1 :]
            return match.lastgroup or "", tuple(w for w in rest if not VARIANTS.fullmatch(w))
    return None


def _kind(name: str) -> str:
    part = _part(name)
    return part[0] if part else ""


def _parts(tree: Tree) -> list[str]:
    """Folders whose names differ by what part they are alone: seg_train, seg_test; train2017, val2017.

    Or by more, if they hold the same classes: Training, PublicTest.
    """
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in tree:
        if part := _part(name):
            groups[part[1]].append(name)
    found = []
    for group in groups.values():
        kinds = {_kind(name) for name in group}
        if "train" in kinds and (len(kinds) > 1 or _all_bare(tree)):
            found += group
    called = [name for group in groups.values() for name in group]
    several = len({_kind(name) for name in called}) > 1
    trained = [name for name in called if _kind(name) == "train"]
    if not found and several and trained and _share_any(tree, trained[0], called):
        return called
    return found


def _all_bare(names: Iterable[str]) -> bool:
    """Whether all are called train, val, test and the like, and nothing else."""
    return all(words(name) and _part(name) and len(words(name)) == 1 for name in names)


def _slices(tree: Tree) -> list[str]:
    """fold1, fold2, ...; images_001, images_002, ..."""
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in tree:
        stem = tuple(words(name))
        if _are(SLICES, name) and re.search(r"\d", name):
            groups[stem].append(name)
    return next((group for group in groups.values() if len(group) > 1), [])


def _are(kind: re.Pattern[str], name: str) -> bool:
    """Whether the name has no words but those of this kind: part_b of VARIANTS, masks of MADE."""
    found = [word for word in words(name) if len(word) > 1]
    return bool(found) and all(map(kind.fullmatch, found))


def _variants(tree: Tree) -> list[str]:
    """part_1, part_2; color, grayscale: only with the same classes inside."""
    names = [name for name in tree if _are(VARIANTS, name)]
    return names if len(names) > 1 and _share_classes(tree, names) else []


def _pictures_and_made(tree: Tree) -> tuple[str, str] | None:
    """(images, what was made from them) by the names of folders and files, if there is nothing else."""
    pictures = [name for name in tree if _are(PICTURES, name)]
    made = [name for name in tree if name not in pictures and any(map(MADE.fullmatch, words(name)))]
    if not pictures or not made or not _only_parts(tree, [*pictures, *made]):
        return None
    stems = {os.path.splitext(path)[0] for path in tree[pictures[0]]}
    alike = sum(os.path.splitext(path)[0] in stems for path in tree[made[0]])
    return (pictures[0], made[0]) if 2 * alike >= len(tree[made[0]]) else None


# what is inside ----------------------------------------------------------------------------------------


def _only_parts(tree: Tree, names: Sequence[str]) -> bool:
    """Whether none of the others is a class as most are: with images in it, and not called as a part is."""
    others = (name for name in tree if name not in names)
    return not any(
        images_in(tree[name]) and not _part(name) and not _are(VARIANTS, name) for name in others
    )


def _share_classes(tree: Tree, names: Sequence[str]) -> bool:
    """Whether the first and each other hold folders (or labels) of the same names."""
    first, *others = (classes_in(tree[name]) for name in names)
    return all(len(first & o) > 1 and 2 * len(first & o) >= min(len(first), len(o)) for o in others)


def _share_any(tree: Tree, first: str, names: Sequence[str]) -> bool:
    return any(_share_classes(tree, (first, name)) for name in names if name != first)


def _like_data_sets(tree: Tree, parts: Sequence[str]) -> bool:
    """Whether the training part holds classes: those of another part, or no images but folders."""
    train = next(name for name in parts if _kind(name) == "train")
    return _share_any(tree, train, parts) or (not images_in(tree[train]) and bool(classes_in(tree[train])))


def _quoted(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(map(repr, listed[:6])) + (f", ... ({len(listed)})" if len(listed) > 6 else "")
