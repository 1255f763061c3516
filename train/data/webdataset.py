"""Labelled images in tar files, WebDataset's shards among them; they are read in place."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from serve.contract.archive import list_tars, member_names, read_member
from serve.contract.errors import UserError
from serve.contract.listing import has_image_suffix, system_folder
from train.data.labels import check_none_missing
from train.data.text_encoding import likely_encodings, reads_as

# The label is what stands before the running number: cat.0.jpg, american_bulldog_12.jpg
FLAT_NAME = re.compile(r"^(?P<label>.*[^\s._-])[\s._-]+\(?\d+\)?$", re.DOTALL)
LABEL_SUFFIX = ".cls"
MAX_LABEL_BYTES = 1000


def tar_root(source: Path) -> Path:
    return source.parent if source.is_file() else source


def tar_labels(source: Path) -> tuple[dict[str, str], list[str]]:
    """(SHARD.tar/MEMBER -> label, what is left out).

    The label of KEY.jpg is the text of KEY.cls, where KEY ends at the first dot (WebDataset); beside it,
    KEY.seg.png is no image of the class. A tar file without such members holds a folder for each class, or
    the label is in the names (cat.0.jpg).

    Raises:
        UserError: damaged, an image without a label, or two for one; the message names the tar file.
    """
    labels: dict[str, str] = {}
    shards = [(tar, *_members(tar)) for tar in list_tars(source)]
    masks = {kind for tar, images, written in shards if written for kind in _beside(tar, images)}
    left_out: Counter[str] = Counter()
    keys: Counter[str] = Counter()  # labels in .cls files
    for tar, images, written in shards:
        for name in images:
            if not written:
                label = _from_name(tar, name)
            elif (kind := _extension(name)) in masks:
                left_out[kind] += 1
                continue
            else:
                label = _written(tar, name, written)
                keys[label] += 1
            labels[f"{tar.name}/{name}"] = label
    if not labels:
        raise UserError(f"the tar files of {source} hold no images")
    check_none_missing(keys, f"the {LABEL_SUFFIX} files of {source}", "give it another name", ())
    return labels, [
        f"{count} images KEY.{kind} are left out: KEY.SUFFIX is the image of its class"
        for kind, count in left_out.items()
    ]


def _members(tar: Path) -> tuple[list[str], dict[str, str]]:
    """(images, key -> its label's name)"""
    names = member_names(tar)
    written = _by_key([name for name in names if name.endswith(LABEL_SUFFIX) and not _hidden(name)])
    return (
        [name for name in names if has_image_suffix(name) and not _hidden(name)],
        {key: _plain(tar, same) for key, same in written.items()},
    )


def _by_key(names: list[str]) -> dict[str, list[str]]:
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_key[_key(name)].append(name)
    return by_key


def _beside(tar: Path, images: list[str]) -> set[str]:
    """Extensions, as seg.png, of images beside another one of their key."""
    several = [same for same in _by_key(images).values() if len(same) > 1]
    chosen = {_plain(tar, same) for same in several}
    return {_extension(name) for same in several for name in same if name not in chosen}


def _plain(tar: Path, names: list[str]) -> str:
    """That of one key whose name is KEY.SUFFIX, or the only one."""
    plain = [name for name in names if "." not in _extension(name)] if len(names) > 1 else names
    if len(plain) != 1:
        few = ", ".join(map(repr, names[:3])) + (", ..." if names[3:] else "")
        wanted = _key(names[0]).lstrip("/") + os.path.splitext(names[0])[1]
        raise UserError(
            f"{tar}: {few} have one key, which ends at the first dot: call one of them {wanted} and the "
            "others KEY.WORD.SUFFIX, or give each a key of its own"
        )
    return plain[0]


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _hidden(name: str) -> bool:
    """._cat.0.jpg, .thumbnails/cat.0.jpg, __MACOSX/cat.0.jpg and other litter."""
    return bool(system_folder(name)) or any(
        part.startswith(".") and part != ".." for part in name.split("/")
    )


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _written(tar: Path, image: str, written: dict[str, str]) -> str:
    member = written.get(_key(image))
    if member is None:
        raise UserError(
            f"{tar}: {image!r} has no label: there is no {_key(image).lstrip('/')}{LABEL_SUFFIX}"
        )
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


def _from_name(tar: Path, image: str) -> str:
    if "/" in image:
        return image.partition("/")[0]
    match = FLAT_NAME.match(os.path.splitext(image)[0])
    if match is None:
        raise UserError(
            f"{tar}: no label for {image!r}: give it a member of the same name with {LABEL_SUFFIX}, a "
            "folder for each class, or names as in cat.0.jpg"
        )
    return match["label"]
