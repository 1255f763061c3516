"""Resuming: which run a command continues, which command continues a run, and the lock of its directory."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from serve.contract.errors import UserError
from serve.contract.locks import file_lock, is_locked
from train.checkpoint import CheckpointError, checkpoint_folder, last_checkpoint, load_checkpoint
from train.cli import parse_unchecked
from train.config import TrainConfig
from train.distributed import Log
from train.runs.directory import read_status
from train.runs.history import History, changed_settings
from train.runs.snapshots import list_snapshots, snapshot_position

WAIT_FOR_LOCK_SECONDS = 60.0  # torchrun gives the processes of an earlier start 30 s to end
LOCK = ".lock"


def started_at() -> time.struct_time:
    """Return when this process, or the torchrun that restarts it, was started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):
            return time.localtime(psutil.Process(os.getppid()).create_time())
    return time.localtime()


def choose_run(config: TrainConfig) -> TrainConfig:
    """Return the settings with `resume` set to the run directory to continue, "" for a new run.

    `config` has a name unless `resume` is auto. An unfinished run of the same name and settings is
    continued: what a job that was killed needs is the same command. Raises UserError if the name is taken
    by a finished run (unless `resume` is auto), by a run of other settings, or by something else.
    """
    if config.resume not in ("", "auto"):
        return config
    if config.name:
        return config.replace(resume=_named_run(config))
    output = Path(config.output)
    for folder in sorted(output.iterdir() if output.is_dir() else (), key=_progress, reverse=True):
        saved = read_settings(folder)
        if saved is None or changed_settings(saved.to_dict(), config) or saved.data != config.data:
            continue
        if not is_finished(folder, config) and not is_locked(folder / LOCK):
            return config.replace(resume=str(folder), name=folder.name)
    return config.replace(resume="")


def _named_run(config: TrainConfig) -> str:
    folder = Path(config.output) / config.name
    if not folder.exists():
        return ""
    if folder.is_dir() and not any(folder.iterdir()):  # killed between two instructions
        return str(folder)
    saved = read_settings(folder)
    if saved is None:
        raise UserError(f"{str(folder)!r} exists and is not a run directory: choose another --name")
    if changed := changed_settings(saved.to_dict(), config):
        raise UserError(
            f"run {str(folder)!r} exists with other settings ({changed}): choose another --name, or "
            f"resume it with --resume {folder}"
        )
    if not config.resume and is_finished(folder, config):
        raise UserError(
            f"run {str(folder)!r} exists and is finished: choose another --name, or give "
            f"--resume {folder} and more --epochs"
        )
    return str(folder)


def read_settings(folder: Path) -> TrainConfig | None:
    """Return the settings of a run; None if it has none, or none that this version understands."""
    path = folder / "config.yaml"
    try:
        return parse_unchecked(["--config", str(path)]) if path.is_file() else None
    except (OSError, ValueError):  # a folder that this user may not enter, as lost+found
        return None


def is_finished(folder: Path, config: TrainConfig) -> bool:
    """Return whether the run ended well, and its newest whole checkpoint has all epochs of `config`."""
    if read_status(folder) != "FINISHED":
        return False
    for path in [*list_snapshots(checkpoint_folder(folder)), last_checkpoint(folder)]:
        try:
            return History(**load_checkpoint(path, "meta")["history"]).complete(config)
        except CheckpointError:
            continue
    return False


@contextmanager
def only_writer(folder: Path, log: Log) -> Iterator[None]:
    """Hold the run directory's lock, waiting a minute for a process that is about to end. Raises UserError
    if another process keeps it, or nothing can be written in the folder."""
    risk = "two trainings of this run at once are not noticed, and spoil it"
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / LOCK, risk, log, WAIT_FOR_LOCK_SECONDS))
        except OSError as error:
            raise UserError(f"run {str(folder)!r} cannot be written: {error.strerror}") from error
        yield


def _progress(folder: Path) -> tuple[int, int, float]:
    """Return epochs and further steps that a run has done, and when its folder changed: the sort key."""
    try:
        newest = list_snapshots(checkpoint_folder(folder))
        return *(snapshot_position(newest[0]) if newest else (0, 0)), folder.stat().st_mtime
    except OSError:  # a link to nothing, deleted meanwhile, or somebody else's
        return 0, 0, 0.0


def how_to_resume(given: TrainConfig, config: TrainConfig) -> str:
    """Return a line with the command that resumes this run, "" before the run has a folder.

    It is the present command, with the name that the run got. `given` are the settings as they were typed.
    """
    folder = Path(config.output) / config.name
    if not folder.exists():
        return ""
    command = started_by()
    if not given.name and given.resume in ("", "auto"):
        command += ["--name", config.name]
    if given.stop_after:
        command += ["--stop-after", "0"]
    if any(checkpoint_folder(folder).glob("*.pt")):
        return f"resume with: {shlex.join(command)}"
    return f"no snapshot was written yet; start the run again with: {shlex.join(command)}"


def started_by() -> list[str]:
    """Return the command that started this process, or the torchrun that did."""
    command = list(sys.orig_argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):
            command = psutil.Process(os.getppid()).cmdline() or command
    script = "".join(command[1:2])
    if os.path.isabs(script) and os.access(script, os.X_OK) and not script.endswith(".py"):
        name = os.path.basename(script)  # a program like torchrun, listed with its interpreter
        return [name if shutil.which(name) == script else script, *command[2:]]
    return command
