"""Where the labels of a folder are, and which of what is in it are no classes.

Left out, with a line: system folders, what this program wrote, masks of other images (masks.py).
Refused: parts of a data set where classes are expected (parts.py).
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from serve.contract.archive import SUFFIX, list_tars
from serve.contract.errors import UserError
from serve.contract.formats import UNREAD_SUFFIX
from serve.contract.listing import Listing, list_images, system_folder
from train.data.masks import find_made
from train.data.parts import Given, check_parts, check_wrapper, describe_inside
from train.data.run_outputs import is_output, is_report, without_outputs
from train.data.tree import Tree
from train.data.webdataset import FLAT_NAME

OTHER_WAYS = (
    (re.compile(r"\.(?:zip|t?gz|bz2|xz|zst|rar|7z)"), "unpack {}"),
    (
        re.compile(r"\.(?:parquet|arrow|tfrecords?|mdb|np[yz]|mat|h5|hdf5|pkl)"),
        "write the images in {} as files",
    ),
    (re.compile(r"\.(?:mp4|m4v|mov|avi|mkv|webm)"), "take frames from {}, for instance by ffmpeg"),
)
"""To images, where there are only files with these suffixes."""


def recognise(source: Path) -> str:
    """csv, tar, folders or flat. Raises UserError when it is none, or could be two."""
    if source.is_file():
        return "tar" if source.suffix == SUFFIX else "csv"
    try:
        listing = list_images(source, recursive=False)
    except PermissionError as error:
        raise UserError(f"{source} cannot be read: permission denied") from error
    top = [p for p in listing.paths if not p.startswith(".") and not is_report(source / p)]
    folders, _ = _class_folders(source)
    tars = list_tars(source)
    if top or tars:
        folders = [folder for folder in folders if not is_output(source / folder)]
    if top and folders:
        raise UserError(
            f"{source} holds both images ({top[0]!r}, ...) and folders ({folders[0]!r}, ...): say "
            "--data_format flat or --data_format folders"
        )
    if not top and not folders:
        if tars:
            return "tar"
        what = f"{source} holds no images, no class folders and no tar files"
        raise UserError("; ".join([what, *_left_out(listing.ignored), *_other_ways(listing.ignored)]))
    return "folders" if folders else "flat"


def flat_labels(root: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """(path -> label, facts about the layout, what a user should be warned of)"""
    labels: dict[str, str] = {}
    listing = list_images(root, recursive=False)
    for path in listing.paths:
        if path.startswith(".") or is_report(root / path):  # ._cat.0.jpg and other litter
            continue
        match = FLAT_NAME.match(os.path.splitext(path)[0])
        if match is None:
            raise UserError(
                f"no label in the file name {path!r} in {root}: expected label.number.suffix as in "
                "cat.0.jpg; use a folder for each class or a CSV manifest (path,label)"
            )
        labels[path] = match["label"]
    if not labels:
        left_out, ways = _left_out(listing.ignored), _other_ways(listing.ignored)
        raise UserError("; ".join([f"no images in {root}", *left_out, *ways]))
    return labels, _system_facts(_class_folders(root)[1]), _left_out(listing.ignored)


def folder_labels(root: Path, flag: str) -> tuple[dict[str, str], list[str], list[str]]:
    """(path -> class, facts about the layout, what a user should be warned of)

    Raises:
        UserError: there are no classes, or what looks like classes is none.
    """
    folders, system = _class_folders(root)
    _check_links(root, folders)
    listings = {folder: list_images(root / folder) for folder in folders}
    tree = {name: _visible(listing.paths) for name, listing in listings.items()}
    tree, outputs = without_outputs(root, tree)
    tree, made = _without_made(root, tree)
    given = Given(str(root), flag.replace("_", "-"))
    full = {name: paths for name, paths in tree.items() if paths}
    warnings, ignored = check_parts(full, given), Counter[str]()
    problems = list(warnings)
    if flag == "--data":
        check_wrapper(full, given)
    explained = {*outputs, *(place.split("/")[0] for place in made)}
    for name, listing in listings.items():
        system += listing.system
        if tree[name]:
            problems += _not_entered(name, listing)
            ignored += listing.ignored
        elif name not in explained:
            raise UserError(_no_images(root, name, listing))
    facts = ([] if warnings else describe_inside(full)) + _system_facts(system)
    if outputs:
        facts.append(f"output of this program left out ({', '.join(map(repr, outputs))})")
    if made:
        problems.append(
            f"{made.total()} masks or thumbnails of other images are left out ({_counted(made)})"
        )
    if not full or (len(full) == 1 and (outputs or made) and flag == "--data"):
        only = "".join(f" but {name!r}" for name in full)
        raise UserError("; ".join([f"no class folders in {root}{only}", *facts, *problems]))
    labels = {f"{name}/{path}": name for name, paths in full.items() for path in paths}
    return labels, facts, problems + _left_out(ignored)


def tar_parts(labels: dict[str, str], source: Path, flag: str) -> list[str]:
    """What a user should be warned of; `labels` are of images in tar files. Raises as check_parts does."""
    tree: Tree = {}
    for path, label in labels.items():
        member = path.partition(f"{SUFFIX}/")[2]
        inside = member.startswith(f"{label}/")  # else the label is in a file, or in the name
        tree.setdefault(label, []).append(member.removeprefix(f"{label}/") if inside else "")
    return check_parts(dict(sorted(tree.items())), Given(str(source), flag.replace("_", "-"), packed=True))


def _class_folders(root: Path) -> tuple[list[str], Counter[str]]:
    """(folders that may be classes, how many system folders have which name)"""
    folders: list[str] = []
    system: Counter[str] = Counter()
    for name in sorted(os.listdir(root)):
        if not os.path.isdir(root / name):
            continue
        if system_folder(f"{name}/") or os.path.isfile(root / name / "pyvenv.cfg"):  # Python's environments
            system[name] += 1
        elif not name.startswith("."):
            folders.append(name)
    return folders, system


def _check_links(root: Path, folders: Sequence[str]) -> None:
    """Raises UserError when linked folders are not there, or would give images two classes."""
    links = sorted(name for name in os.listdir(root) if os.path.islink(root / name))
    for name in links:
        if not (os.path.exists(root / name) or name.startswith(".") or os.path.splitext(name)[1]):
            target = os.readlink(root / name)
            raise UserError(
                f"{str(root / name)!r} is a link to {target!r}, which is not there: mount or fetch what it "
                "leads to, or move the link elsewhere"
            )
    if not links:
        return
    places = sorted((os.path.realpath(root / folder) + "/", folder) for folder in folders)
    for i, (place, folder) in enumerate(places):
        if f"{os.path.realpath(root)}/".startswith(place):
            raise UserError(
                f"{folder!r} in {root} is a link to a folder around it, so all images would be of that "
                "class too: move the link elsewhere, or name the images in a CSV manifest"
            )
        for other, name in places[i + 1 :]:
            if not other.startswith(place):
                break
            raise UserError(
                f"the folders {folder!r} and {name!r} in {root} are links to the same images, which would "
                "be of both classes: move one link elsewhere, or name the images in a CSV manifest"
            )


def _visible(paths: Sequence[str]) -> list[str]:
    """Without ._cat.0.jpg, .thumbnails/cat.0.jpg, .ipynb_checkpoints/ and other litter."""
    return [path for path in paths if not path.startswith(".") and "/." not in path]


# what is left out ---------------------------------------------------------------------------------------


def _without_made(root: Path, tree: Tree) -> tuple[Tree, Counter[str]]:
    """Without images made from others, and how many were where."""
    made = find_made(root, [f"{name}/{path}" for name, paths in tree.items() for path in paths])
    if not made:
        return tree, Counter()
    gone = {path for paths in made.values() for path in paths}
    kept = {name: [p for p in paths if f"{name}/{p}" not in gone] for name, paths in tree.items()}
    return kept, Counter({place: len(paths) for place, paths in made.items()})


def _system_facts(system: Counter[str]) -> list[str]:
    return [f"{system.total()} system folders left out ({_counted(system)})"] if system else []


# messages -----------------------------------------------------------------------------------------------


def _counted(counts: Counter[str]) -> str:
    listed = [f"{name} {count}" for name, count in counts.most_common(5)]
    return ", ".join([*listed, "..."] if len(counts) > 5 else listed)


def _left_out(ignored: Counter[str]) -> list[str]:
    """One line about files that are no images by their suffix."""
    kinds = Counter({suffix: count for suffix, count in ignored.items() if suffix})
    if not kinds:
        return []
    line = f"{kinds.total()} files are no images by their suffix ({_counted(kinds)})"
    if pictures := [suffix for suffix, _ in kinds.most_common() if UNREAD_SUFFIX.fullmatch(suffix)]:
        line += f"; convert {', '.join(pictures)}, for instance by magick mogrify -format jpg FILES"
    return [line]


def _other_ways(ignored: Counter[str]) -> list[str]:
    return [way.format(suffix) for kind, way in OTHER_WAYS for suffix in ignored if kind.fullmatch(suffix)]


def _no_images(root: Path, name: str, listing: Listing) -> str:
    cures = [*_other_ways(listing.ignored), *_not_entered(name, listing)[:3]]
    if not cures and not any(map(UNREAD_SUFFIX.fullmatch, listing.ignored)):
        cures = [f"fill it, or move it out of {root} if it is no class"]
    found = f"class folder {str(root / name)!r} holds no images"
    return "; ".join([found, *_left_out(listing.ignored), *cures])


def _not_entered(name: str, listing: Listing) -> list[str]:
    """A line for each folder that was not entered, with the cure."""
    cure = ": make the class folder itself the link, or name the images in a CSV manifest"
    return [
        f"{f'{name}/{folder}'!r}: {why}" + (cure if why.startswith("linked folder") else "")
        for folder, why in listing.problems.items()
    ]
