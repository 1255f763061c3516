"""Train an image classifier on all devices of a machine, or of many.

torchrun --nproc_per_node=4 train/main.py --data DIR

A run that was interrupted, however it was, is resumed by the same command with its --name or --resume auto.

Exit code of each process: 0 done; 1 a bug, or another rank was lost; 2 unusable settings or data, or the
training diverged; 143 stopped by SIGTERM, SIGINT or SIGHUP, with a snapshot written. torchrun makes 1
of all but 0.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not train/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from serve.contract.errors import UserError
from serve.contract.installation import require

require("train", "torch")

from serve.contract.interrupts import end_on_signal
from train.home import ensure_home
from train.signals import (
    EXIT_CODE,
    Preempted,
    StopRequest,
    end_with_agent,
    outlive_readers,
)

if __name__ == "__main__":  # before the imports that take seconds
    end_on_signal(importing=True, code=EXIT_CODE)
    home_warning = ensure_home()

import shlex
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.elastic.multiprocessing.errors import record

from serve.contract.urls import redact
from train.checkpoint import checkpoint_folder, load_checkpoint
from train.cli import parse_config
from train.config import TrainConfig
from train.data.download import fetch
from train.data.workers import allow_open_files, fit_workers
from train.distributed import (
    Ranks,
    limit_waiting,
    lost_contact,
    on_main,
    process_group,
    ranks_from_environment,
)
from train.engine.build import Job, assemble
from train.engine.checks import check_batch_size
from train.engine.device import choose_device, choose_workers, configure
from train.engine.prepare import prepare
from train.engine.shutdown import give_up, leave, stopped
from train.engine.trainer import Epochs
from train.runs.directory import draw_subject_crops, open_folder, report_files, run_folder
from train.runs.history import History
from train.runs.mirror import localise, mirrored
from train.runs.resume import how_to_resume, only_writer
from train.runs.snapshots import Say, newest_whole
from train.tracking.base import NullTracker
from train.tracking.build import build_tracker

ALONE_SECONDS = 10.0  # in which a rank with the same error has ended, and torchrun says so


def run(
    config: TrainConfig, ranks: Ranks, device: torch.device, num_workers: int, stop: StopRequest
) -> None:
    """The whole training run, read downwards. Call inside a process group."""
    say: Say = (lambda text: print(redact(text))) if ranks.is_main else lambda _: None
    asked = config
    local, url = localise(asked, ranks, say)
    config = fetch(local, ranks, partial(print, flush=True))
    config, data = on_main(ranks, lambda: prepare(config))
    data = data.shared(ranks, Path(config.output) / ".cache")
    folder = run_folder(config)
    stop.advice = partial(how_to_resume, asked, config)
    for note in data.notes:
        say(note)
    say(f"train {len(data.train)} images {data.train.counts()}")
    say(f"val   {len(data.val)} images {data.val.counts()}")
    fitting, warning = fit_workers(config, ranks, num_workers, len(data.train), len(data.val))
    if warning and ranks.local_rank == 0:
        print(warning, flush=True)
    if fitting != num_workers:
        num_workers = fitting
        configure(config, ranks, device, num_workers)
    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(only_writer(folder, say))

        if config.resume:
            on_main(ranks, claim)
        state = newest_state(folder, ranks, say) if config.resume else None
        job = assemble(config, data, state, ranks, device, num_workers, say)
        on_main(ranks, lambda: open_folder(config, data))
        if not config.resume:
            on_main(ranks, claim)
        say(
            f"{config.name}: {config.model} with {job.parameters()['num_parameters']:,} parameters, "
            f"{ranks.world_size} processes x {torch.get_num_threads()} threads on {device.type}, "
            f"{job.trainee.precision}"
        )
        limit_waiting(config.hang_minutes)
        run_id = state["run_id"] if state else ""
        epochs_done = job.history.epochs_done
        tracker = build_tracker(config, ranks.is_main, folder / "metrics.jsonl", epochs_done, run_id)
        if job.history.best:
            tracker.log_best(job.history.best_epoch, job.history.best)
        tracker.start(job.parameters(), redact(asked.data or config.data, hidden=""), data.digest)
        there = f"{url}/{config.name}" if url and ranks.is_main else ""
        publish = stack.enter_context(mirrored(folder, there, say))
        status = "FAILED"
        stop.began = True
        try:
            Epochs(job, folder, tracker, stop, say, publish).run()
            report(job, folder, tracker)
            status = "FINISHED" if job.history.complete(config) else "KILLED"
        except (KeyboardInterrupt, Preempted):  # also when torchrun ended the ranks that were left
            status = "FAILED" if stop.lost_peer else "KILLED"
            raise
        except RuntimeError as error:
            if stop.told and lost_contact(error):  # to ranks that ended sooner
                status = "KILLED"
            raise
        finally:
            tracker.end(status)
    if ranks.is_main:
        say(summary(job.history, config, data.val.labels, there or str(folder)))
        if not job.history.complete(config):
            say(stop.advice())


def newest_state(folder: Path, ranks: Ranks, say: Say) -> dict[str, Any] | None:
    """Of the newest whole snapshot; None when the run ended before its first."""
    path = on_main(ranks, lambda: newest_whole(checkpoint_folder(folder), say))
    if path is None:
        return None
    state = load_checkpoint(path)
    step = state.get("position", {}).get("step", 0)
    say(f"going on from {path}: {state['epoch']} epochs and {step} steps are done")
    return state


def report(job: Job, folder: Path, tracker: NullTracker) -> None:
    """Figures, and copies of everything in MLflow."""
    if not job.ranks.is_main:
        return
    if job.config.subject_crop != "none":
        draw_subject_crops(folder, job.trainee.evaluated, job.data, job.config)
    tracker.log_best(job.history.best_epoch, job.history.best)
    tracker.log_files(report_files(folder, tracker.rows, job.data, job.config))


def summary(history: History, config: TrainConfig, labels: NDArray[np.int64], folder: str) -> str:
    """What the best epoch's validation says, and how certainly; `labels` [N] are the validation images'."""
    from train.evaluation.significance import accuracy_interval  # which the other ranks need not import

    best, num_val = history.best, len(labels)
    correct = np.arange(num_val) < round(best["val/accuracy"] * num_val)
    accuracy = accuracy_interval(correct)
    undone = doubt = ""
    largest = np.bincount(labels).max() / num_val
    if accuracy.low <= largest:
        cure = "Train it longer"
        if config.class_weights == "none":
            cure += ", or with --class_weights balanced where classes differ in size"
        if accuracy_interval(np.ones(num_val, bool)).low <= largest:
            cure = "No model could be, on so few: validate on more, by --val_fraction or --folds"
        doubt = (
            f"warning: always naming the largest class would be right for {largest:.4f} of them, and the "
            f"model is not surely better; val/f1_macro is {best['val/f1_macro']:.4f}. {cure}\n"
        )
    if not history.complete(config):
        undone = (
            f"stopped after {history.epochs_done} of {config.epochs + config.retune_epochs} epochs, as "
            "--stop-after says\n"
        )
    return (
        f"{undone}best epoch {history.best_epoch}: val/accuracy {accuracy.value:.4f} (95 % interval "
        f"{accuracy.low:.4f} to {accuracy.high:.4f}, {num_val} validation images), val/log_loss "
        f"{best['val/log_loss']:.4f} (calibrated {best['val/log_loss_calibrated']:.4f})\n"
        f"{doubt}run directory {folder}\n"
        f"next: python export/main.py --run {shlex.quote(folder)}"
    )


def is_mine_to_say(ranks: Ranks, stop: StopRequest) -> bool:
    """An error is said once a machine: by its first rank, or by another one that has it alone. If all have
    it, torchrun ends the others as soon as the first has ended."""
    deadline = time.monotonic() + ALONE_SECONDS
    while ranks.local_rank and not stop.received and time.monotonic() < deadline:
        time.sleep(0.05)
    return not stop.received or not ranks.local_rank


@record
def main() -> None:
    ranks = ranks_from_environment()
    stop = StopRequest()
    stop.install()
    try:
        end_with_agent()
        allow_open_files()
        config = parse_config(sys.argv[1:])
        device = choose_device(config, ranks)
        num_workers = choose_workers(config, ranks, device)
        configure(config, ranks, device, num_workers)
        check_batch_size(config, ranks.world_size)
        with process_group(ranks, device):
            try:
                run(config, ranks, device, num_workers, stop)
            except RuntimeError as error:
                if not lost_contact(error):
                    raise
                give_up(ranks, error, stop)
    except (UserError, FloatingPointError) as error:
        stop.noted = True  # it ends already: torchrun, which tells it to, need not be obeyed
        if is_mine_to_say(ranks, stop):
            where = "" if ranks.is_main else f" (rank {ranks.rank})"
            print(f"error{where}: {redact(error)}", file=sys.stderr, flush=True)
            if stop.began and isinstance(error, UserError):
                print(f"once that is mended, {stop.advice()}", file=sys.stderr, flush=True)
        leave(2)
    except (KeyboardInterrupt, Preempted):
        stop.noted = True
        leave(stopped(ranks, stop))


if __name__ == "__main__":
    outlive_readers()
    if home_warning and ranks_from_environment().is_main:
        print(home_warning, flush=True)
    main()
