"""The two passes that a run repeats: train_one_epoch and evaluate."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.augment import BatchAugment, PairMix
from train.data.loader import Batch
from train.data.random_numbers import seed_of
from train.data.sampler import evaluation_batches
from train.distributed import (
    Ranks,
    gather_list,
    gather_rows,
    gradient_sync,
    on_main,
    sum_over_ranks,
)
from train.engine.profiler import phase
from train.engine.progress import ProgressBar
from train.engine.run import TrainingRun
from train.evaluation.metrics import Evaluation, evaluate_logits
from train.models.classifier import Outputs
from train.runs.snapshots import Position

STEPS_BETWEEN_CHECKS = 50  # of a GPU's gradients, for which it is waited for
CPU_PIXELS = 800_000  # evaluated at once, 16 images of 224 px: docs/experiments.md no. 70
UNKNOWN = 1e-4  # by so much other logits are above that of the right class
CURE = "lower --lr, lengthen --warmup-epochs or use --precision fp32"


def do_nothing() -> None:
    """The null callback."""


class EpochProgress:
    """How far this rank is in the present epoch, and the sums that its metrics are made from."""

    def __init__(self, ranks: Ranks, device: torch.device, position: Position | None = None):
        """Begin the epoch, or continue it at `position`, also with another number of ranks."""
        position = position or Position()
        self.step = position.step
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Loss and correct answers, summed over the images of this rank."""
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """The same on all ranks: steps skipped, images in them, steps skipped in a row up to now."""
        if len(position.sums) == ranks.world_size:
            self.sums += torch.tensor(position.sums[ranks.rank], dtype=torch.float64, device=device)
        elif position.sums and ranks.is_main:
            self.sums += torch.tensor(position.sums, dtype=torch.float64, device=device).sum(0)
        if position.skipped:
            self.skipped += torch.tensor(position.skipped, device=device)

    def count(self, sums: Tensor, finite: Tensor, images: int) -> None:
        """Add a step; one without finite gradients changed nothing and counts as skipped."""
        self.sums += torch.where(finite, sums, 0)
        bad = (~finite).long()
        self.skipped[:2] += torch.stack([bad, images * bad])
        self.skipped[2] = (self.skipped[2] + 1) * bad
        self.step += 1

    def position(self, ranks: Ranks, retuning: bool) -> Position:
        """Return the position for a checkpoint. Every rank must call it."""
        sums = gather_list(self.sums.tolist(), ranks)
        return Position(self.step, sums, self.skipped.tolist(), retuning)


