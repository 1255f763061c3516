"""Labelled images in tar files, WebDataset's shards among them; they are read in place."""

import os
import re
from pathlib import Path

from serve.archive import list_tars, member_names, read_member
from serve.preprocess import has_image_suffix, system_folder

# The label is what stands before the running number: cat.0.jpg, american_bulldog_12.jpg
FLAT_NAME = re.compile(r"^(?P<label>.*[^\s._-])[\s._-]+\(?\d+\)?$", re.DOTALL)
LABEL_SUFFIX = ".cls"
MAX_LABEL_BYTES = 1000


def tar_root(source: Path) -> Path:
    return source.parent if source.is_file() else source


def tar_labels(source: Path) -> dict[str, str]:
    """SHARD.tar/MEMBER -> label.

    The label of KEY.jpg is the text of KEY.cls, where KEY ends at the first dot (WebDataset). A tar file
    without such members holds a folder for each class, or the label is in the names (cat.0.jpg).

    Raises:
        ValueError: damaged, or an image without a label; the message names the tar file.
    """
    labels: dict[str, str] = {}
    for tar in list_tars(source):
        names = member_names(tar)
        images = [name for name in names if has_image_suffix(name) and not _hidden(name)]
        written = {_key(name): name for name in names if name.endswith(LABEL_SUFFIX)}
        for name in images:
            label = _written(tar, name, written) if written else _from_name(tar, name)
            labels[f"{tar.name}/{name}"] = label
    if not labels:
        raise ValueError(f"the tar files of {source} hold no images")
    return labels


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
        raise ValueError(
            f"{tar}: {image!r} has no label: there is no {_key(image).lstrip('/')}{LABEL_SUFFIX}"
        )
    label = read_member(str(tar), member, MAX_LABEL_BYTES).decode("utf-8", "replace").strip()
    if not label or len(label) > MAX_LABEL_BYTES:
        raise ValueError(f"{tar}: {member!r} is no label: it is empty or above {MAX_LABEL_BYTES} bytes")
    return label


def _from_name(tar: Path, image: str) -> str:
    if "/" in image:
        return image.partition("/")[0]
    match = FLAT_NAME.match(os.path.splitext(image)[0])
    if match is None:
        raise ValueError(
            f"{tar}: no label for {image!r}: give it a member of the same name with {LABEL_SUFFIX}, a "
            "folder for each class, or names as in cat.0.jpg"
        )
    return match["label"]
