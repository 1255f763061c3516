"""The last stage of a run: fit head and batch-norm statistics to the size that is served.

Random resized crop shows objects larger than validation does; statistics and head are fitted to that.
Re-tuning them on the view and at the size of validation mends it (arXiv 1906.06423).
"""

from contextlib import nullcontext
from itertools import islice

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from train.config import TrainConfig
from train.data.loader import Loader
from train.data.sampler import EpochPlan
from train.distributed import Ranks, sum_over_ranks
from train.engine.state import Trainee, build_trainee
from train.models.classifier import ImageClassifier
from train.optim.optimizers import resolve_optimizer

LR_SHARE = 0.1  # of the run's peak learning rate
MOST_BATCHES = 50  # for the statistics


def retuning(config: TrainConfig) -> TrainConfig:
    """Settings of this stage: the view and the size of validation, flips the only augmentation."""
    lr = resolve_optimizer(config).lr
    assert lr is not None
    return config.replace(
        image_size=config.eval_size or config.image_size,
        start_size=0,
        crop_scale=1.0,
        color_jitter=0.0,
        trivial_augment=False,
        random_erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        epochs=max(1, config.retune_epochs),
        warmup_epochs=0.0,
        lr=lr * LR_SHARE,
    )


def begin_retuning(
    trainee: Trainee,
    stage: TrainConfig,
    loader: Loader,
    plan: EpochPlan,
    epoch: int,
    ranks: Ranks,
    device: torch.device,
) -> Trainee:
    """A trainee that goes on from the evaluated weights, with new statistics, and learns the head only."""
    trainee.model.load_state_dict(trainee.evaluated.state_dict())
    # The plain mean needs a number from a tensor in each layer: compiling that anew would take minutes.
    with torch.compiler.set_stance("force_eager") if stage.compile else nullcontext():
        refresh_statistics(trainee.model, loader, plan, epoch, ranks, device)
    return head_trainee(trainee, stage, plan, ranks, device)


def head_trainee(
    trainee: Trainee, stage: TrainConfig, plan: EpochPlan, ranks: Ranks, device: torch.device
) -> Trainee:
    """The same model with everything but its head fixed."""
    trainee.model.freeze(-1)
    return build_trainee(stage, trainee.model, plan.steps, trainee.precision, ranks, device)


@torch.no_grad()
def refresh_statistics(
    model: ImageClassifier, loader: Loader, plan: EpochPlan, epoch: int, ranks: Ranks, device: torch.device
) -> None:
    """Batch-norm statistics of the epoch's first batches, the mean over all ranks; weights stay."""
    layers = [m for m in model.network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over the batches
        layer.train()
    batches = loader(islice(plan.batches(epoch), MOST_BATCHES))
    for batch in batches:
        model(batch.to(device).images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        sums = torch.stack([mean, var + mean**2])
        averages = sum_over_ranks(sums) / ranks.world_size
        mean.copy_(averages[0])
        var.copy_(averages[1] - averages[0] ** 2)
    model.train()
