"""Put together what a run trains: model, criterion, plan, optimizer; anew or as a checkpoint has them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.augment import ImageAugment
from train.data.index import Data, ImageSet, class_weights
from train.data.loader import Loader, PixelDataset
from train.data.pixel_cache import Entries, PixelCache, open_cache, training_entries, validation_entries
from train.data.sampler import EpochPlan
from train.distributed import Ranks, on_main
from train.engine.checks import (
    check_clip,
    check_single_image,
    check_size,
    check_teacher,
    few_steps,
    trained_on_validation,
)
from train.engine.device import (
    candidates,
    choose_precision,
    compile_note,
    default_option,
    has_bf16,
    multiplies_bf16,
    time_step,
)
from train.engine.loop import Criterion
from train.engine.retune import head_trainee, retuning
from train.engine.state import Trainee, build_trainee, restore, schedule_change
from train.models.build import build_model, load_teacher, try_forward
from train.models.classifier import ImageClassifier
from train.models.subject_crop.build import SubjectCropSettings, add_subject_crop
from train.precision import Precision
from train.runs.history import History, is_retuning
from train.runs.snapshots import Position, Say
from train.shared_memory import share


@dataclass
class Job:
    """Everything that one rank trains with. Only `trainee`, `history` and `stage` change."""

    config: TrainConfig
    stage: TrainConfig
    """The settings of the epochs that are under way: the run's, or those of re-tuning."""
    data: Data
    ranks: Ranks
    device: torch.device
    num_workers: int
    plan: EpochPlan
    criterion: Criterion
    teacher: ImageClassifier | None
    soft_targets: Tensor | None
    trainee: Trainee
    history: History
    position: Position
    """Where the first epoch begins; later ones begin at their start."""

    cache: PixelCache | None
    """Of the training images; None: they are decoded in each epoch."""
    val_cache: PixelCache | None

    def train_loader(self) -> Loader:
        """Of the stage's view."""
        load, augment = training_entries(self.config).load, ImageAugment(self.stage)
        dataset = PixelDataset(self.data.train, self.config.seed, augment, self.cache, load)
        return self._loader(dataset)

    def val_loader(self) -> Loader:
        transform = self.config.preprocess() if self.val_cache is None else None
        return self._loader(PixelDataset(self.data.val, self.config.seed, transform, self.val_cache))

    def _loader(self, dataset: PixelDataset) -> Loader:
        pin = self.device.type == "cuda"
        return Loader(dataset, self.num_workers, pin, 60 * self.config.hang_minutes)

    def parameters(self) -> dict[str, Any]:
        """What a comparison of runs wants to know."""
        return {
            **self.config.to_dict(),
            "world_size": self.ranks.world_size,
            "precision_used": str(self.trainee.precision),
            "num_parameters": sum(p.numel() for p in self.trainee.model.parameters()),
            "num_classes": len(self.data.train.class_names),
            "num_train": len(self.data.train),
            "num_val": len(self.data.val),
            "data_digest": self.data.digest,
        }


def assemble(
    config: TrainConfig,
    data: Data,
    state: dict[str, Any] | None,
    ranks: Ranks,
    device: torch.device,
    num_workers: int,
    say: Say,
) -> Job:
    """On every rank alike; with `state`, a checkpoint's, what it describes."""
    classes = data.train.class_names
    check_clip(config.clip_probabilities, len(classes))
    model, notes = build_everywhere(config, ranks, classes, state)
    if state is None:  # a run that is there keeps at least its checkpoints
        check_size(model, config.model)
    model.to(device)
    plan = EpochPlan(
        len(data.train), config.batch_size, config.seed, ranks.rank, ranks.world_size, config.accumulation
    )
    if state is None and ranks.is_main:
        notes += [*trained_on_validation(config, data), *few_steps(config, plan)]
    for note in notes:
        say(note)
    weights = class_weights(data.train) if config.class_weights == "balanced" else None
    share = config.teacher_share if config.teacher else 0.0
    criterion = Criterion(config.label_smoothing, weights, share, config.teacher_temperature).to(device)
    teacher = load_teacher(config.teacher, classes, model.zoom)
    if teacher is not None:
        check_teacher(teacher, config, len(classes))
    if plan.micro_batch_size == 1:
        check_single_image(model, config)
    if state is not None:
        precision = Precision(**state["precision"])
    else:
        precision = fastest_precision(
            config, model, criterion, plan.micro_batch_size, len(classes), plan.steps, ranks, device, say
        )
    stage, trainee = config, build_trainee(config, model, plan.steps, precision, ranks, device)
    if state is not None and is_retuning(state):
        stage = retuning(config)
        trainee = head_trainee(trainee, stage, plan, ranks, device)
    history = restore(state, trainee, data, config) if state else History()
    if state is not None and (note := schedule_change(state, trainee, config, plan.steps)):
        say(note)
    soft = data.train.targets
    cache, val_cache = open_caches(config, data, ranks, say)
    return Job(
        config,
        stage,
        data,
        ranks,
        device,
        num_workers,
        plan,
        criterion,
        teacher=None if teacher is None else teacher.to(device),
        soft_targets=None if soft is None else torch.from_numpy(soft).to(device),
        trainee=trainee,
        history=history,
        position=Position(**state["position"]) if state and "position" in state else Position(),
        cache=cache,
        val_cache=val_cache,
    )


