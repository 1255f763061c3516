"""Re-tuning, the last stage of a run: head and batch-norm statistics are fitted to the view that is served.

A random resized crop shows objects larger than validation does, and head and statistics are fitted to that.
Re-tuning them on the view and at the size of validation mends it (arXiv 1906.06423).
"""

from contextlib import nullcontext
from itertools import islice

import torch
from torch.nn.modules.batchnorm import _BatchNorm  # the one base of all batch norms; it has no public name

from train.config import SETTINGS, TrainConfig
from train.data.augment import ImageAugment
from train.data.sampler import EpochPlan
from train.distributed import Ranks, mean_over_ranks
from train.engine.run import TrainingRun
from train.engine.state import TrainState, build_state
from train.optim.optimizers import resolve_optimizer

LR_SHARE = 0.1  # of the run's peak learning rate
MAX_BATCHES = 50  # for the statistics


def retuning_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of this stage: view and size of validation, flips the only augmentation."""
    lr = resolve_optimizer(config).lr
    assert lr is not None
    augmentation = {name: s.default for name, s in SETTINGS.items() if s.group == "augmentation"}
    off = {name: type(default)(0) for name, default in augmentation.items()}
    return config.replace(
        **off | {"crop_scale": 1.0, "flip": config.flip},
        image_size=config.eval_size or config.image_size,
        start_size=0,
        subject_start=0.0,
        epochs=max(1, config.retune_epochs),
        warmup_epochs=0.0,
        lr=lr * LR_SHARE,
    )


def begin_retuning(run: TrainingRun) -> None:
    """Continue the run from its evaluated weights, with new statistics and its head alone to train."""
    run.stage = retuning_settings(run.config)
    run.train_loader = run.train_loader.with_augment(ImageAugment(run.stage))
    run.state.model.load_state_dict(run.state.evaluated.state_dict())
    # The plain mean needs a number from a tensor in each layer: compiling that anew would take minutes.
    with torch.compiler.set_stance("force_eager") if run.stage.compile else nullcontext():
        refresh_statistics(run)
    run.state = head_state(run.state, run.stage, run.plan, run.ranks, run.device)


def head_state(
    state: TrainState, stage: TrainConfig, plan: EpochPlan, ranks: Ranks, device: torch.device
) -> TrainState:
    """Return a new state of the same model with everything but its head frozen."""
    state.model.freeze(-1)
    return build_state(stage, state.model, plan.steps, state.precision, ranks, device)


@torch.no_grad()
def refresh_statistics(run: TrainingRun) -> None:
    """Set batch-norm statistics to those of the epoch's first batches, the mean over all ranks."""
    model = run.state.model
    layers = [m for m in model.network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over the batches
        layer.train()
    for batch in run.train_loader(islice(run.plan.batches(run.history.epochs_done), MAX_BATCHES)):
        model(batch.to(run.device).images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        first, second = mean.double(), var.double()  # float32 would lose small variances
        averages = mean_over_ranks(torch.stack([first, second + first**2]))
        mean.copy_(averages[0])
        var.copy_((averages[1] - averages[0] ** 2).clamp(min=0))
    model.train()
