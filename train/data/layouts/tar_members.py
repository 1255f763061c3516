"""Members of tar files by their keys (WebDataset): images, label files and others."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from serve.contract.archive import list_members
from serve.contract.errors import UserError
from serve.contract.listing import has_image_suffix, system_folder
from train.data.layouts.listing import may_be_hidden_class

LABEL_SUFFIX = ".cls"
MAYBE_LABEL = re.compile(
    r"(?:^|\.)(?:(?P<surely>(?:cls|class|label|lbl)(?:\.txt|\.json)?)|json|txt)$", re.IGNORECASE
)
"""Extensions of members that other tools write labels to, and that are not read."""


class TarMembers(NamedTuple):
    """Names of a tar file's members."""

    tar: Path
    images: list[str]
    label_files: dict[str, str]
    """Key -> KEY.cls."""
    others: list[str]
    links: list[str]
    """Links that are images by their suffix, or may lead to a folder."""
    hidden: set[str]
    """Hidden folders that may be classes."""

    def path(self, image: str) -> str:
        return f"{self.tar.name}/{image}"


def read_shard(tar: Path) -> TarMembers:
    """Return the names in a tar file without hidden ones. Raises UserError when it is damaged."""
    members, irregular = list_members(tar)
    names = [name for name in members if not _is_hidden(name)]
    label_files = by_key(name for name in names if name.endswith(LABEL_SUFFIX))
    folders = {folder for name in members for folder in name.split("/")[:-1]}
    return TarMembers(
        tar,
        [name for name in names if has_image_suffix(name)],
        {key: main_member(tar, same) for key, same in label_files.items()},
        [name for name in names if not has_image_suffix(name) and not name.endswith(LABEL_SUFFIX)],
        [n for n in irregular if not _is_hidden(n) and (has_image_suffix(n) or not os.path.splitext(n)[1])],
        set(filter(may_be_hidden_class, folders)),
    )


def _is_hidden(name: str) -> bool:
    """Return whether it is ._cat.0.jpg, .thumbnails/cat.0.jpg, __MACOSX/cat.0.jpg or the like."""
    hidden = (part.startswith(".") and part != ".." for part in name.split("/"))
    return bool(system_folder(name)) or any(hidden)


def by_key(names: Iterable[str]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        found[key_of(name)].append(name)
    return found


def key_of(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def without_extra(shards: Sequence[TarMembers]) -> tuple[list[TarMembers], Counter[str]]:
    """Return the shards without images beside the main one of their key, and counts of these by extension.

    An extension (seg.png) is left out in all shards if most of its images are beside KEY.SUFFIX. A number
    is none: img.1.jpg beside img.jpg is a name.
    """
    beside: Counter[str] = Counter()
    for shard in shards:
        for same in by_key(shard.images).values():
            if len(same) > 1 and (shard.label_files or len(_plain(same)) == 1):
                main = main_member(shard.tar, same)
                beside.update(extension(name) for name in same if name != main)
    total = Counter(extension(name) for shard in shards for name in shard.images)
    extra = {
        kind
        for kind, count in beside.items()
        if 2 * count >= total[kind] and not kind.partition(".")[0].isdecimal()
    }
    kept = [s._replace(images=[n for n in s.images if extension(n) not in extra]) for s in shards]
    return kept, Counter({kind: total[kind] for kind in total if kind in extra})


def main_member(tar: Path, names: list[str]) -> str:
    """Return the one of a key's members that is called KEY.SUFFIX, or the only one."""
    plain = _plain(names) if len(names) > 1 else names
    if len(plain) != 1:
        few = ", ".join(map(repr, names[:3])) + (", ..." if names[3:] else "")
        wanted = key_of(names[0]).lstrip("/") + os.path.splitext(names[0])[1]
        raise UserError(
            f"{tar}: {few} have one key, which ends at the first dot: call one of them {wanted} and the "
            "others KEY.WORD.SUFFIX, or give each a key of its own"
        )
    return plain[0]


def _plain(names: Iterable[str]) -> list[str]:
    return [name for name in names if "." not in extension(name)]
