"""Trainer: the epochs of a run, with snapshots, and an end in order after a signal."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from serve.contract.errors import UserError
from train.checkpoint import checkpoint_folder
from train.data.workers import explain, first_line
from train.distributed import AsyncSum, Log, gather_list, on_main
from train.engine.autotune import is_compile_error
from train.engine.checkpointing import checkpoint_state
from train.engine.loop import EpochProgress, do_nothing, evaluate, train_one_epoch
from train.engine.profiler import StepProfiler
from train.engine.retune import begin_retuning
from train.engine.run import TrainingRun
from train.evaluation.metrics import Evaluation
from train.runs.directory import save_best, write_bad_files
from train.runs.report import epoch_line
from train.runs.snapshots import NullSnapshots, Snapshots, copy_to_cpu
from train.signals import Preempted, StopRequest
from train.tracking.base import NullTracker

LATE_BATCH_SECONDS = 10.0  # after a signal, until a rank whose batch does not come ends without the others


class Trainer:
    """Trains until the run is complete, at `stop_after`, or stopped by a signal."""

    def __init__(
        self,
        run: TrainingRun,
        folder: Path,
        tracker: NullTracker,
        stop: StopRequest,
        log: Log,
        publish: Callable[[], None] = do_nothing,
    ):
        """`publish` is called when the folder has a new snapshot."""
        self.run, self.folder, self.tracker, self.stop, self.log = run, folder, tracker, stop, log
        minutes, is_main = run.config.snapshot_minutes, run.ranks.is_main
        self.snapshots = (
            Snapshots(checkpoint_folder(folder), minutes, log, publish) if is_main else NullSnapshots()
        )
        self.snapshot_requested = False
        """Rank 0 requested one in the last step."""
        self.sums = AsyncSum(run.ranks)
        self.progress = EpochProgress(run.ranks, run.device, run.position)
        self.lost: dict[str, str] = {}
        """Files that were readable before training and are not now, of all ranks."""
        self.profiler = StepProfiler(run.config.profile if is_main else 0, folder / "profile", run.device)

    def fit(self) -> None:
        """Train all epochs that are left.

        Raises:
            Preempted: a rank got a signal; a snapshot is written.
            UserError: the best checkpoint cannot be written, or a loader process died.
        """
        run = self.run
        self.stop.polled = True
        run.train_loader.while_waiting = self._while_training_waits
        run.val_loader.while_waiting = self._while_waiting
        try:
            while not run.history.stopped(run.config):
                self._one_epoch()
                self.progress = EpochProgress(run.ranks, run.device)
        except Preempted:
            self.snapshots.write(self._checkpoint(within_epoch=True))
            raise
        except (RuntimeError, OSError) as error:
            reason = explain(error, run.train_loader.exit_codes() + run.val_loader.exit_codes())
            if reason is None and is_compile_error(error):
                reason = (  # a new run has tried it, a resumed one may be on another machine
                    f"{run.config.model} cannot be compiled on this machine ({first_line(error)}): resume "
                    "with --compile false"
                )
            if reason is None:
                raise
            raise UserError(reason) from error
        finally:
            self.stop.polled = False
            run.train_loader.while_waiting = run.val_loader.while_waiting = do_nothing  # no reference cycle
            self.snapshots.finish()
        self.sums.finish()
        self.snapshots.write_pending()

    def _one_epoch(self) -> None:
        run = self.run
        if run.history.retuning(run.config) and not run.is_retuning:
            self.progress = EpochProgress(run.ranks, run.device)  # an interrupted epoch before is dropped
            begin_retuning(run)
            run.train_loader.while_waiting = self._while_training_waits  # no sooner: it had no whole state
        self.profiler.start()
        values = train_one_epoch(run, self.progress, self._after_step)
        self.profiler.stop()
        evaluation: Evaluation | None = None
        metrics: dict[str, float] = {}
        if run.history.validates(run.config):
            metrics, evaluation = evaluate(run, self._agree)
            self._count_last_lost()
        improved = run.history.update(metrics, run.config)
        self._save(values | metrics, evaluation, improved)

    def _save(self, values: dict[str, float], evaluation: Evaluation | None, improved: bool) -> None:
        """Log the epoch's metrics; begin to write the best checkpoint, if it is that, and a snapshot."""
        run = self.run
        self.tracker.log_metrics(run.history.epochs_done, values)
        if improved:
            self.tracker.log_best(run.history.best_epoch, run.history.best)
        checkpoint, best = self._checkpoint(), None
        if run.ranks.is_main:
            checkpoint = copy_to_cpu(checkpoint)  # the next epoch begins while it is written
        if improved and evaluation is not None:
            best = partial(save_best, self.folder, checkpoint, run.data, evaluation, run.config)
        # MLflow gets an epoch once its snapshot is written: then it is not trained again
        self.snapshots.write(checkpoint, best, self.tracker.send)
        self.log(epoch_line(run.history, run.config, values, improved))

    def _checkpoint(self, within_epoch: bool = False) -> dict[str, object]:
        """Return a checkpoint, in an epoch with what each rank has of its own. Every rank must call it."""
        run = self.run
        position = self.progress.position(run.ranks, run.is_retuning) if within_epoch else None
        state = checkpoint_state(
            run.state, run.history, run.data, run.config, self.tracker.run_id, position
        )
        own = run.state.statistics_of_ranks(run.ranks) if within_epoch else None
        return state if own is None else state | {"statistics_of_ranks": own}

    def _after_step(self) -> None:
        """Begin a snapshot when one is due: all ranks together, at most two steps later."""
        self.profiler.step()
        run, step = self.run, self.progress.step
        # the answer comes one step later: until then it is not requested again
        self.snapshot_requested = not self.snapshot_requested and self.snapshots.due()
        due = self._agree(self.snapshot_requested)
        every = run.config.snapshot_steps
        done = run.history.epochs_done * run.plan.steps + step
        if step < run.plan.steps and (due or (every and done % every == 0)):
            self.snapshots.begin(self._checkpoint(within_epoch=True))

    def _agree(self, snapshot_due: bool = False) -> bool:
        """Exchange signals, snapshots that are due and lost files with the other ranks.

        Returns whether rank 0 wants a snapshot.

        Raises:
            Preempted: a rank got a signal.
        """
        lost = self.run.train_loader.lost | self.run.val_loader.lost
        new = len(lost.keys() - self.lost.keys())
        signalled, due, new_anywhere = self.sums.exchange(bool(self.stop.received), snapshot_due, new)
        if signalled:
            self.stop.ending = True
            raise Preempted
        if new_anywhere:
            self._count_lost(lost)
        return bool(due)

    def _count_last_lost(self) -> None:
        """Count files lost in the last batches, which `_agree` came too early for."""
        lost = self.run.train_loader.lost | self.run.val_loader.lost
        if any(gather_list(sorted(lost.keys() - self.lost.keys()), self.run.ranks)):
            self._count_lost(lost)

    def _count_lost(self, lost: dict[str, str]) -> None:
        """Add the lost files of all ranks to bad_files.csv. Every rank calls it at the same step.

        Raises:
            UserError: too many files cannot be read any more.
        """
        data, max_bad = self.run.data, self.run.config.max_bad
        for part in gather_list(list(lost.items()), self.run.ranks):
            self.lost |= dict(part)
        on_main(self.run.ranks, lambda: write_bad_files(self.folder, data.bad | self.lost))
        images = len(data.train) + len(data.val) + len(data.bad)
        unreadable = len(data.bad) + len(self.lost)
        if unreadable > max_bad * images:
            first = "; ".join(f"{path}: {reason}" for path, reason in list(self.lost.items())[:3])
            raise UserError(
                f"{unreadable} of {images} images cannot be read, {len(self.lost)} of them since training "
                f"began, more than --max-bad {max_bad:g} allows ({first}): restore them"
            )

    def _while_training_waits(self) -> None:
        if self.stop.received and self.run.ranks.world_size == 1:
            self.run.state.batch_norm.restore()  # of a step that will not be finished
        self._while_waiting()

    def _while_waiting(self) -> None:
        """Stop although a batch does not come. A single process stops as after a step; of several, none
        can write a snapshot without the others, which wait for this one."""
        if not self.stop.received:
            return
        if self.run.ranks.world_size == 1:
            self.stop.ending = True
            raise Preempted
        if time.monotonic() - self.stop.since > LATE_BATCH_SECONDS:
            raise KeyboardInterrupt
