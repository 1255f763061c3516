"""Build a TrainingRun: a new one, or as a checkpoint has it."""

from typing import Any

import torch

from train.config import TrainConfig
from train.data.index import Data, class_weights
from train.data.sampler import EpochPlan
from train.distributed import Log, Ranks, on_main
from train.engine.autotune import bf16_warning, choose_precision
from train.engine.checkpointing import restore, schedule_change, view_change
from train.engine.checks import (
    check_clip,
    check_single_image,
    check_size,
    check_teacher,
    few_steps,
    trained_on_validation,
)
from train.engine.device import uses_tf32
from train.engine.loaders import build_loaders
from train.engine.loss import Criterion
from train.engine.retune import head_state, retuning_settings
from train.engine.run import TrainingRun
from train.engine.state import build_state
from train.models.build import build_model, load_teacher, try_forward
from train.models.classifier import ImageClassifier
from train.models.subject_crop.build import add_subject_crop
from train.precision import Precision
from train.runs.history import History, is_retuning
from train.runs.snapshots import Position


def build_run(
    config: TrainConfig,
    data: Data,
    checkpoint: dict[str, Any] | None,
    ranks: Ranks,
    device: torch.device,
    num_workers: int,
    log: Log,
) -> TrainingRun:
    """Return the run before its first step, or as the checkpoint has it. Every rank must call it."""
    classes = data.train.class_names
    check_clip(config.clip_probabilities, len(classes))
    model = build_on_all_ranks(config, ranks, classes, checkpoint, log)
    plan = EpochPlan(
        len(data.train), config.batch_size, config.seed, ranks.rank, ranks.world_size, config.accumulation
    )
    if checkpoint is None:
        check_size(model, config.model)
        warnings = on_main(ranks, lambda: trained_on_validation(config, data)) + few_steps(config, plan)
        for warning in warnings:
            log(warning)
    model.to(device)
    criterion = build_criterion(config, data).to(device)
    teacher = load_teacher(config.teacher, classes, model.zoom)
    if teacher is not None:
        check_teacher(teacher, config, len(classes))
        teacher.to(device)
    if plan.micro_batch_size == 1:
        check_single_image(model, config)
    if checkpoint is None:
        precision = choose_precision(config, model, criterion, plan, len(classes), ranks, device, log)
    else:
        precision = Precision(**checkpoint["precision"] | {"tf32": uses_tf32(config, device)})
        if warning := bf16_warning(precision, device):
            log(warning)
    state = build_state(config, model, plan.steps, precision, ranks, device)
    if teacher is not None:
        teacher.channels_last = precision.channels_last
        teacher.to(memory_format=precision.memory_format)
    stage, history, position = config, History(), Position()
    if checkpoint is not None:
        if is_retuning(checkpoint):
            stage = retuning_settings(config)
            state = head_state(state, stage, plan, ranks, device)
        history = restore(checkpoint, state, data, config)
        position = Position(**checkpoint["position"])
        if "statistics_of_ranks" in checkpoint:  # written in the middle of an epoch
            state.load_statistics(checkpoint["statistics_of_ranks"], ranks)
        rate = schedule_change(checkpoint, state, config, plan.steps)
        for note in filter(None, (rate, view_change(checkpoint, config))):
            log(note)
    loaders = build_loaders(config, stage, data, ranks, device, num_workers, log)
    run = TrainingRun(
        config, stage, data, ranks, device, plan, criterion, state, *loaders, history, position, teacher
    )
    if data.train.targets is not None:
        run.soft_targets = torch.from_numpy(data.train.targets).to(device)
    return run


def build_on_all_ranks(
    config: TrainConfig,
    ranks: Ranks,
    class_names: tuple[str, ...],
    checkpoint: dict[str, Any] | None,
    log: Log,
) -> ImageClassifier:
    """Return a model with the same initial weights on every rank; rank 0 downloads weights first."""
    weights = "" if checkpoint else config.weights

    def build() -> tuple[ImageClassifier, list[str]]:
        torch.manual_seed(config.seed)
        sizes = len(class_names), config.image_size
        model, notes = build_model(
            config.model, *sizes, weights, config.dropout, config.drop_path, class_names
        )
        size = config.preprocess().size
        notes += add_subject_crop(model, config.to_dict(), size, checkpoint and checkpoint["model"])
        for size in config.input_sizes():
            if size != config.image_size:  # of which the network was built
                try_forward(model, config.model, len(class_names), size)
        model.flip_tta = config.flip_tta
        if config.freeze:
            notes.append(model.freeze(config.freeze))
            if not config.weights:
                notes.append("warning: --freeze without --weights: the frozen layers are random")
        return model, notes

    if weights == "default":
        on_main(ranks, lambda: build()[1])
    model, notes = build()
    for note in notes:
        log(note)
    return model


def build_criterion(config: TrainConfig, data: Data) -> Criterion:
    weights = class_weights(data.train) if config.class_weights == "balanced" else None
    share = config.teacher_share if config.teacher else 0.0
    return Criterion(config.label_smoothing, weights, share, config.teacher_temperature)
