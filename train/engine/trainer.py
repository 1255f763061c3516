"""The epochs of a run, with a snapshot now and then, and an end in order when told to stop."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from serve.contract.errors import UserError
from train.checkpoint import checkpoint_folder
from train.config import TrainConfig
from train.data.augment import PairMix
from train.data.workers import explain
from train.distributed import AsyncSum, gather_list
from train.engine.build import Job
from train.engine.loop import Running, evaluate, no_wish, train_one_epoch
from train.engine.profiler import StepProfiler
from train.engine.retune import begin_retuning, retuning
from train.engine.state import checkpoint_state
from train.evaluation.metrics import Evaluation
from train.runs.directory import save_best, write_bad_files
from train.runs.history import History
from train.runs.snapshots import Position, Say, Snapshots, copy_to_cpu
from train.signals import Preempted, StopRequest
from train.tracking.base import NullTracker

LATE_BATCH_SECONDS = 10.0  # after a signal, until a rank whose batch does not come ends without the others


class Epochs:
    """Trains until the run is complete, at `stop_after`, or told to stop."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        tracker: NullTracker,
        stop: StopRequest,
        say: Say,
        publish: Callable[[], None] = no_wish,
    ):
        """`publish` is called when the folder has a new snapshot."""
        self.job, self.folder, self.tracker, self.stop, self.say = job, folder, tracker, stop, say
        self.snapshots = Snapshots(checkpoint_folder(folder), job.config.snapshot_minutes, say, publish)
        self.agreement = AsyncSum(job.ranks)
        self.val_loader = job.val_loader()
        self.train_loader = job.train_loader()
        self.train_loader.while_waiting = self._stop_while_training
        self.val_loader.while_waiting = self._stop_while_waiting
        self.running = Running(job.ranks, job.device, job.position)
        self.asked = False
        """For a snapshot, in the last step."""
        self.lost: dict[str, str] = {}
        """Files that were readable before training and are not now, of all ranks."""
        steps = job.config.profile if job.ranks.is_main else 0
        self.profiler = StepProfiler(steps, folder / "profile", job.device)

    def run(self) -> None:
        """
        Raises:
            Preempted: a rank was told to stop; a snapshot is written.
            UserError: the best checkpoint cannot be written, or a loader process died.
        """
        self.stop.noted = True
        try:
            while not self.job.history.stopped(self.job.config):
                self._one_epoch()
                self.running = Running(self.job.ranks, self.job.device)
        except Preempted:
            position = self.running.position(self.job.ranks, self.job.stage is not self.job.config)
            if self.job.ranks.is_main:
                self.snapshots.write(self._state(position))
            raise
        except (RuntimeError, OSError) as error:
            codes = self.train_loader.exit_codes() + self.val_loader.exit_codes()
            if (reason := explain(error, codes)) is None:
                raise
            raise UserError(reason) from error
        finally:
            self.stop.noted = False
            self.train_loader.while_waiting = self.val_loader.while_waiting = no_wish  # that was a circle
            self.snapshots.finish()
        self.agreement.finish()
        if self.snapshots.owed is not None:
            try:
                self.snapshots.owed()  # the last chance: now the error counts
            except OSError as error:
                raise UserError(
                    f"the best checkpoint cannot be written: {error}. Make room in {self.folder}; the "
                    "newest snapshot is whole"
                ) from error

    def _one_epoch(self) -> None:
        job = self.job
        if job.history.retuning(job.config) and job.stage is job.config:
            self._begin_retuning()
        self.profiler.start()
        values = train_one_epoch(
            job.trainee,
            job.criterion,
            self.train_loader,
            job.plan,
            PairMix(job.stage, len(job.data.train.class_names)),
            job.stage,
            job.ranks,
            job.device,
            job.history.epochs_done,
            job.soft_targets,
            job.teacher,
            self.running,
            self._after_step,
        )
        self.profiler.stop()
        metrics, evaluation = self._validate() if job.history.validates(job.config) else ({}, None)
        improved = job.history.update(metrics, job.config)
        if job.ranks.is_main:
            self._save(values | metrics, evaluation, improved)

    def _validate(self) -> tuple[dict[str, float], Evaluation | None]:
        job = self.job
        return evaluate(
            job.trainee.evaluated,
            job.criterion,
            self.val_loader,
            job.data.val,
            2 * job.plan.micro_batch_size,
            job.ranks,
            job.device,
            job.config.clip_probabilities,
            self._after_batch,
        )

    def _begin_retuning(self) -> None:
        job = self.job
        self.running = Running(job.ranks, job.device)  # of an epoch that a resume cut short nothing is left
        job.stage = retuning(job.config)
        lost, self.train_loader = self.train_loader.lost, job.train_loader()
        self.train_loader.lost = lost
        epoch = job.history.epochs_done
        job.trainee = begin_retuning(
            job.trainee, job.stage, self.train_loader, job.plan, epoch, job.ranks, job.device
        )
        self.train_loader.while_waiting = self._stop_while_training  # not before: half of it is no state

    def _after_step(self) -> None:
        """At most two steps after a signal, or after a snapshot is due, all ranks know and act alike."""
        self.profiler.step()
        job, step = self.job, self.running.step
        # the answer comes one step later: what was asked then is not asked again meanwhile
        self.asked = job.ranks.is_main and not self.asked and self.snapshots.due()
        due = self._stop_if_told(self.asked)
        every = job.config.snapshot_steps
        done = job.history.epochs_done * job.plan.steps + step
        if step < job.plan.steps and (due or (every and done % every == 0)):
            position = self.running.position(job.ranks, job.stage is not job.config)
            if job.ranks.is_main:
                self.snapshots.begin(self._state(position))

    def _after_batch(self) -> None:
        self._stop_if_told()

    def _stop_while_training(self) -> None:
        if self.stop.received and self.job.ranks.world_size == 1:
            self.job.trainee.abandon_step()
        self._stop_while_waiting()

    def _stop_while_waiting(self) -> None:
        """A batch does not come. A process that is alone stops here as well as after a step; of several,
        none can write a snapshot without the others, which wait for this one."""
        if not self.stop.received:
            return
        if self.job.ranks.world_size == 1:
            self.stop.ending = True
            raise Preempted
        if time.monotonic() - self.stop.since > LATE_BATCH_SECONDS:
            raise KeyboardInterrupt

    def _stop_if_told(self, due: bool = False) -> bool:
        lost = self.train_loader.lost | self.val_loader.lost
        new = len(lost.keys() - self.lost.keys())
        told, due_on_main, new_anywhere = self.agreement.exchange(bool(self.stop.received), due, new)
        if told:
            self.stop.ending = True
            raise Preempted
        if new_anywhere:
            self._count_lost(lost)
        return bool(due_on_main)

    def _count_lost(self, lost: dict[str, str]) -> None:
        """Every rank calls it at the same step.

        Raises:
            UserError: too many files cannot be read any more.
        """
        data, config = self.job.data, self.job.config
        for part in gather_list(list(lost.items()), self.job.ranks):
            self.lost |= dict(part)
        if self.job.ranks.is_main:
            write_bad_files(self.folder, data.bad | self.lost)
        images = len(data.train) + len(data.val) + len(data.bad)
        if len(data.bad) + len(self.lost) > config.max_bad * images:
            first = "; ".join(f"{path}: {why}" for path, why in list(self.lost.items())[:3])
            raise UserError(
                f"{len(data.bad) + len(self.lost)} of {images} images cannot be read, {len(self.lost)} of "
                f"them since training began, more than --max_bad {config.max_bad:g} allows ({first}): "
                "restore them"
            )

    def _state(self, position: Position | None = None) -> dict[str, object]:
        job = self.job
        return checkpoint_state(
            job.trainee, job.history, job.data, job.config, self.tracker.run_id, position
        )

    def _save(self, values: dict[str, float], evaluation: Evaluation | None, improved: bool) -> None:
        """What an epoch leaves behind: metrics, the best checkpoint, a snapshot."""
        job = self.job
        self.tracker.log_metrics(job.history.epochs_done, values)
        if improved:
            self.tracker.log_best(job.history.best_epoch, job.history.best)
        state = copy_to_cpu(self._state())  # of this epoch, also when it can be written only later
        best = None
        if improved and evaluation is not None:
            best = partial(save_best, self.folder, state, job.data, evaluation, job.config)
        self.snapshots.write(state, best)
        self.tracker.send()
        self.say(epoch_line(job.history, job.config, values, improved))


def epoch_line(history: History, config: TrainConfig, values: dict[str, float], improved: bool) -> str:
    served = f"val/log_loss{'_calibrated' if config.calibrate else ''}"  # which decides between epochs
    names = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", served)
    shown = "".join(f"{name} {values[name]:.4f}, " for name in names if name in values)
    return (
        f"epoch {history.epochs_done}/{config.epochs + config.retune_epochs}: {shown}"
        f"lr {values['lr']:.2e}, {values['images_per_second']:.0f} images/s{' *best*' if improved else ''}"
    )
