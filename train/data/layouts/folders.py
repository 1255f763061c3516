"""Layout "folders": one folder for each class, with images in it and in the folders below.

System folders, output of this program and masks of other images (masks.py) are left out
and counted. Parts of a data set in place of classes are an error (parts.py).
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.formats import count_by_name, describe_ignored
from serve.contract.listing import Listing, list_images
from train.data.labels import LabelledPaths
from train.data.layouts.folder_tree import Folder
from train.data.layouts.listing import (
    class_folders,
    describe_left_out,
    packed_beside,
)
from train.data.layouts.masks import find_derived
from train.data.layouts.parts import DataSource, check_folders


def matches(source: Path) -> bool:
    return source.is_dir() and bool(class_folders(source).names)


def read(source: Path, flag: str) -> LabelledPaths:
    """Return the images below the folders of `source`, labelled by the names of these folders.

    Raises UserError when there are no classes, a class has no images, or folders are no classes.
    """
    folders = class_folders(source)
    names = folders.names
    _check_links(source, names)
    listings = {name: list_images(source / name) for name in names}
    images = {  # without ._cat.0.jpg, .thumbnails/cat.0.jpg
        name: [path for path in listing.paths if not path.startswith(".") and "/." not in path]
        for name, listing in listings.items()
    }
    derived = find_derived(source, [f"{name}/{path}" for name in names for path in images[name]])
    left_out = {path for found in derived.values() for path in found}
    paths = {name: [p for p in images[name] if f"{name}/{p}" not in left_out] for name in names}
    classes = {name: Folder.of(paths[name]) for name in names if paths[name]}
    facts, warnings = check_folders(classes, DataSource(str(source), flag))
    ignored: Counter[str] = Counter()
    for name, listing in listings.items():
        folders.system.update(listing.system)
        if name in classes:
            warnings += _not_entered(name, listing)
            ignored += listing.ignored
        elif not images[name]:
            cure = f"fill it, or move it out of {source} if it is no class"
            lines = [*describe_ignored(listing.ignored), *_not_entered(name, listing)[:3], cure]
            raise UserError(f"class folder {str(source / name)!r} holds no images; {'; '.join(lines)}")
    facts += describe_left_out(folders)
    warnings += packed_beside(source, "class folders")
    if left_out:
        counts = count_by_name(Counter({pattern: len(found) for pattern, found in derived.items()}))
        warnings.append(f"{len(left_out)} masks or thumbnails of other images are left out ({counts})")
    if not classes or (len(classes) == 1 and (folders.outputs or left_out) and flag == "--data"):
        only = "".join(f" but {name!r}" for name in classes)
        raise UserError("; ".join([f"no class folders in {source}{only}", *facts, *warnings]))
    labels = {f"{name}/{path}": name for name in classes for path in paths[name]}
    layout = "; ".join(["one folder for each class", *facts])
    return LabelledPaths(source, labels, layout, warnings + describe_ignored(ignored))


def _check_links(root: Path, names: Sequence[str]) -> None:
    """Raise UserError when a linked folder does not exist, or gives an image two classes."""
    links = sorted(name for name in os.listdir(root) if os.path.islink(root / name))
    for name in links:
        if not (os.path.exists(root / name) or "." in name):
            raise UserError(
                f"{str(root / name)!r} is a link to {os.readlink(root / name)!r}, which does not exist: "
                "mount or fetch its target, or move the link elsewhere"
            )
    if not links:
        return
    targets = sorted((os.path.realpath(root / name) + "/", name) for name in names)
    twice = [(name, ".") for target, name in targets if f"{os.path.realpath(root)}/".startswith(target)]
    twice += [(a, b) for (target, a), (inside, b) in pairwise(targets) if inside.startswith(target)]
    if twice:
        raise UserError(
            f"the folders {twice[0][0]!r} and {twice[0][1]!r} in {root} hold the same images by a link, so "
            "each would have two classes: move the link elsewhere, or name the images in a label file"
        )


def _not_entered(name: str, listing: Listing) -> list[str]:
    """Return a line for each folder that was not entered."""
    cure = ": make the class folder itself the link, or name the images in a label file"
    return [
        f"{f'{name}/{folder}'!r}: {why}" + (cure if why.startswith("linked folder") else "")
        for folder, why in listing.problems.items()
    ]
