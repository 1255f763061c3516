"""Copy a data set from an object store to local disk, once on each machine, and go on after a stop."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.contract.errors import UserError
from serve.contract.installation import how_to_install
from serve.contract.locks import file_lock
from serve.contract.urls import redact, unsigned, url_path
from train.config import TrainConfig
from train.distributed import Ranks, gather_list

Say = Callable[[str], None]
THREADS = 32  # they wait for the network
PAUSES = (0.5, 2.0, 8.0)  # seconds before the second, third and last attempt
INDEX = ".copied.json"
UNFINISHED = f"{INDEX}.unfinished"
# What stores know of an object's content, the surest first
STAMPS = ["ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "Digest", "generation", "blob_id"]
STAMPS += ["mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "modify"]
STAMPS += ["modificationTime", "last_write_time"]


@dataclass(frozen=True)
class Remote:
    name: str
    """As the file system has it."""
    size: int | None
    stamp: str
    """Another one when the content is another; empty where the store does not say."""


def is_remote(source: str) -> bool:
    return "://" in source


def fetch(config: TrainConfig, ranks: Ranks, say: Say) -> TrainConfig:
    """Settings whose `data` and `val_data` are local; the first rank of a machine copies, all must call it.

    Raises:
        UserError: it cannot be copied; the message names the URL.
    """
    changes, error = {}, ""
    for first in (True, False):  # not all at once, also where there are no locks
        for name in ("data", "val_data"):
            url = getattr(config, name)
            if not error and is_remote(url) and first == (ranks.local_rank == 0):
                try:
                    changes[name] = str(copy(url, Path(config.output) / ".cache", first, say))
                except (OSError, ValueError) as reason:
                    error = redact(f"--{name} {reason}")
        errors = [text for part in gather_list([error], ranks) for text in part if text]
        if errors:
            raise UserError(errors[0])
    return config.replace(**changes)


def copy(url: str, cache: Path, look_again: bool, say: Say) -> Path:
    """A folder with all objects below `url`, or the one file that it names.

    Processes that want the same one wait for the first. `look_again`: what has changed since an earlier
    copy is copied again, and what is gone is deleted.

    Raises:
        UserError: nothing there, no room, not readable, or packages are missing.
    """
    # the same for a URL that was signed anew
    home = cache / f"data-{hashlib.sha256(os.fsencode(unsigned(url))).hexdigest()[:16]}"
    shown = redact(url)
    with _locked(home, say):
        known = _read_index(home)
        if known is None or look_again:
            try:
                known = _bring(url, home, known, say)
            except ImportError as error:
                raise UserError(needs_packages(url, error)) from error
            except ValueError:
                raise
            except Exception as error:  # botocore's, aiohttp's and google's exceptions share no base
                known = _read_index(home)
                if known is None:
                    reason = redact(error) or type(error).__name__
                    raise UserError(f"{shown} cannot be copied: {reason}") from error
                say(redact(f"warning: {shown} cannot be listed, an earlier copy is used: {error}"))
    single = url_path(url).rstrip("/").rpartition("/")[2]
    return home / single if list(known) == [single] else home


def _bring(url: str, home: Path, known: dict[str, list[Any]] | None, say: Say) -> dict[str, list[Any]]:
    files, found = _list(url)
    wanted = {path: [remote.size, remote.stamp] for path, remote in found.items()}
    if known is None:  # a start that was stopped says what it was copying
        known = _read_index(home, UNFINISHED) or {}
    missing = [
        path
        for path, remote in found.items()
        if known.get(path) != wanted[path] or not _is_whole(home / path, remote)
    ]
    if known == wanted and not missing:
        return wanted
    total = sum(found[path].size or 0 for path in missing)
    what = f"{redact(url)}: {len(missing)} of {len(found)} files, {total / 1e9:.2f} GB, to {home}"
    free = shutil.disk_usage(home).free
    if total > free:
        room = f"which has {free / 1e9:.2f} GB free"
        raise UserError(f"{what}, {room}: free some or choose another --output")
    if missing:
        say(f"copying {what}")
    started = time.perf_counter()
    _clear(home, wanted.keys() - set(missing))
    _write_index(home, wanted, UNFINISHED)

    def one(path: str) -> None:
        copy_file(files, found[path], home / path)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(one, missing):
            pass
    _write_index(home, wanted)
    (home / UNFINISHED).unlink()
    if missing:
        say(f"copied in {time.perf_counter() - started:.0f} s")
    return wanted


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it). Raises ImportError, UserError."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ValueError as error:  # an unknown scheme
        raise UserError(f"{redact(url)}: {redact(error)}") from error
    return files, root if url_path(url) != url else root.rstrip("/")


def list_objects(files: Any, root: str) -> dict[str, Remote]:
    """By their path below `root`; an object that is `root` itself by its own name.

    Raises:
        UserError: a name that cannot be a file's.
    """
    found: dict[str, Remote] = {}
    for name, info in files.find(root, detail=True).items():
        if name.endswith("/"):  # stands for a folder
            continue
        path = name.removeprefix(f"{root}/") if name != root else name.rpartition("/")[2]
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise UserError(f"the object {name!r} cannot be a file below a folder: rename it")
        found[path] = _remote(name, info)
    return found


def _remote(name: str, info: dict[str, Any]) -> Remote:
    stamps = (info.get(key) for key in STAMPS)
    return Remote(name, info.get("size"), str(next(filter(None, stamps), "")))


def needs_packages(url: str, error: ImportError) -> str:
    extra = "gcs" if url.startswith(("gs://", "gcs://")) else "cloud"
    return f"{redact(url)} needs packages that are not installed ({error}): {how_to_install(extra)}"


def _list(url: str) -> tuple[Any, dict[str, Remote]]:
    """(file system, relative path -> object)"""
    files, root = open_store(url)
    if not url.startswith(("http://", "https://")):
        found = list_objects(files, root)
    elif url_path(url).endswith(".tar"):
        found = {url_path(root).rpartition("/")[2]: _remote(root, files.info(root))}
    else:
        raise UserError(f"{redact(url)}: HTTP cannot list a folder; give a tar file, or an object store")
    if not found:
        raise UserError(f"{redact(url)}: there is nothing")
    return files, found


def _clear(home: Path, keep: set[str]) -> None:
    """From here on, until all is copied, there is no index, and what has its name is whole and wanted."""
    (home / INDEX).unlink(missing_ok=True)
    for folder, _, names in os.walk(home):
        for name in names:
            path = Path(folder, name)
            if path.relative_to(home).as_posix() not in keep:
                path.unlink()


def _is_whole(path: Path, remote: Remote) -> bool:
    """What has its name was whole when it came; what has no stamp may be another by now."""
    try:
        return bool(remote.stamp) and (path.stat().st_size == remote.size or remote.size is None)
    except OSError:
        return False


def copy_file(files: Any, remote: Remote, target: Path) -> None:
    """It appears under its name whole. Raises what the file system does, after the last attempt."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for pause in (*PAUSES, None):
        try:
            files.get_file(remote.name, str(temporary))
            size = temporary.stat().st_size
            if remote.size not in (None, size):
                raise OSError(f"{remote.name}: {size} bytes arrived of {remote.size}")
            temporary.replace(target)
            return
        except FileNotFoundError:
            raise
        except Exception:
            temporary.unlink(missing_ok=True)
            if pause is None:
                raise
            time.sleep(pause)


def _read_index(home: Path, name: str = INDEX) -> dict[str, list[Any]] | None:
    """What is copied, once all of it was; None before. UNFINISHED: what a start was copying."""
    try:
        known = json.loads((home / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _write_index(home: Path, files: dict[str, list[Any]], name: str = INDEX) -> None:
    temporary = home / f"{name}.tmp"
    temporary.write_text(json.dumps(files), encoding="utf-8", errors="surrogatepass")
    temporary.replace(home / name)


@contextmanager
def _locked(home: Path, say: Say) -> Iterator[None]:
    """One process at a time; a process that is killed leaves no lock behind."""
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(home.with_suffix(".lock"), "two jobs that copy the same data disturb each other", say):
        yield
