"""A run directory in an object store: --output s3://bucket/runs.

Training writes a local run directory; what is new in it is copied to the store in a thread, files before
the snapshot that goes with them, so that what is there can be gone on from at any moment. The store is the
truth: a start on whatever machine begins with what is there.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.urls import redact
from train.checkpoint import CHECKPOINTS, checkpoint_folder
from train.config import TrainConfig
from train.data.download import Remote, Say, copy_file, is_remote, list_objects, needs_packages, open_store
from train.distributed import Ranks, gather_list, on_main
from train.runs.resume import LOCK, only_writer
from train.runs.snapshots import list_snapshots

UNPUBLISHED = ".unpublished"
PROBE = ".writable"
SNAPSHOTS = "checkpoints/"
RETRY_SECONDS = 15.0


def localise(config: TrainConfig, ranks: Ranks, say: Say) -> tuple[TrainConfig, str]:
    """Settings whose `output` is local, with the run directory as it is in the store, and the URL that
    `output` was, "" if it is local anyway. All ranks must call it.

    Raises:
        UserError: the store cannot be used; the message names the URL.
    """
    url = config.output.rstrip("/")
    if not is_remote(url):
        return config, ""
    if not config.name or config.resume not in ("", "auto"):
        raise UserError(
            f"--output {url} needs a --name, by which the run is found again, and no --resume PATH"
        )
    if url.startswith(("http://", "https://")):
        raise UserError(f"--output {url}: HTTP servers take no files; give a folder, s3:// or gs://")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purebred"
    except RuntimeError as reason:  # neither HOME nor an entry for this user
        raise UserError(
            f"--output {url} keeps a copy of the run here, and this user has no home folder: set HOME, or "
            "XDG_CACHE_HOME"
        ) from reason
    local = config.replace(output=str(home / f"runs-{hashlib.sha256(url.encode()).hexdigest()[:16]}"))
    folder, there = Path(local.output) / config.name, f"{url}/{config.name}"

    def first() -> None:
        with _explained(url):
            Mirror(folder, there, say).settle()

    on_main(ranks, first)
    error = ""
    if ranks.local_rank == 0 and not ranks.is_main:
        try:
            with _explained(url):
                Mirror(folder, there, say).bring()
        except ValueError as reason:
            error = str(reason)
    errors = [text for part in gather_list([error], ranks) for text in part if text]
    if errors:
        raise UserError(errors[0])
    return local, url


@contextmanager
def mirrored(folder: Path, url: str, say: Say) -> Iterator[Callable[[], None]]:
    """Gives a function that asks for what is new in `folder` to be copied to `url`; at the end, all is.

    Raises:
        UserError: at the end, the store does not take it; it stays in `folder`.
    """
    if not url:
        yield lambda: None
        return
    mirror = Mirror(folder, url, say)
    mirror.start()
    try:
        yield mirror.wake.set
    except BaseException:
        try:
            mirror.end()
        except ValueError as error:  # what ended the run is to be seen
            say(f"warning: {error}")
        raise
    mirror.end()


class Mirror:
    """Of one run directory. Its thread is the only one that writes in the store."""

    def __init__(self, folder: Path, url: str, say: Say):
        self.folder, self.url, self.say = folder, url, say
        self.store, self.root = open_store(url)
        self.published: dict[str, tuple[int, int]] = {}
        """Names of files as they are in the store: size and time of change of the file here."""
        self.wake, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self.failed = ""

    def settle(self) -> None:
        """Make here and there equal: what was not published wins if it is at least as far."""
        with only_writer(self.folder, self.say) if self.folder.exists() else nullcontext():
            self._settle()

    def _settle(self) -> None:
        probe = f"{self.root}/{PROBE}"
        self.store.pipe_file(probe, b"")  # better now than after an epoch
        self.store.rm_file(probe)
        objects = self._objects()
        if (self.folder / UNPUBLISHED).exists() and self._newest_here() >= _newest(objects):
            self.say(f"publishing what an earlier start left in {self.folder}")
            self.publish()
        else:
            self.bring(objects)

    def bring(self, objects: dict[str, Remote] | None = None) -> None:
        """Here becomes what is there."""
        objects = self._objects() if objects is None else objects
        for path in self.folder.iterdir() if objects and self.folder.exists() else ():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not objects:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            size = sum(remote.size or 0 for remote in objects.values()) / 1e6
            self.say(f"copying {self.url}: {len(objects)} files, {size:.0f} MB, to {self.folder}")
        for name, remote in objects.items():
            copy_file(self.store, remote, self.folder / name)

    def start(self) -> None:
        self.thread.start()

    def end(self) -> None:
        """Raises UserError when not everything could be published."""
        self.over.set()
        self.wake.set()
        self.thread.join()
        if self.failed:
            raise UserError(
                f"{self.url} does not take the run: {self.failed}. It is whole in {self.folder}; "
                "the same command on this machine publishes it"
            )

    def publish(self) -> None:
        """Everything that is new; then older snapshots than those that are here are deleted there."""
        (self.folder / UNPUBLISHED).touch()
        files = self._files()
        by_inode: dict[int, str] = {}
        for name, path in files.items():
            try:
                status = path.stat()
                stamp = status.st_size, status.st_mtime_ns
                if self.published.get(name) != stamp:
                    twin = by_inode.get(status.st_ino, "")
                    if twin and self.published.get(twin) == stamp:  # last.pt is a snapshot's other name
                        self.store.cp_file(f"{self.root}/{twin}", f"{self.root}/{name}")
                    else:
                        self.store.put_file(str(path), f"{self.root}/{name}")
                    self.published[name] = stamp
                by_inode[status.st_ino] = name
            except FileNotFoundError:
                if path.exists():  # it is the bucket that is missing
                    raise
        for name in self._objects().keys() - files.keys():
            if f"{SNAPSHOTS}epoch-" < name < SNAPSHOTS + self._newest_here():
                self.store.rm_file(f"{self.root}/{name}")
        (self.folder / UNPUBLISHED).unlink(missing_ok=True)

    def _work(self) -> None:
        while True:
            self.wake.wait(RETRY_SECONDS if self.failed else None)
            last = self.over.is_set()
            self.wake.clear()
            try:
                self.publish()
                if self.failed:
                    self.say(f"{self.url} takes files again, and has what it missed")
                self.failed = ""
            except Exception as error:  # botocore's, aiohttp's and google's exceptions share no base
                if not self.failed:
                    self.say(
                        f"warning: {self.url} takes nothing, later again: {error or type(error).__name__}"
                    )
                self.failed = str(error) or type(error).__name__
            if last:
                return

    def _files(self) -> dict[str, Path]:
        """Of the run directory, those that are whole: snapshots last, the newest of them at the end."""
        found = [
            path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith(".")
        ]
        snapshots = {
            path: number for number, path in enumerate(list_snapshots(checkpoint_folder(self.folder)))
        }
        found.sort(
            key=lambda path: (path.parent.name == CHECKPOINTS, -snapshots.get(path, 2**31), str(path))
        )
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def _objects(self) -> dict[str, Remote]:
        return list_objects(self.store, self.root)

    def _newest_here(self) -> str:
        return max((path.name for path in list_snapshots(checkpoint_folder(self.folder))), default="")


def _newest(objects: dict[str, Remote]) -> str:
    names = (name.removeprefix(SNAPSHOTS) for name in objects if name.startswith(SNAPSHOTS + "epoch-"))
    return max(names, default="")


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"--output {needs_packages(url, error)}") from error
    except Exception as error:
        raise UserError(redact(f"--output {url}: {error or type(error).__name__}")) from error
