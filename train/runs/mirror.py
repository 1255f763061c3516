"""A run directory at a URL: --output s3://bucket/runs.

Training writes a local run directory; what is new in it is copied to the URL in a thread, files before the
snapshot that goes with them, so that what is there can be resumed at any moment. The copy at the URL is the
true one: a start on whatever machine begins with it.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from serve import storage
from serve.contract.errors import UserError
from serve.contract.files import cache_folder
from serve.contract.urls import is_remote, redact
from train.checkpoint import CHECKPOINTS, checkpoint_folder
from train.config import TrainConfig
from train.distributed import Log, Ranks, gather_list
from train.evaluation.predictions import TABLE
from train.runs.resume import LOCK, only_writer
from train.runs.snapshots import list_snapshots

UNPUBLISHED = ".unpublished"
SNAPSHOT = f"{CHECKPOINTS}/epoch-"
RETRY_SECONDS = 15.0


def localise(config: TrainConfig, ranks: Ranks, log: Log) -> tuple[TrainConfig, str]:
    """Return settings whose `output` is local, with the run directory as it is at the URL, and the URL that
    `output` was, "" if it is local anyway. All ranks must call it. Raises UserError if the
    URL cannot be used."""
    url = config.output.rstrip("/")
    if not is_remote(url):
        return config, ""
    if not config.name or config.resume not in ("", "auto"):
        raise UserError(f"--output {url} needs a --name, which identifies the run, and no --resume PATH")
    home = cache_folder(f"--output {url}") / f"runs-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    mirror = Mirror(home / config.name, f"{url}/{config.name}", log)
    for machine in (0, 1):  # rank 0 first: what it publishes, the others copy
        error = ""
        if ranks.local_rank == 0 and machine == min(ranks.rank, 1):
            try:
                mirror.reconcile() if ranks.is_main else mirror.fetch()
            except (OSError, ValueError) as reason:
                error = redact(f"--output {url}: {reason}")
        errors = [text for part in gather_list([error], ranks) for text in part if text]
        if errors:
            raise UserError(errors[0])
    return config.replace(output=str(home)), url


class Mirror:
    """Copies one run directory; its thread is the only one that writes at the URL."""

    def __init__(self, folder: Path, url: str, log: Log):
        self.folder, self.url, self.log = folder, url, log
        self.published: dict[str, tuple[int, int]] = {}
        """Names of files as they are at the URL: size and time of change of the local file."""
        self.wake, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self.failed = ""

    def __enter__(self) -> Callable[[], None]:
        """Start the thread; return a function that lets it copy what is new."""
        self.thread.start()
        return self.wake.set

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises UserError when not everything could be published, unless there is another error."""
        self.over.set()
        self.wake.set()
        self.thread.join()
        if self.failed:
            message = (
                f"{self.url} does not take the run: {self.failed}. It is whole in {self.folder}; the same "
                "command on this machine publishes it"
            )
            if error is None:
                raise UserError(message)
            self.log(f"warning: {message}")

    def reconcile(self) -> None:
        """Make both copies equal: a local one that was not published wins if it is at least as far."""
        storage.check_store_writable(self.url)  # better now than after an epoch
        with only_writer(self.folder, self.log) if self.folder.exists() else nullcontext():
            if (self.folder / UNPUBLISHED).exists() and self._newest() >= max(
                (Path(name).name for name in self._remote() if name.startswith(SNAPSHOT)), default=""
            ):
                self.log(f"publishing what an earlier start left in {self.folder}")
                self.publish()
            else:
                self.fetch()

    def fetch(self) -> None:
        """Make the local copy what is at the URL."""
        files = self._remote()
        for path in self.folder.iterdir() if files and self.folder.exists() else ():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not files:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        size = sum(file.size or 0 for file in files.values()) / 1e6
        self.log(f"copying {self.url}: {len(files)} files, {size:.0f} MB, to {self.folder}")
        storage.get_files(files.values(), self.folder)

    def publish(self) -> None:
        """Copy everything that is new; then delete older snapshots than the local ones at the URL, and
        the table of older predictions."""
        (self.folder / UNPUBLISHED).touch()
        files = self._local()
        by_inode: dict[int, str] = {}
        for name, path in files.items():
            try:
                status = path.stat()
                stamp = status.st_size, status.st_mtime_ns
                if self.published.get(name) != stamp:
                    twin = by_inode.get(status.st_ino, "")
                    if twin and self.published.get(twin) == stamp:  # last.pt is a snapshot's other name
                        storage.copy_object(f"{self.url}/{twin}", f"{self.url}/{name}")
                    else:
                        storage.put_file(path, f"{self.url}/{name}")
                    self.published[name] = stamp
                by_inode[status.st_ino] = name
            except FileNotFoundError:
                if path.exists():  # it is the bucket that is missing
                    raise
        for name, file in self._remote().items():
            replaced = name == TABLE or SNAPSHOT < name < f"{CHECKPOINTS}/{self._newest()}"
            if name not in files and replaced:
                storage.remove(file.url)
        (self.folder / UNPUBLISHED).unlink(missing_ok=True)

    def _work(self) -> None:
        while True:
            self.wake.wait(RETRY_SECONDS if self.failed else None)
            last = self.over.is_set()
            self.wake.clear()
            try:
                self.publish()
                if self.failed:
                    self.log(f"{self.url} can be written again, and has what it missed")
                self.failed = ""
            except Exception as error:  # a thread that died would publish nothing, in silence
                if not self.failed:
                    self.log(f"warning: {self.url} cannot be written, and is tried again: {error}")
                self.failed = str(error) or type(error).__name__
            if last:
                return

    def _local(self) -> dict[str, Path]:
        """Return the files that are whole: snapshots last, the newest of them at the end."""
        found = [p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        snapshots = {p: n for n, p in enumerate(list_snapshots(checkpoint_folder(self.folder)))}
        found.sort(key=lambda p: (p.parent.name == CHECKPOINTS, -snapshots.get(p, 2**31), str(p)))
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def _remote(self) -> dict[str, storage.RemoteFile]:
        files = storage.list_files(self.url)
        return {file.name: file for file in files if file.name != storage.PROBE}

    def _newest(self) -> str:
        return max((path.name for path in list_snapshots(checkpoint_folder(self.folder))), default="")
