"""Copy a data set at a URL to local disk, once on each machine, and continue after a stop."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from serve import storage
from serve.contract.errors import UserError
from serve.contract.files import atomic_write
from serve.contract.locks import file_lock
from serve.contract.urls import is_remote, redact, unsigned, url_path
from train.config import TrainConfig
from train.distributed import Log, Ranks, gather_list

INDEX = ".copied.json"
UNFINISHED = f"{INDEX}.unfinished"
RISK = "two jobs that copy the same data disturb each other"


def fetch(config: TrainConfig, ranks: Ranks, log: Log) -> TrainConfig:
    """Return settings whose `data` and `val_data` are local; the first rank of a machine copies.

    All ranks must call it.

    Raises:
        UserError: it cannot be copied; the message names the URL.
    """
    changes, error = {}, ""
    for first in (True, False):  # not all at once, also where there are no locks
        for name in ("data", "val_data"):
            url = getattr(config, name)
            if not error and is_remote(url) and first == (ranks.local_rank == 0):
                try:
                    changes[name] = str(copy(url, Path(config.output) / ".cache", first, log))
                except (OSError, ValueError) as reason:
                    error = redact(f"--{name.replace('_', '-')} {reason}")
        errors = [text for part in gather_list([error], ranks) for text in part if text]
        if errors:
            raise UserError(errors[0])
    return config.replace(**changes)


def copy(url: str, cache: Path, refresh: bool, log: Log) -> Path:
    """Return a local folder with all files below `url`, or the one file that it names.

    Processes that want the same one wait for the first. `refresh`: what has changed since an earlier copy
    is copied again, and what is gone is deleted.

    Raises:
        UserError: nothing there, no room, not readable, or packages are missing.
    """
    # the same for a URL that was signed anew
    home = cache / f"data-{hashlib.sha256(os.fsencode(unsigned(url))).hexdigest()[:16]}"
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(home.with_suffix(".lock"), RISK, log):
        known = _read_index(home / INDEX)
        if known is None or refresh:
            try:
                known = _update(url, home, log)
            except OSError as error:
                known = _read_index(home / INDEX)
                if known is None:
                    raise UserError(redact(f"{url} cannot be copied: {error}")) from error
                log(redact(f"warning: {url} cannot be listed, an earlier copy is used: {error}"))
    single = url_path(url).rstrip("/").rpartition("/")[2]
    return home / single if list(known) == [single] else home


def _update(url: str, home: Path, log: Log) -> dict[str, list[Any]]:
    """Make the copy what is at the URL now; return size and version of each file."""
    files = {file.name: file for file in storage.list_files(url)}
    if not files:
        raise UserError(f"{redact(url)} holds no files: check the URL")
    wanted: dict[str, list[Any]] = {name: [file.size, file.version] for name, file in files.items()}
    known = _read_index(home / INDEX)
    copied = known or _read_index(home / UNFINISHED) or {}  # what has a name is whole; a version is needed
    keep = {n for n in files if copied.get(n) == wanted[n] and _is_whole(home / n, files[n])}
    if known == wanted and len(keep) == len(files):
        return wanted
    missing = [file for name, file in files.items() if name not in keep]
    total, free = sum(file.size or 0 for file in missing), shutil.disk_usage(home).free
    what = f"{redact(url)}: {len(missing)} of {len(files)} files, {total / 1e9:.2f} GB, to {home}"
    if total > free:
        room = f"which has {free / 1e9:.2f} GB free"
        raise UserError(f"{what}, {room}: free some or choose another --output")
    log(f"copying {what}")
    started = time.perf_counter()
    (home / INDEX).unlink(missing_ok=True)
    for path in [path for path in home.rglob("*") if not path.is_dir()]:
        if path.relative_to(home).as_posix() not in keep:
            path.unlink()
    with atomic_write(home / UNFINISHED, "w", errors="surrogatepass") as index:
        index.write(json.dumps(wanted))
    storage.get_files(missing, home)
    (home / UNFINISHED).rename(home / INDEX)
    log(f"copied in {time.perf_counter() - started:.0f} s")
    return wanted


def _is_whole(path: Path, file: storage.RemoteFile) -> bool:
    """Return whether a copy is one of this version, and was not cut by a crash of the machine."""
    try:
        size = path.stat().st_size
    except OSError:
        return False
    return bool(file.version) and file.size in (None, size)


def _read_index(path: Path) -> dict[str, list[Any]] | None:
    """Return what is copied, or was being copied; None without an index."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None
