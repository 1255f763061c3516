"""Where predictions are written: a local file, or a local copy that is published when it is whole."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from serve import storage
from serve.contract.errors import UserError
from serve.contract.files import check_folder_writable
from serve.contract.urls import is_remote
from serve.local_copy import LocalCopy, temporary_copy
from serve.outputs.formats import is_predictions
from serve.shards import Shard, is_manifest, manifest_path


@contextmanager
def open_output(
    output: str, suffix: str, shard: Shard | None, flag: str = "--output"
) -> Iterator[tuple[Path, LocalCopy]]:
    """Yield the file to write, with a shard a part in the folder `output`, and where it is published.

    Raises UserError and FileNotFoundError for what cannot be written, before anything is scored.
    """
    output = output or ("predictions" if shard else f"predictions{suffix}")
    if not shard and output.rpartition("/")[2] in ("", ".", "..", "-"):
        raise UserError(f"{flag} {output!r} is not the name of a file, as predictions{suffix} is")
    if not is_remote(output):
        path = _local_output(Path(output), suffix, shard, flag)
        yield path, LocalCopy(path.parent)
        return
    folder, _, name = output.rpartition("/")
    if shard:
        folder, name = output.rstrip("/"), shard.part_name(suffix)
    elif folder.endswith("/"):
        raise UserError(
            f"{flag} {output} names no object in a bucket, such as s3://bucket/predictions{suffix}"
        )
    storage.check_store_writable(folder)
    with temporary_copy(folder) as copy:
        yield copy.folder / name, copy


def check_output_replaceable(
    copy: LocalCopy,
    path: Path,
    overwrite: bool,
    keep_manifest: bool = False,
    is_ours: Callable[[IO[bytes]], bool] = is_predictions,
    flag: str = "--output",
) -> None:
    """Raises UserError when an output at `path`, or its manifest, would replace another kind of file.

    An object that may be written and not read cannot be examined.
    """
    tests = {path: is_ours} | ({manifest_path(path): is_manifest} if keep_manifest else {})
    for file, test in {} if overwrite else tests.items():
        try:
            with copy.open(file) as opened:
                if test(opened):
                    continue
        except FileNotFoundError:
            continue
        except (PermissionError, IsADirectoryError):
            if copy.url:
                continue
        raise UserError(
            f"{flag}: {copy.url_of(file)} exists, and this command did not write it: choose another "
            "name, or give --overwrite to replace it"
        )


def _local_output(path: Path, suffix: str, shard: Shard | None, flag: str) -> Path:
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder of {flag} {str(path)!r} does not exist; make it first")
    # a link is written through, as of a redirected standard output
    folder = path if shard and path.is_dir() else Path(os.path.realpath(path)).parent
    if shard:
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag} {str(path)!r} is not a folder; --shard writes part files into one")
    elif path.exists() and not path.is_file():  # replaced at the end, so found out too late
        raise UserError(f"{flag} {str(path)!r} is not a regular file")
    check_folder_writable(folder, flag)
    return path / shard.part_name(suffix) if shard else path
