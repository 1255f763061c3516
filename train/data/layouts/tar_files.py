"""Layout "tar": labelled images in tar files, among them WebDataset's shards, read in place.

The label of KEY.jpg is the text of KEY.cls, where KEY ends at the first dot (WebDataset). Without such
members the tar files hold a folder for each class, or images with their labels in their names.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

from serve.contract.archive import SUFFIX, list_tars, read_member
from serve.contract.errors import UserError
from serve.contract.text_encoding import likely_encodings, reads_as
from train.data.labels import LabelledPaths, check_none_missing, listed
from train.data.layouts.flat import labels_of
from train.data.layouts.folder_tree import Folder
from train.data.layouts.listing import describe_hidden, packed_beside
from train.data.layouts.parts import DataSource, check_folders, split_name
from train.data.layouts.tar_members import (
    LABEL_SUFFIX,
    MAYBE_LABEL,
    TarMembers,
    by_key,
    extension,
    key_of,
    read_shard,
    without_extra,
)

MAX_LABEL_BYTES = 1000


def matches(source: Path) -> bool:
    return source.suffix == SUFFIX if source.is_file() else bool(list_tars(source))


def read(source: Path, flag: str) -> LabelledPaths:
    """Return the images of the tar file, or of those in the folder, as SHARD.tar/MEMBER.

    Of several images of a key, KEY.jpg is the one of the class; others (KEY.seg.png) are left out.

    Raises:
        UserError: a tar file is damaged, or an image has no label or two; the message names the tar file.
    """
    shards, left_out = without_extra([read_shard(tar) for tar in list_tars(source)])
    facts: list[str] = []
    warnings: list[str] = []
    if any(shard.label_files for shard in shards):
        labels = _written_labels(shards, source)
    else:
        labels, facts, warnings = _labels_of_paths(shards, DataSource(str(source), flag, in_tars=True))
    _check_one_part({s.tar: {labels[s.path(image)] for image in s.images} for s in shards})
    if source.is_dir():
        warnings += packed_beside(source, "tar files")
    for kind, count in left_out.items():
        warnings.append(f"{count} images KEY.{kind} are left out: KEY.SUFFIX is the image of its class")
    facts += describe_hidden(sorted({folder for shard in shards for folder in shard.hidden}))
    if links := [shard.path(name) for shard in shards for name in shard.links]:
        warnings.append(
            f"{len(links)} links in tar files are not read ({listed(links, 3)}): if they are images, pack "
            "the files themselves by tar --dereference --hard-dereference"
        )
    root = source.parent if source.is_file() else source
    return LabelledPaths(root, labels, "; ".join(["images in tar files", *facts]), warnings)


def _check_one_part(classes: Mapping[Path, set[str]]) -> None:
    """Raise UserError when shards of several parts of a data set are in one folder.

    These are shards with names of two parts (pets-train-0, val-0), and those of a part to validate on
    beside others of its classes (pets-0, pets-val-0).
    """
    parts: dict[str, tuple[Path, set[str]]] = {}
    for tar, labels in classes.items():
        parts.setdefault(split_name(tar.stem)[0], (tar, set()))[1].update(labels)
    for (part, (tar, known)), (other_part, (other, others)) in permutations(parts.items(), 2):
        if part not in ("", "train") and (other_part or not known.isdisjoint(others)):
            raise UserError(
                f"{other.name} and {tar.name} in {tar.parent} look like parts of a data set: move the "
                "shards of each part into a folder of its own, train and val"
            )


def _written_labels(shards: Sequence[TarMembers], source: Path) -> dict[str, str]:
    """Return path -> the text of its label file."""
    labels = {
        shard.path(image): _written_label(shard.tar, image, shard.label_files)
        for shard in shards
        for image in shard.images
    }
    counts = Counter(labels.values())
    check_none_missing(counts, f"the {LABEL_SUFFIX} files of {source}", "give it another name", ())
    return labels


def _written_label(tar: Path, image: str, label_files: dict[str, str]) -> str:
    key = key_of(image)
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


def _labels_of_paths(
    shards: Sequence[TarMembers], source: DataSource
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return (path -> its folder or what is in its name, facts, warnings)."""
    names = dict.fromkeys(name for shard in shards for name in shard.images)
    around, inside = Folder.of(names).unwrap()
    if len(inside.folders) < 2 or inside.images:
        around = ""  # it is not around the folders of classes, as pets/cat/1.jpg is
    cut = len(around) + 1 if around else 0
    in_names, warnings = labels_of(name for name in names if "/" not in name)
    labels: dict[str, str] = {}
    classes: defaultdict[str, list[str]] = defaultdict(list)  # label -> images in its folder
    for shard in shards:
        for name in shard.images:
            folder, _, rest = name[cut:].partition("/")
            label = folder if rest else in_names[name]
            labels[shard.path(name)] = label
            classes[label].append(rest or name)
    warnings += _check_unread_labels(shards, labels, source.flag)
    for shard in shards:
        if unnamed := [name for name in shard.images if not labels[shard.path(name)]]:
            raise UserError(
                f"{shard.tar}: no label for {unnamed[0]!r}: give it a member of the same name with "
                f"{LABEL_SUFFIX}, a folder for each class, or names as in cat.0.jpg"
            )
    folders = {label: Folder.of(classes[label]) for label in sorted(classes)}
    facts, doubts = check_folders(folders, source)
    return labels, [*([f"in the folder {around!r}"] if around else []), *facts], warnings + doubts


def _check_unread_labels(shards: Sequence[TarMembers], labels: Mapping[str, str], flag: str) -> list[str]:
    """Return a line about members that may hold the labels of the images beside them, if any.

    Raises UserError where they surely do, or where images are in no folders of classes.
    """
    one_class = flag == "--data" and len(set(labels.values())) == 1
    for shard in shards:
        images = by_key(shard.images)
        for member in shard.others:
            found, beside = MAYBE_LABEL.search(extension(member)), images.get(key_of(member))
            if not found or not beside:
                continue
            line = (
                f"{shard.tar}: {member!r} beside {beside[0]!r} may hold its label, and is not read: give "
                f"each image a member KEY{LABEL_SUFFIX} with the name of its class, or name images and "
                f"classes in a label file for {flag}"
            )
            if found["surely"] or one_class or "/" not in member:
                raise UserError(line)
            return [line]
    return []
