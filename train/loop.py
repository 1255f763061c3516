"""train_one_epoch and evaluate."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.augment import Colour, PairMix
from train.config import TrainConfig
from train.data import ImageSet
from train.distributed import (
    Ranks,
    broadcast_buffers,
    gather_rows,
    gradient_sync,
    on_main,
    sum_over_ranks,
)
from train.draws import seed_of
from train.loader import EpochPlan, Loader, evaluation_batches
from train.metrics import Evaluation, evaluate_logits
from train.model import Outputs
from train.progress import Progress
from train.trainee import Trainee

AUXILIARY_WEIGHT = 0.3  # arXiv 1409.4842, section 5


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
) -> dict[str, float]:
    """One pass over the plan. Returns train/loss, train/accuracy, lr, images_per_second and
    data_share, the share of the time in which this rank waited for data or changed their colours.

    `soft_targets` [images of the set, num_classes], on the device, replace the labels in the loss; a
    `teacher` sees the very pixels that are trained on (arXiv 2106.05237). The device is not waited for
    inside the loop; sums are read once at the end.

    Raises:
        FloatingPointError: the epoch's loss is not finite.
    """
    trainee.model.train()
    trainee.begin_epoch(epoch, config)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    colour = Colour(config)
    waited = 0.0
    started = time.perf_counter()
    batches = loader(plan.batches(epoch))
    with Progress(f"epoch {epoch + 1}", plan.num_samples, ranks.is_main) as progress:
        for step in range(plan.steps):
            real = plan.real_size(step)
            for micro_step in range(plan.accumulation):
                before = time.perf_counter()
                loaded = next(batches)
                batch = loaded.to(device)
                pixels = colour(batch.images, loaded.indices, config.seed, epoch)
                waited += time.perf_counter() - before
                # dropout and drop-path draw from here: the same after a resume as without one
                torch.manual_seed(seed_of("dropout", config.seed, epoch, step, micro_step, ranks.rank))
                labels = batch.labels if soft_targets is None else soft_targets[batch.indices]
                place = plan.offset(step, micro_step)
                images, targets = mix(pixels, labels, place, config.seed, epoch)
                taught = None if teacher is None else trainee.ask(teacher, images)
                with gradient_sync(trainee.wrapped, micro_step == plan.accumulation - 1):
                    output = trainee.forward(images)
                    losses = criterion(output, targets, taught) * batch.weights
                    # DDP averages gradients over ranks: the factor makes that the mean over the whole
                    # batch, however unevenly its real samples lie on the ranks
                    trainee.backward(losses.sum() * (ranks.world_size / real))
                logits = output.logits if isinstance(output, Outputs) else output
                correct = (logits.argmax(1) == batch.labels) * batch.weights
                sums += torch.stack([losses.detach().sum(), correct.sum()])
            lr = trainee.optimizer.param_groups[0]["lr"]
            trainee.update(config.clip_grad)
            progress.advance(real)
    total = sum_over_ranks(sums).tolist()
    seconds = time.perf_counter() - started
    loss_mean = total[0] / plan.num_samples
    if not np.isfinite(loss_mean):
        raise FloatingPointError(
            f"the training loss of epoch {epoch + 1} is {loss_mean} (learning rate {lr:.3g}): lower --lr, "
            "lengthen --warmup_epochs or use --precision fp32"
        )
    return {
        "train/loss": loss_mean,
        "train/accuracy": total[1] / plan.num_samples,
        "lr": lr,
        "images_per_second": plan.num_samples / seconds,
        "data_share": waited / seconds,
    }


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
) -> tuple[dict[str, float], Evaluation | None]:
    """Every image once, in float32, sharded over the ranks without padding.

    Returns metrics with the prefix val/ (the same on every rank), and on rank 0 the whole evaluation.
    val/loss is the training criterion, val/log_loss plain cross-entropy; `clip` bounds the probabilities of
    the calibrated metrics.
    """
    broadcast_buffers(model)
    model.eval()
    rows: list[Tensor] = []
    batches = evaluation_batches(len(images), batch_size, ranks.rank, ranks.world_size)
    for batch in loader(batches):
        part = batch.to(device)
        logits = model(part.images)
        loss = criterion(logits, F.one_hot(part.labels, logits.shape[1]).float())
        rows.append(torch.cat([part.indices[:, None].double(), loss[:, None].double(), logits.double()], 1))
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
