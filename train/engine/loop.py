"""train_one_epoch and evaluate."""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import TrainConfig
from train.data.augment import BatchAugment, PairMix
from train.data.index import ImageSet
from train.data.loader import Loader
from train.data.random_numbers import seed_of
from train.data.sampler import EpochPlan, evaluation_batches
from train.distributed import (
    Ranks,
    broadcast_buffers,
    gather_list,
    gather_rows,
    gradient_sync,
    on_main,
    sum_over_ranks,
)
from train.engine.profiler import phase
from train.engine.progress import Progress
from train.engine.state import Trainee
from train.evaluation.metrics import Evaluation, evaluate_logits
from train.models.classifier import Outputs
from train.runs.snapshots import Position

AUXILIARY_WEIGHT = 0.3  # arXiv 1409.4842, section 5
STEPS_BETWEEN_LOOKS = 50  # at a device that is not waited for otherwise
UNKNOWN = 1e-4  # by so much other logits are above that of the right class
CURE = "lower --lr, lengthen --warmup_epochs or use --precision fp32"


class Criterion(nn.Module):
    """Loss of each sample, float32 [N]: cross-entropy with label smoothing and class weights.

    With a teacher's logits, `share` of it is the divergence from the teacher's softened answers
    (arXiv 1503.02531).
    """

    weight: Tensor | None

    def __init__(
        self,
        label_smoothing: float,
        weight: list[float] | None = None,
        share: float = 0.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.label_smoothing, self.share, self.temperature = label_smoothing, share, temperature
        self.register_buffer("weight", None if weight is None else torch.tensor(weight))

    def forward(self, output: Tensor | Outputs, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """`targets` are probabilities, float32 [N, num_classes]; `taught` a teacher's logits alike."""
        if isinstance(output, Outputs):
            loss: Tensor = self(output.logits, targets, taught)
            for auxiliary in output.auxiliary:
                loss = loss + AUXILIARY_WEIGHT * self(auxiliary, targets, taught)
            return loss
        loss = F.cross_entropy(
            output, targets, self.weight, reduction="none", label_smoothing=self.label_smoothing
        )
        if taught is None:
            return loss
        student, teacher = ((x / self.temperature).log_softmax(1) for x in (output, taught))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return (1 - self.share) * loss + self.share * self.temperature**2 * divergence


class Running:
    """The epoch that is under way, on this rank: an interrupted one goes on with it."""

    def __init__(self, ranks: Ranks, device: torch.device, position: Position | None = None):
        position = position or Position()
        self.step = position.step
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Of this rank: loss, correct answers."""
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """The same on all ranks: steps skipped, images in them, steps skipped in a row up to here."""
        if len(position.sums) == ranks.world_size:
            self.sums += torch.tensor(position.sums[ranks.rank], dtype=torch.float64, device=device)
        elif position.sums and ranks.is_main:  # of another number of processes
            self.sums += torch.tensor(position.sums, dtype=torch.float64, device=device).sum(0)
        if position.skipped:
            self.skipped += torch.tensor(position.skipped, device=device)

    def count(self, sums: Tensor, finite: Tensor, images: int) -> None:
        """A step that is done; one without finite gradients changed nothing and counts as skipped."""
        self.sums += torch.where(finite, sums, 0)
        bad = (~finite).long()
        self.skipped[:2] += torch.stack([bad, images * bad])
        self.skipped[2] = (self.skipped[2] + 1) * bad
        self.step += 1

    def position(self, ranks: Ranks, retuning: bool) -> Position:
        """Every rank must call it."""
        sums = gather_list(self.sums.tolist(), ranks)
        return Position(self.step, sums, self.skipped.tolist(), retuning)


def no_wish() -> None:
    """After a step nothing is to be done."""


def train_one_epoch(
    trainee: Trainee,
    criterion: Criterion,
    loader: Loader,
    plan: EpochPlan,
    mix: PairMix,
    config: TrainConfig,
    ranks: Ranks,
    device: torch.device,
    epoch: int,
    soft_targets: Tensor | None = None,
    teacher: nn.Module | None = None,
    running: Running | None = None,
    after_step: Callable[[], None] = no_wish,
) -> dict[str, float]:
    """One pass over the plan, from where `running` is. Returns train/loss, train/accuracy, lr,
    images_per_second, data_share (of the time in which this rank waited for data or augmented it),
    and train/skipped_steps if there were any.

    `soft_targets` [images of the set, num_classes], on the device, replace the labels in the loss; a
    `teacher` sees the very pixels that are trained on (arXiv 2106.05237). The device is not waited for
    inside the loop but to look for divergence now and then; sums are read once at the end.

    Raises:
        FloatingPointError: more than `max_skipped` steps in a row, or all of the epoch's, have gradients
            that are not finite.
    """
    trainee.model.train()
    trainee.begin_epoch(epoch, config)
    augment = BatchAugment(config)
    waited = 0.0
    running = running or Running(ranks, device)
    first = running.step
    lr = trainee.rates(max(0, trainee.scheduler.last_epoch - 1))[0]  # of the last step, if none is left
    started = time.perf_counter()
    batches = loader(plan.batches(epoch, first))
    done = min(plan.num_samples, first * plan.batch_size)
    with Progress(f"epoch {epoch + 1}", plan.num_samples, ranks.is_main, done) as progress:
        for step in range(first, plan.steps):
            real = plan.real_size(step)
            sums = torch.zeros(2, dtype=torch.float64, device=device)
            trainee.begin_step()
            for micro_step in range(plan.accumulation):
                before = time.perf_counter()
                with phase("data"):
                    loaded = next(batches)
                    batch = loaded.to(device)
                    pixels = augment(batch.images, loaded.indices, config.seed, epoch)
                waited += time.perf_counter() - before
                # dropout and drop-path draw from here: the same after a resume as without one
                torch.manual_seed(seed_of("dropout", config.seed, epoch, step, micro_step, ranks.rank))
                labels = batch.labels if soft_targets is None else soft_targets[batch.indices]
                place = plan.offset(step, micro_step)
                images, targets = mix(pixels, labels, place, config.seed, epoch)
                taught = None if teacher is None else trainee.ask(teacher, images)
                with gradient_sync(trainee.wrapped, micro_step == plan.accumulation - 1):
                    with phase("forward"):
                        output = trainee.forward(images)
                        losses = criterion(output, targets, taught) * batch.weights
                    # DDP averages gradients over ranks: the factor makes that the mean over the whole
                    # batch, however unevenly its real samples lie on the ranks
                    with phase("backward"):
                        trainee.backward(losses.sum() * (ranks.world_size / real))
                logits = output.logits if isinstance(output, Outputs) else output
                correct = (logits.argmax(1) == batch.labels) * batch.weights
                sums += torch.stack([losses.detach().sum(), correct.sum()])
            lr = trainee.optimizer.param_groups[0]["lr"]
            with phase("update"):
                running.count(sums, trainee.update(config.clip_grad), real)
            if device.type == "cpu" or step % STEPS_BETWEEN_LOOKS == 0 or step == plan.steps - 1:
                _check_divergence(running, loader, plan, config, epoch, lr)
            progress.advance(real)
            after_step()
    total = sum_over_ranks(running.sums.clone()).tolist()
    seconds = time.perf_counter() - started
    skipped, lost = running.skipped.tolist()[:2]
    counted = plan.num_samples - lost
    if not counted or not np.isfinite(total[0]):
        raise FloatingPointError(
            f"the training loss of epoch {epoch + 1} is not finite in {skipped} of {plan.steps} steps "
            f"(learning rate {lr:.3g}): {CURE}"
        )
    values = {
        "train/loss": total[0] / counted,
        "train/accuracy": total[1] / counted,
        "lr": lr,
        "images_per_second": (plan.num_samples - done) / seconds,
        "data_share": waited / seconds,
    }
    return values | ({"train/skipped_steps": float(skipped)} if skipped else {})


def _check_divergence(
    running: Running, loader: Loader, plan: EpochPlan, config: TrainConfig, epoch: int, lr: float
) -> None:
    in_a_row = int(running.skipped[2])
    if in_a_row <= config.max_skipped:
        return
    images = loader.images
    names = [images.paths[index] for index in plan.samples(epoch, running.step - 1)]
    raise FloatingPointError(
        f"the gradients of {in_a_row} steps in a row are not finite, of step {running.step} of epoch "
        f"{epoch + 1} as well (learning rate {lr:.3g}): {CURE}. Its images in {images.root}: "
        + ", ".join(map(repr, names))
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    criterion: Criterion,
    loader: Loader,
    images: ImageSet,
    batch_size: int,
    ranks: Ranks,
    device: torch.device,
    clip: float = 0.0,
    after_batch: Callable[[], None] = no_wish,
) -> tuple[dict[str, float], Evaluation | None]:
    """Every image once, in float32, sharded over the ranks without padding.

    Returns metrics with the prefix val/ (the same on every rank), and on rank 0 the whole evaluation.
    val/loss is the training criterion, val/log_loss plain cross-entropy; `clip` bounds the probabilities of
    the calibrated metrics. An image that cannot be read any more counts as wrong. `after_batch` is called
    equally often on all ranks.
    """
    broadcast_buffers(model)
    model.eval()
    rows: list[Tensor] = []
    batches = evaluation_batches(len(images), batch_size, ranks.rank, ranks.world_size)
    whole_batches = len(images) // ranks.world_size // batch_size  # every rank has at least as many
    for number, batch in enumerate(loader(batches)):
        part = batch.to(device)
        logits = model(part.images)
        labels = F.one_hot(part.labels, logits.shape[1]).float()
        # an image that cannot be read any more counts as wrong, with all but equal probabilities
        logits = torch.where(part.weights[:, None] > 0, logits, -UNKNOWN * labels)
        loss = criterion(logits, labels)
        rows.append(torch.cat([part.indices[:, None].double(), loss[:, None].double(), logits.double()], 1))
        if number < whole_batches:
            after_batch()
    width = 2 + len(images.class_names)
    mine = torch.cat(rows).cpu() if rows else torch.zeros(0, width, dtype=torch.float64)
    gathered = gather_rows(mine, ranks)

    evaluation: list[Evaluation] = []

    def reduce() -> dict[str, float]:
        assert gathered is not None
        table = gathered[gathered[:, 0].argsort()].numpy()
        assert (table[:, 0] == np.arange(len(images))).all(), "an image was evaluated twice or never"
        evaluation.append(evaluate_logits(table[:, 2:], images.labels, images.class_names, clip))
        values = {"loss": float(table[:, 1].mean()), **evaluation[0].values}
        return {f"val/{name}": value for name, value in values.items()}

    return on_main(ranks, reduce), (evaluation[0] if evaluation else None)
