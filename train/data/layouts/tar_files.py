"""Layout "tar": labelled images in tar files, among them WebDataset's shards, read in place.

The label of KEY.jpg is the text of KEY.cls, where KEY ends at the first dot (WebDataset). Without such
members a tar file holds a folder for each class, or images with their labels in their names.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from serve.contract.archive import SUFFIX, list_tars, member_names, read_member
from serve.contract.errors import UserError
from serve.contract.listing import has_image_suffix, system_folder
from serve.contract.packed import describe_packed, packed_by_name
from serve.contract.text_encoding import likely_encodings, reads_as
from train.data.labels import LabelledPaths, check_none_missing
from train.data.layouts.flat import label_of
from train.data.layouts.folder_tree import Folder
from train.data.layouts.parts import DataSource, check_folders, split_name

LABEL_SUFFIX = ".cls"
MAX_LABEL_BYTES = 1000


def matches(source: Path) -> bool:
    return source.suffix == SUFFIX if source.is_file() else bool(list_tars(source))


def read(source: Path, flag: str) -> LabelledPaths:
    """Return the images of the tar file, or of those in the folder, as SHARD.tar/MEMBER.

    Of several images of a key, KEY.jpg is the one of the class; others (KEY.seg.png) are left out.

    Raises:
        UserError: a tar file is damaged, or an image has no label or two; the message names the tar file.
    """
    tars = list_tars(source)
    _check_one_part(tars)
    shards = [(tar, *_members(tar)) for tar in tars]
    extra = {kind for tar, images, label_files in shards if label_files for kind in _extra(tar, images)}
    labels: dict[str, str] = {}
    written: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    classes: defaultdict[str, list[str]] = defaultdict(list)  # folder -> images in it
    for tar, images, label_files in shards:
        for name in images:
            if not label_files:
                label = _label_of_path(tar, name)
                classes[label].append(name.removeprefix(f"{label}/"))
            elif (extension := _extension(name)) in extra:
                left_out[extension] += 1
                continue
            else:
                label = _written_label(tar, name, label_files)
                written[label] += 1
            labels[f"{tar.name}/{name}"] = label
    check_none_missing(written, f"the {LABEL_SUFFIX} files of {source}", "give it another name", ())
    folders = {label: Folder.of(classes[label]) for label in sorted(classes)}
    facts, warnings = check_folders(folders, DataSource(str(source), flag, in_tars=True))
    if source.is_dir():
        warnings += _packed_beside(source)
    for kind, count in left_out.items():
        warnings.append(f"{count} images KEY.{kind} are left out: KEY.SUFFIX is the image of its class")
    root = source.parent if source.is_file() else source
    return LabelledPaths(root, labels, "; ".join(["images in tar files", *facts]), warnings)


def _check_one_part(tars: Sequence[Path]) -> None:
    """Raise UserError when shards of training and of validation are in one folder."""
    parts: defaultdict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    for tar in tars:
        part, rest = split_name(tar.stem)
        parts[rest].setdefault(part, tar)
    for found in parts.values():
        others = [tar for part, tar in found.items() if part not in ("", "train")]
        if "train" in found and others:
            raise UserError(
                f"{found['train'].name} and {others[0].name} in {found['train'].parent} look like parts of "
                "a data set: move the shards of each part into a folder of its own, train and val"
            )


def _packed_beside(folder: Path) -> list[str]:
    """Return a line about compressed tar files and archives in the folder, which are not read."""
    names = sorted(name for name in os.listdir(folder) if packed_by_name(name))
    if not names or not (packed := packed_by_name(names[0])):
        return []
    cure = describe_packed(packed, str(folder / names[0]))
    return [f"{len(names)} files beside the tar files are not read; {names[0]!r} is {cure}"]


def _members(tar: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of images, and key -> name of its label file."""
    names = [name for name in member_names(tar) if not _is_hidden(name)]
    label_files = _by_key(name for name in names if name.endswith(LABEL_SUFFIX))
    images = [name for name in names if has_image_suffix(name)]
    return images, {key: _main_member(tar, same) for key, same in label_files.items()}


def _is_hidden(name: str) -> bool:
    """Return whether it is ._cat.0.jpg, .thumbnails/cat.0.jpg, __MACOSX/cat.0.jpg or the like."""
    hidden = (part.startswith(".") and part != ".." for part in name.split("/"))
    return bool(system_folder(name)) or any(hidden)


def _by_key(names: Iterable[str]) -> dict[str, list[str]]:
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_key[_key(name)].append(name)
    return by_key


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _extra(tar: Path, images: list[str]) -> set[str]:
    """Return the extensions (seg.png) of images beside the main one of their key."""
    several = [same for same in _by_key(images).values() if len(same) > 1]
    return {_extension(name) for same in several for name in same if name != _main_member(tar, same)}


def _main_member(tar: Path, names: list[str]) -> str:
    """Return the one of a key's members that is called KEY.SUFFIX, or the only one."""
    plain = [name for name in names if "." not in _extension(name)] if len(names) > 1 else names
    if len(plain) != 1:
        few = ", ".join(map(repr, names[:3])) + (", ..." if names[3:] else "")
        wanted = _key(names[0]).lstrip("/") + os.path.splitext(names[0])[1]
        raise UserError(
            f"{tar}: {few} have one key, which ends at the first dot: call one of them {wanted} and the "
            "others KEY.WORD.SUFFIX, or give each a key of its own"
        )
    return plain[0]


def _written_label(tar: Path, image: str, label_files: dict[str, str]) -> str:
    key = _key(image)
    if key not in label_files:
        raise UserError(f"{tar}: {image!r} has no label: there is no {key.lstrip('/')}{LABEL_SUFFIX}")
    member = label_files[key]
    data = read_member(str(tar), member, MAX_LABEL_BYTES)
    try:
        label = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{tar}: {member!r} is not UTF-8: {data[:50]!r} {reads_as(likely_encodings([data.strip()]))}; "
            "write the labels in UTF-8"
        ) from error
    if not label or len(label) > MAX_LABEL_BYTES:
        raise UserError(f"{tar}: {member!r} is no label: it is empty or above {MAX_LABEL_BYTES} bytes")
    return label


def _label_of_path(tar: Path, image: str) -> str:
    folder, in_folder, _ = image.partition("/")
    label = folder if in_folder else label_of(image)
    if not label:
        raise UserError(
            f"{tar}: no label for {image!r}: give it a member of the same name with {LABEL_SUFFIX}, a "
            "folder for each class, or names as in cat.0.jpg"
        )
    return label
