"""Checks of settings, processes, files and data, each as soon as it can be made."""

import copy
from pathlib import Path

import torch

from serve.contract.errors import UserError
from serve.contract.files import check_folder_writable
from train.checkpoint import best_checkpoint, has_checksum, load_checkpoint
from train.config import TrainConfig
from train.data.device_cache import why_on_cpu
from train.data.index import Data
from train.data.sampler import EpochPlan
from train.models.build import build_model, try_forward
from train.models.classifier import ImageClassifier
from train.models.pretrained import check_download, read_file

FEW_STEPS = 100
LARGEST_EXPORT = 2**31 - 2**26  # bytes of weights: protobuf's limit, less room for the graph


def check_start(config: TrainConfig) -> None:
    """Find what would fail after the data were scanned, which takes minutes; `config` has a name and size.

    Raises:
        UserError: the run directory cannot be written, weights or a teacher cannot be read, images cannot
            be made on the device though that is given, or the network does not take the images, has fewer
            layers than --freeze, or is too large to be exported.
    """
    check_output(Path(config.output) / config.name)
    if config.teacher:
        load_checkpoint(best_checkpoint(config.teacher), "meta")
    if config.pixel_cache == "device" and (reason := why_on_cpu(config)):
        raise UserError(f"--pixel-cache device: {reason}; use --pixel-cache on")
    if config.resume:  # its checkpoint has the weights, and its network was built once
        return
    if config.weights == "default":
        check_download(config.model, config.image_size)
    if config.subject_crop == "detector":
        read_file(config.crop_detector, "--crop-detector")
    check_network(config)


def check_network(config: TrainConfig) -> None:
    """Build the network on the meta device, without memory or weights, and try the sizes of the images.

    Raises:
        UserError: it does not take them, has fewer layers than --freeze, or is too large to be exported.
    """

    def build() -> ImageClassifier:
        model, _ = build_model(config.model, 2, config.image_size)
        for size in config.replace(subject_crop="none").input_sizes():
            try_forward(model, config.model, 2, size)
        return model

    try:
        with torch.device("meta"):
            model = build()
    except Exception:  # an error, or an operation that the meta device lacks: the CPU shows which
        model = build()
    if config.freeze:
        model.freeze(config.freeze)
    check_size(model, config.model)


def check_output(folder: Path) -> None:
    """Check that the folder can be made and written; raises UserError."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        check_folder_writable(there, "--output")
    except OSError as error:
        raise UserError(str(error)) from error


def check_batch_size(config: TrainConfig, world_size: int) -> None:
    """Check that batches can be divided among the processes, and into pairs where every second image is
    mixed or cropped; raises UserError."""
    plan = EpochPlan(1, config.batch_size, 0, 0, world_size, config.accumulation)
    pairs = "--mixup and --cutmix mix pairs" if config.mixup + config.cutmix > 0 else ""
    if config.subject_crop != "none" and config.subject_average:
        pairs = "--subject-average crops every second image; or give --subject-average false"
    if pairs and plan.micro_batch_size % 2:
        parts = world_size * config.accumulation
        raise UserError(
            f"--batch-size {config.batch_size} must be a multiple of {2 * parts} ({world_size} "
            f"processes x {config.accumulation} accumulation steps x 2): {pairs}"
        )


def check_clip(clip: float, num_classes: int) -> None:
    """Check that --clip-probabilities leaves half of the probability to the answer; raises UserError."""
    most = 0.5 / num_classes
    if clip > most:
        raise UserError(
            f"--clip-probabilities {clip:g} is too much for {num_classes} classes, which would get "
            f"{clip * num_classes:g} together for every image: give {most:g} or less"
        )


def check_size(model: ImageClassifier, name: str) -> None:
    """Check that the weights fit into one ONNX file, without which there is no export; raises UserError."""
    size = sum(tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers()))
    if size > LARGEST_EXPORT:
        raise UserError(
            f"--model {name} has weights of {size / 1e9:.2f} GB in float32, and could not be exported: one "
            f"ONNX file holds {LARGEST_EXPORT / 1e9:.2f} GB at most (protobuf's 2 GiB, less the graph). "
            "Choose a smaller --model"
        )


def few_steps(config: TrainConfig, plan: EpochPlan) -> list[str]:
    """Return a warning if the run is too short to learn: the default batch suits thousands of images."""
    steps = config.epochs * plan.steps
    cure = "give a smaller --batch-size or more --epochs"
    warning = (
        f"warning: {steps} optimizer steps in all ({plan.steps} an epoch) are few to learn from: {cure}"
    )
    return [warning] if steps < FEW_STEPS else []


def trained_on_validation(config: TrainConfig, data: Data) -> list[str]:
    """Return warnings of weights or a teacher from a run that split the same images differently."""
    warnings = []
    teacher = str(best_checkpoint(config.teacher)) if config.teacher else ""
    for flag, file in (("--weights", config.weights), ("--teacher", teacher)):
        path = Path(file)
        if not path.is_file() or not has_checksum(path):
            continue
        state = load_checkpoint(path, "meta")
        if state["content_digest"] == data.content_digest and state["data_digest"] != data.digest:
            other = state["config"]
            warnings.append(
                f"warning: {flag} {getattr(config, flag[2:])} was trained on images that validate in "
                "this run, which flatters the model. Give the split of that run: "
                f"--seed {other['seed']} --val-fraction {other['val_fraction']} "
                f"--folds {other['folds']} --fold {other['fold']}"
            )
    return warnings


def check_teacher(teacher: ImageClassifier, config: TrainConfig, num_classes: int) -> None:
    """Check that the teacher takes images of the sizes that are trained on; raises UserError."""
    own = {} if config.retune_epochs else {"eval_size": 0}  # re-tuning is at the size of validation
    for size in config.replace(**own).input_sizes():
        try_forward(teacher, f"--teacher {config.teacher!r}", num_classes, size)
    teacher.eval()


def check_single_image(model: ImageClassifier, config: TrainConfig) -> None:
    """Check that the network can be trained on one image a batch, which batch norm cannot where the last
    features are one pixel; raises UserError."""
    size = config.input_size(config.train_size(0))
    try:
        copy.deepcopy(model).cpu().train()(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except ValueError as error:
        raise UserError(
            f"{config.model} cannot be trained on single images of {size} pixels ({error}): give each "
            "process two or more by a larger --batch-size, or larger images"
        ) from error