def train_batches(run: TrainingRun, first_step: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Yield this rank's micro-batches of the epoch: as loaded, the images to train on, augmented and mixed
    on the device, and their targets [N, num_classes]."""
    plan, key = run.plan, (run.config.seed, run.history.epochs_done)
    augment, mix = BatchAugment(run.stage), PairMix(run.stage, run.num_classes)
    loader = run.train_loader(plan.batches(run.history.epochs_done, first_step))
    for step in range(first_step, plan.steps):
        for micro_step in range(plan.accumulation):
            with phase("data"):
                loaded = next(loader)
                batch = loaded.to(run.device)
                images = augment(batch.images, loaded.indices, *key)
            labels = batch.labels if run.soft_targets is None else run.soft_targets[batch.indices]
            images, targets = mix(images, labels, plan.offset(step, micro_step), *key)
            yield batch, images, targets


def train_one_epoch(
    run: TrainingRun, progress: EpochProgress, after_step: Callable[[], None] = do_nothing
) -> dict[str, float]:
    """Pass over the training images once, from where `progress` is.

    Returns train/loss, train/accuracy, lr, images_per_second, data_share (of the time in which this rank
    waited for loaded images), and train/skipped_steps if there were any. A GPU is waited for now and then
    only, to check for divergence; sums are read once at the end, when batch-norm statistics become the mean
    over the ranks.

    Raises:
        FloatingPointError: more than `max_skipped` steps in a row, or all of the epoch's, have gradients
            that are not finite.
    """
    plan, state, first, epoch = run.plan, run.state, progress.step, run.history.epochs_done
    state.begin_epoch(epoch, run.stage)
    done = min(plan.num_samples, first * plan.batch_size)
    started, waited = time.perf_counter(), run.train_loader.waited
    batches = train_batches(run, first)
    with closing(ProgressBar(f"epoch {epoch + 1}", plan.num_samples, run.ranks.is_main, done)) as bar:
        for step in range(first, plan.steps):
            sums = accumulate_gradients(run, batches, step)
            with phase("update"):
                progress.count(sums, state.update(run.config.clip_grad), plan.real_size(step))
            if run.device.type == "cpu" or step % STEPS_BETWEEN_CHECKS == 0 or step == plan.steps - 1:
                check_divergence(run, progress)
            bar.advance(plan.real_size(step))
            after_step()
    state.average_statistics()
    metrics = epoch_metrics(run, progress)
    seconds = time.perf_counter() - started
    metrics["images_per_second"] = (plan.num_samples - done) / seconds
    metrics["data_share"] = (run.train_loader.waited - waited) / seconds
    return metrics


def accumulate_gradients(
    run: TrainingRun, batches: Iterator[tuple[Batch, Tensor, Tensor]], step: int
) -> Tensor:
    """Run the forward and backward passes of one optimizer step.

    Returns the sums over this rank's images, float64 [2]: loss, correct answers.
    """
    config, plan, state = run.config, run.plan, run.state
    # DDP averages gradients over ranks: the factor makes that the mean over the whole batch, however
    # unevenly its real samples lie on the ranks
    factor = run.ranks.world_size / plan.real_size(step)
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    state.batch_norm.save()
    for micro_step in range(plan.accumulation):
        batch, images, targets = next(batches)
        # for dropout and drop-path: the same after a resume as without one
        key = (config.seed, run.history.epochs_done, step, micro_step, run.ranks.rank)
        torch.manual_seed(seed_of("dropout", *key))
        with gradient_sync(state.wrapped, micro_step == plan.accumulation - 1):
            teacher_logits = None if run.teacher is None else state.teacher_logits(run.teacher, images)
            with phase("forward"):
                output = state.forward(images)
                losses = run.criterion(output, targets, teacher_logits) * batch.weights
            with phase("backward"):
                state.backward(losses.sum() * factor)
        logits = output.logits if isinstance(output, Outputs) else output
        correct = (logits.argmax(1) == batch.labels) * batch.weights
        sums += torch.stack([losses.detach().sum(), correct.sum()])
    return sums


def check_divergence(run: TrainingRun, progress: EpochProgress) -> None:
    """Raise FloatingPointError when too many steps in a row were skipped; name the last one's images."""
    in_a_row = int(progress.skipped[2])
    if in_a_row <= run.config.max_skipped:
        return
    images, epoch = run.data.train, run.history.epochs_done
    names = [images.paths[index] for index in run.plan.samples(epoch, progress.step - 1)]
    raise FloatingPointError(
        f"the gradients of {in_a_row} steps in a row are not finite, up to step {progress.step} of epoch "
        f"{epoch + 1} (learning rate {run.state.last_lr:.3g}): {CURE}. Images of that step in "
        f"{images.root}: {', '.join(map(repr, names))}"
    )


def epoch_metrics(run: TrainingRun, progress: EpochProgress) -> dict[str, float]:
    """Return the epoch's metrics over all ranks; skipped steps are left out of the means."""
    loss, correct = sum_over_ranks(progress.sums.clone()).tolist()
    skipped, skipped_images = progress.skipped.tolist()[:2]
    counted = run.plan.num_samples - skipped_images
    if not counted or not np.isfinite(loss):
        raise FloatingPointError(
            f"the training loss of epoch {run.history.epochs_done + 1} is not finite in {skipped} of "
            f"{run.plan.steps} steps (learning rate {run.state.last_lr:.3g}): {CURE}"
        )
    metrics = {"train/loss": loss / counted, "train/accuracy": correct / counted}
    metrics["lr"] = run.state.last_lr
    if skipped:
        metrics["train/skipped_steps"] = float(skipped)
    return metrics


@torch.inference_mode()
def evaluate(
    run: TrainingRun, after_batch: Callable[[], object] = do_nothing
) -> tuple[dict[str, float], Evaluation | None]:
    """Score every validation image once, in float32, sharded over the ranks without padding.

    Returns metrics with the prefix val/ (the same on every rank), and on rank 0 the whole evaluation.
    val/loss is the training criterion, val/log_loss plain cross-entropy. `after_batch` is called equally
    often on all ranks.

    Raises:
        FloatingPointError: logits are not finite: no later epoch would mend the weights.
    """
    images, ranks, batch_size = run.data.val, run.ranks, evaluation_batch_size(run)
    run.state.evaluated.eval()
    batches = evaluation_batches(len(images), batch_size, ranks.rank, ranks.world_size)
    common = len(images) // ranks.world_size // batch_size  # every rank has at least as many batches
    indices = [torch.zeros(0, dtype=torch.int64, device=run.device)]
    rows = [torch.zeros(0, 1 + run.num_classes, device=run.device)]
    for number, batch in enumerate(run.val_loader(batches)):
        batch = batch.to(run.device)
        indices.append(batch.indices)
        rows.append(evaluate_batch(run, batch))
        if number < common:
            after_batch()
    order = gather_rows(torch.cat(indices).cpu(), ranks)
    gathered = gather_rows(torch.cat(rows).cpu(), ranks)
    rows.clear()  # they are all logits once more
    evaluation: Evaluation | None = None

    def reduce() -> dict[str, float]:
        nonlocal evaluation
        assert order is not None
        assert gathered is not None
        assert order.sort().values.equal(torch.arange(len(images))), "an image was evaluated twice or never"
        table = torch.empty_like(gathered)
        table[order] = gathered
        losses, logits = table[:, 0].double(), table[:, 1:].numpy()
        if bad := int((~np.isfinite(logits).all(axis=1)).sum()):
            raise FloatingPointError(
                f"the answers to {bad} of {len(images)} validation images after epoch "
                f"{run.history.epochs_done + 1} are not finite (learning rate {run.state.last_lr:.3g}): "
                f"{CURE}"
            )
        clip = run.config.clip_probabilities
        evaluation = evaluate_logits(logits, images.labels, images.class_names, clip)
        metrics = {"loss": float(losses.mean()), **evaluation.values}
        return {f"val/{name}": value for name, value in metrics.items()}

    return on_main(ranks, reduce), evaluation


def evaluation_batch_size(run: TrainingRun) -> int:
    """Return how many images a rank evaluates at once: twice what it trains on, as no maps are kept for
    gradients, and on a CPU no more than its caches are good for."""
    most = 2 * run.plan.micro_batch_size
    if run.device.type != "cpu":
        return most
    return max(1, min(most, CPU_PIXELS // run.config.preprocess().size ** 2))


def evaluate_batch(run: TrainingRun, batch: Batch) -> Tensor:
    """Return float32 [N, 1 + num_classes]: loss and logits of each image.

    An image that cannot be read any more counts as wrong, with all but equal probabilities.
    """
    logits = run.state.evaluated(batch.images)
    labels = F.one_hot(batch.labels, logits.shape[1]).float()
    logits = torch.where(batch.weights[:, None] > 0, logits, -UNKNOWN * labels)
    loss = run.criterion(logits, labels)
    return torch.cat([loss[:, None], logits], 1)
