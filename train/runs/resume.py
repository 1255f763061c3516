"""Which run a command resumes, which command resumes a run, and that one process at a time writes in it."""

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
from train.cli import parse_config
from train.config import TrainConfig
from train.runs.history import History, changed_settings
from train.runs.snapshots import Say, list_snapshots, place_of

WAIT_FOR_LOCK_SECONDS = 60.0  # torchrun gives the processes of an earlier start 30 s to end
LOCK = ".lock"


def started_at() -> time.struct_time:
    """When the job began: torchrun's start, which a restart of its processes does not change."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):
            return time.localtime(psutil.Process(os.getppid()).create_time())
    return time.localtime()


def settle_run(config: TrainConfig) -> TrainConfig:
    """Set `resume` to the run directory that this command goes on with, or to "" for a new one.

    `config` has a name unless `resume` is auto. An unfinished run of the same name and settings is gone on
    with: what a job that was killed needs is the same command.

    Raises:
        UserError: the name is taken by a finished run (unless `resume` is auto), by a run of other
            settings, or by something else.
    """
    if config.resume not in ("", "auto"):
        return config
    asked = config.resume == "auto"
    output = Path(config.output)
    if config.name:
        folder = output / config.name
        if not folder.exists():
            return config.replace(resume="")
        if folder.is_dir() and not any(folder.iterdir()):  # killed between two instructions
            return config.replace(resume=str(folder))
        saved = read_settings(folder)
        if saved is None:
            raise UserError(f"{str(folder)!r} exists and is not a run directory: choose another --name")
        changed = changed_settings(saved.to_dict(), config)
        if changed:
            raise UserError(
                f"run {str(folder)!r} exists with other settings ({changed}): choose another --name, or "
                f"go on with it by --resume {folder}"
            )
        if not asked and is_finished(folder, config):
            raise UserError(
                f"run {str(folder)!r} exists and is finished: choose another --name, or give "
                f"--resume {folder} and more --epochs"
            )
        return config.replace(resume=str(folder))
    for folder in sorted(output.iterdir() if output.is_dir() else (), key=_progress, reverse=True):
        saved = read_settings(folder)
        if saved is None or changed_settings(saved.to_dict(), config) or saved.data != config.data:
            continue
        if not is_finished(folder, config) and not is_locked(folder / LOCK):
            return config.replace(resume=str(folder), name=folder.name)
    return config.replace(resume="")


def read_settings(folder: Path) -> TrainConfig | None:
    """None if there are none, or none that this version understands."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        return parse_config(["--config", str(path)])
    except ValueError:
        return None


def is_finished(folder: Path, config: TrainConfig) -> bool:
    """Its epochs are done, by its newest whole checkpoint, and its report is drawn."""
    if not (folder / "figures" / "worst_mistakes.png").exists():
        return False
    for path in [*list_snapshots(checkpoint_folder(folder)), last_checkpoint(folder)]:
        try:
            return History(**load_checkpoint(path, "meta")["history"]).complete(config)
        except CheckpointError:
            continue
    return False


@contextmanager
def only_writer(folder: Path, say: Say) -> Iterator[None]:
    """Hold the run directory's lock, waiting a minute for a process that is about to end.

    Raises:
        UserError: another process has it, or nothing can be written in the folder.
    """
    risk = "two trainings of this run at once are not noticed, and spoil it"
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / LOCK, risk, say, WAIT_FOR_LOCK_SECONDS))
        except OSError as error:
            raise UserError(f"run {str(folder)!r} cannot be written: {error.strerror}") from error
        yield


def _progress(folder: Path) -> tuple[int, int, float]:
    """Epochs and further steps that a run has done, and when its folder changed; more is further."""
    try:
        newest = list_snapshots(checkpoint_folder(folder))
        return *(place_of(newest[0]) if newest else (0, 0)), folder.stat().st_mtime
    except OSError:  # a link to nothing, deleted meanwhile, or somebody else's
        return 0, 0, 0.0


def how_to_resume(asked: TrainConfig, config: TrainConfig) -> str:
    """Name the command that resumes this run: the one that was `asked`, with the name that it got; ""
    before the run has a folder."""
    folder = Path(config.output) / config.name
    if not folder.exists():
        return ""
    command = started_by()
    if not asked.name and asked.resume in ("", "auto"):
        command += ["--name", config.name]
    if asked.stop_after:
        command += ["--stop-after", "0"]
    if any(checkpoint_folder(folder).glob("*.pt")):
        return f"resume with: {shlex.join(command)}"
    return f"no snapshot was written yet; start the run again with: {shlex.join(command)}"


def started_by() -> list[str]:
    """What was typed to start this process, or torchrun, which has started it."""
    command = list(sys.orig_argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):
            command = psutil.Process(os.getppid()).cmdline() or command
    script = "".join(command[1:2])
    if os.path.isabs(script) and os.access(script, os.X_OK) and not script.endswith(".py"):
        name = os.path.basename(script)  # of a program like torchrun, listed with its interpreter
        return [name if shutil.which(name) == script else script, *command[2:]]
    return command
