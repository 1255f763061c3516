"""Train an image classifier on all devices of a machine, or of many.

torchrun --nproc_per_node=4 train/main.py --data DIR

A run that was interrupted, however it was, is resumed by the same command with its --name or --resume auto.

Exit code of each process: 0 done; 1 a bug, a full disk, or another rank was lost; 2 unusable settings or
data, too little memory, or the training diverged; 143 stopped by SIGTERM, SIGINT or SIGHUP, with a snapshot
written. torchrun makes 1 of all but 0, train/launch.py does not.
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not train/, belongs on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from serve.contract.installation import require

require("train", "torch")

from serve.contract.interrupts import end_on_signal
from train.home import ensure_home
from train.signals import EXIT_CODE, StopRequest, ignore_broken_pipes, stop_with_agent

if __name__ == "__main__":  # before the imports that take seconds
    end_on_signal(importing=True, code=EXIT_CODE)
    home_warning = ensure_home()

from contextlib import ExitStack
from functools import partial

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from serve.contract.urls import redact
from train.checkpoint import checkpoint_folder
from train.cli import parse_config
from train.config import TrainConfig
from train.data.download import fetch
from train.data.workers import allow_open_files, fit_workers
from train.distributed import Ranks, limit_waiting, main_log, on_main, process_group, ranks_from_environment
from train.engine.build import build_run
from train.engine.checks import check_batch_size
from train.engine.device import choose_device, choose_workers, configure, explained_out_of_memory
from train.engine.prepare import prepare
from train.engine.shutdown import exit_after_bug, exit_with_code, recorded_status, while_in_contact
from train.engine.trainer import Trainer
from train.evaluation.predictions import predictions_at_a_stop
from train.runs.directory import create_run_folder, run_folder
from train.runs.mirror import Mirror, localise
from train.runs.report import training_summary, write_run_report
from train.runs.resume import how_to_resume, only_writer
from train.runs.snapshots import load_newest
from train.tracking.base import build_tracker
from train.tracking.contents import sources_of


def train(
    given: TrainConfig, ranks: Ranks, device: torch.device, num_workers: int, stop: StopRequest
) -> None:
    """Do a whole training run. Every rank calls it inside the process group."""
    log = main_log(ranks)
    config, store = localise(given, ranks, log)
    config = fetch(config, ranks, partial(print, flush=True))
    config, data = on_main(ranks, lambda: prepare(config))
    data = data.shared(ranks, Path(config.output) / ".cache")
    folder = run_folder(config)
    stop.advice = partial(how_to_resume, given, config)
    for note in data.notes:
        log(note)
    fitting = fit_workers(config, ranks, num_workers, len(data.train), len(data.val))
    if fitting < num_workers:  # training gets the threads of the others
        num_workers = fitting
        configure(config, ranks, device, num_workers)

    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(only_writer(folder, log))

        if config.resume:
            on_main(ranks, lock)
        checkpoint = load_newest(checkpoint_folder(folder), ranks, log) if config.resume else None
        run = build_run(config, data, checkpoint, ranks, device, num_workers, log)
        on_main(ranks, lambda: create_run_folder(config, data))
        if not config.resume:
            on_main(ranks, lock)
        log(str(run))
        limit_waiting(config.hang_minutes)

        history, run_id = run.history, checkpoint["run_id"] if checkpoint else ""
        metrics = folder / "metrics.jsonl"
        remote = f"{store}/{config.name}" if store and ranks.is_main else ""
        tracker = build_tracker(config, ranks.is_main, metrics, history.epochs_done, run_id, remote)
        if history.best:
            tracker.log_best(history.best_epoch, history.best)
        digests = data.digest, data.val.digest() if ranks.is_main else ""
        sources = [redact(source, hidden="") for source in sources_of(given, config)]
        tracker.start(run.parameters(), *zip(sources, digests, strict=True))
        publish = stack.enter_context(Mirror(folder, remote, log)) if remote else lambda: None
        stack.enter_context(predictions_at_a_stop(folder, ranks.is_main))
        with recorded_status(run, folder, tracker, stop):
            Trainer(run, folder, tracker, stop, log, publish).fit()
            if ranks.is_main:
                location = remote or str(folder)
                predictions = write_run_report(
                    folder, run.state.evaluated, history, data, config, tracker, location
                )
                log(training_summary(history, config, predictions, location))
    if ranks.is_main and not history.complete(config):
        log(stop.advice())


@exit_after_bug()
@record  # torchrun's error file is written before the process ends
def main() -> None:
    ranks, stop = ranks_from_environment(), StopRequest()
    stop.install()
    with exit_with_code(ranks, stop):
        stop_with_agent()
        allow_open_files()
        config = parse_config(sys.argv[1:])
        device = choose_device(config, ranks)
        num_workers = choose_workers(config, ranks, device)
        configure(config, ranks, device, num_workers)
        check_batch_size(config, ranks.world_size)
        with ExitStack() as stack:
            stack.enter_context(process_group(ranks, device))
            stack.enter_context(while_in_contact(ranks, stop))
            stack.enter_context(explained_out_of_memory(config, ranks, device))
            train(config, ranks, device, num_workers, stop)


if __name__ == "__main__":
    ignore_broken_pipes()
    if home_warning:
        main_log(ranks_from_environment())(home_warning)
    main()