def build_everywhere(
    config: TrainConfig, ranks: Ranks, class_names: tuple[str, ...], resumed: dict[str, Any] | None
) -> tuple[ImageClassifier, list[str]]:
    """The same initial weights on every rank. A download happens once, on rank 0, into its cache."""
    weights = "" if resumed else config.weights

    def build() -> tuple[ImageClassifier, list[str]]:
        torch.manual_seed(config.seed)
        model, notes = build_model(
            config.model,
            len(class_names),
            config.image_size,
            weights,
            config.dropout,
            config.drop_path,
            class_names,
        )
        size = config.preprocess().size
        notes += add_subject_crop(
            model, SubjectCropSettings.of(config.to_dict()), size, resumed and resumed["model"]
        )
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
    return build()


def open_caches(
    config: TrainConfig, data: Data, ranks: Ranks, say: Say
) -> tuple[PixelCache | None, PixelCache | None]:
    """Of training and validation images. Rank 0 builds them and says so; the ranks of another machine
    build their own if they do not see its files."""
    mode = config.pixel_cache
    if mode == "off" or (mode == "auto" and config.epochs + config.retune_epochs == 1):
        return None, None
    folder = Path(config.output) / ".cache"

    caches = []
    for images, stored in ((data.train, training_entries(config)), (data.val, validation_entries(config))):

        def of_this(images: ImageSet = images, stored: Entries = stored) -> PixelCache | None:
            return open_cache(folder, images, stored, mode, say)

        built = on_main(ranks, lambda opened=of_this: opened() is not None)  # type: ignore[misc]
        caches.append(share_index(of_this() if built else None, ranks, folder))
    return caches[0], caches[1]


def share_index(cache: PixelCache | None, ranks: Ranks, folder: Path) -> PixelCache | None:
    """Every rank must call it."""
    arrays = share([] if cache is None else [cache.offsets, cache.sizes], ranks, folder)
    return None if cache is None else PixelCache(cache.file, *arrays)


def fastest_precision(
    config: TrainConfig,
    model: ImageClassifier,
    criterion: Criterion,
    batch_size: int,
    num_classes: int,
    steps_per_epoch: int,
    ranks: Ranks,
    device: torch.device,
    say: Say,
) -> Precision:
    """Times whole training steps on copies of the model where the settings leave a choice, and says what
    compiling is worth.

    Raises:
        UserError: the network cannot be compiled.
    """
    size = config.input_size(config.image_size)
    images = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8).to(device)
    targets = torch.full((batch_size, num_classes), 1 / num_classes, device=device)

    def make_step(precision: Precision, compiled: bool = False) -> Callable[[], None]:
        timed = config.replace(compile=compiled)
        trainee = build_trainee(timed, copy.deepcopy(model), 1, precision, ranks, device)
        trainee.model.train()

        def step() -> None:
            trainee.backward(criterion(trainee.forward(images), targets).mean())
            trainee.update(config.clip_grad)

        return step

    if config.precision == "bf16" and device.type == "cpu" and not has_bf16():
        say("warning: this processor has no bf16 arithmetic and emulates it; --precision fp32 is faster")

    def choice() -> tuple[list[Precision], Precision]:
        options = candidates(config, device)
        return options, default_option(options, multiplies_bf16(device))

    options, default = on_main(ranks, choice)  # nodes may have other processors
    precision, seconds = choose_precision(options, default, make_step, device)
    if seconds:
        listed = "; ".join(f"{name} {s:.3f}" for name, s in seconds.items())
        say(f"seconds a step: {listed}. Taken: {precision}")
    if config.compile:
        plain = seconds.get(str(precision)) or time_step(make_step(precision), device)[1]
        try:
            first, later = time_step(make_step(precision, compiled=True), device)
        except Exception as error:  # the compiler's and its backends' share no base
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"--compile: {config.model} cannot be compiled here ({reason}); leave it out"
            ) from error
        say(compile_note(plain, first, later, steps_per_epoch))
    return precision
