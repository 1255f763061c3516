"""Train an image classifier on all devices of a machine, or of many.

torchrun --nproc_per_node=4 train/main.py --data DIR
"""

import sys
from pathlib import Path

if not __package__:  # started by path: the repository root, not train/, belongs on sys.path
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

import copy
import signal
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from train.augment import PairMix, View
from train.checkpoint import load_checkpoint
from train.config import TrainConfig, parse_config
from train.data import Data, class_weights
from train.device import (
    Precision,
    candidates,
    choose_device,
    choose_precision,
    choose_workers,
    configure,
)
from train.distributed import Ranks, on_main, process_group, ranks_from_environment
from train.loader import EpochPlan, Loader, PixelDataset
from train.loop import Criterion, evaluate, train_one_epoch
from train.metrics import read_predictions
from train.model import ImageClassifier, add_subject_crop, build_model, load_teacher, try_forward
from train.pixels import PixelCache, open_cache, training_entries, validation_entries
from train.retune import begin_retuning, head_trainee, retuning
from train.rundir import draw_subject_crops, open_folder, prepare, report_files, run_folder, save_epoch
from train.tracking import build_tracker
from train.trainee import History, build_trainee, checkpoint_state, restore


def run(config: TrainConfig, ranks: Ranks, device: torch.device, num_workers: int) -> None:
    """The whole training run, read downwards. Call inside a process group."""
    say: Callable[[str], None] = print if ranks.is_main else lambda _: None
    config, data = on_main(ranks, lambda: prepare(config))
    folder = run_folder(config)
    for note in data.notes:
        say(note)
    say(f"train {len(data.train)} images {data.train.counts()}")
    say(f"val   {len(data.val)} images {data.val.counts()}")

    state = load_checkpoint(folder / "checkpoints" / "last.pt") if config.resume else None
    model, notes = build_everywhere(config, ranks, data.train.class_names, state)
    model.to(device)
    for note in notes:
        say(note)
    weights = class_weights(data.train) if config.class_weights == "balanced" else None
    share = config.teacher_share if config.teacher else 0.0
    criterion = Criterion(config.label_smoothing, weights, share, config.teacher_temperature).to(device)
    teacher = load_teacher(config.teacher, data.train.class_names, model.zoom)
    if teacher is not None:
        teacher.to(device)
    soft = None if data.train.targets is None else torch.from_numpy(data.train.targets).to(device)
    plan = EpochPlan(
        len(data.train), config.batch_size, config.seed, ranks.rank, ranks.world_size, config.accumulation
    )
    if state is not None:
        precision = Precision(**state["precision"])
    else:
        classes = len(data.train.class_names)
        precision = fastest_precision(
            config, model, criterion, plan.micro_batch_size, classes, ranks, device, say
        )
    trainee = build_trainee(config, model, plan.steps, precision, ranks, device)
    stage = config
    if state is not None and state["history"]["retuned"]:
        stage = retuning(config)
        trainee = head_trainee(trainee, stage, plan, ranks, device)
    history = restore(state, trainee, data, config) if state else History()
    on_main(ranks, lambda: open_folder(config, data))
    parameters = {
        **config.to_dict(),
        "world_size": ranks.world_size,
        "precision_used": str(precision),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_classes": len(data.train.class_names),
        "num_train": len(data.train),
        "num_val": len(data.val),
        "data_digest": data.digest,
    }
    say(
        f"{config.name}: {config.model} with {parameters['num_parameters']:,} parameters, "
        f"{ranks.world_size} processes x {torch.get_num_threads()} threads on {device.type}, {precision}"
    )

    run_id = state["run_id"] if state else ""
    tracker = build_tracker(config, ranks.is_main, folder / "metrics.jsonl", history.epochs_done, run_id)
    tracker.start(parameters, config.data, data.digest)
    status = "FAILED"
    try:
        cache, val_cache = open_caches(config, data, ranks, say)
        pin = device.type == "cuda"

        def train_loader_of(stage: TrainConfig) -> Loader:
            return Loader(PixelDataset(data.train, config.seed, View(stage), cache), num_workers, pin)

        train_loader = train_loader_of(stage)
        transform = config.preprocess() if val_cache is None else None
        val_loader = Loader(PixelDataset(data.val, config.seed, transform, val_cache), num_workers, pin)
        while not history.stopped(config):
            if history.retuning(config) and stage is config:
                stage = retuning(config)
                train_loader = train_loader_of(stage)
                trainee = begin_retuning(
                    trainee, stage, train_loader, plan, history.epochs_done, ranks, device
                )
            mix = PairMix(stage, len(data.train.class_names))
            epoch = history.epochs_done
            values = train_one_epoch(
                trainee, criterion, train_loader, plan, mix, stage, ranks, device, epoch, soft, teacher
            )
            batch_size = 2 * plan.micro_batch_size
            metrics, evaluation = evaluate(
                trainee.evaluated,
                criterion,
                val_loader,
                data.val,
                batch_size,
                ranks,
                device,
                config.clip_probabilities,
            )
            improved = history.update(metrics, config)
            if evaluation is not None:  # rank 0
                snapshot = checkpoint_state(trainee, history, data, config, tracker.run_id)
                tracker.log_metrics(history.epochs_done, values | metrics)
                save_epoch(folder, snapshot, data, evaluation, improved, config)
                tracker.send()
                say(epoch_line(history, config, values | metrics, improved))
        if ranks.is_main:
            best = read_predictions(folder / "val_predictions.csv", data.val)
            if config.subject_crop != "none":
                draw_subject_crops(folder, trainee.evaluated, data, config)
            tracker.log_files(report_files(folder, tracker.rows, best, data, config))
        status = "FINISHED" if history.complete(config) else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.end(status)
    say(
        f"best epoch {history.best_epoch}: val/accuracy {history.best['val/accuracy']:.4f}, "
        f"val/log_loss {history.best['val/log_loss']:.4f} (calibrated "
        f"{history.best['val/log_loss_calibrated']:.4f}); {len(data.val)} validation images\n"
        f"run directory {folder}\n"
        f"next: python export/main.py --run {folder}"
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
        evaluated = config.preprocess().size
        notes += add_subject_crop(model, config.to_dict(), evaluated, resumed and resumed["model"])
        for size in {config.input_size(config.train_size(0)), evaluated} - {config.image_size}:
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
    config: TrainConfig, data: Data, ranks: Ranks, say: Callable[[str], None]
) -> tuple[PixelCache | None, PixelCache | None]:
    """Of training and validation images. Rank 0 builds them and says so; the ranks of another machine
    build their own if they do not see its files."""
    mode = config.pixel_cache
    if mode == "off" or (mode == "auto" and config.epochs + config.retune_epochs == 1):
        return None, None
    folder = Path(config.output) / ".cache"

    def open_both() -> tuple[PixelCache | None, PixelCache | None]:
        return (
            open_cache(folder, data.train, training_entries(config), mode, say),
            open_cache(folder, data.val, validation_entries(config), mode, say),
        )

    on_main(ranks, lambda: open_both() and None)
    return open_both()


def fastest_precision(
    config: TrainConfig,
    model: ImageClassifier,
    criterion: Criterion,
    batch_size: int,
    num_classes: int,
    ranks: Ranks,
    device: torch.device,
    say: Callable[[str], None],
) -> Precision:
    """Times whole training steps on copies of the model where the settings leave a choice."""
    size = config.input_size(config.image_size)
    images = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8).to(device)
    targets = torch.full((batch_size, num_classes), 1 / num_classes, device=device)

    def make_step(precision: Precision) -> Callable[[], None]:
        trainee = build_trainee(config, copy.deepcopy(model), 1, precision, ranks, device)
        trainee.model.train()

        def step() -> None:
            trainee.backward(criterion(trainee.forward(images), targets).mean())
            trainee.update(config.clip_grad)

        return step

    precision, seconds = choose_precision(candidates(config, device), make_step, device)
    if seconds:
        say("seconds a step: " + "; ".join(f"{name} {s:.3f}" for name, s in seconds.items()))
    return precision


def epoch_line(history: History, config: TrainConfig, values: dict[str, float], improved: bool) -> str:
    return (
        f"epoch {history.epochs_done}/{config.epochs + config.retune_epochs}: "
        f"train/loss {values['train/loss']:.4f}, train/accuracy {values['train/accuracy']:.4f}, "
        f"val/loss {values['val/loss']:.4f}, val/accuracy {values['val/accuracy']:.4f}, "
        f"val/log_loss {values['val/log_loss']:.4f}, lr {values['lr']:.2e}, "
        f"{values['images_per_second']:.0f} images/s{' *best*' if improved else ''}"
    )


def interrupt(signum: int, frame: FrameType | None) -> None:
    """torchrun stops its workers with SIGTERM: end like Ctrl-C, so that the MLflow run ends as KILLED."""
    raise KeyboardInterrupt


@record
def main() -> None:
    ranks = ranks_from_environment()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        config = parse_config(sys.argv[1:])
        device = choose_device(config, ranks)
        num_workers = choose_workers(config, ranks, device)
        configure(config, ranks, device, num_workers)
        EpochPlan(1, config.batch_size, 0, 0, ranks.world_size, config.accumulation)
        with process_group(ranks, device):
            run(config, ranks, device, num_workers)
    except (ValueError, FloatingPointError) as error:
        root = Path(__file__).resolve().parents[1]
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
        if raised_in not in (root / "train", root / "serve"):
            raise  # a library's error, not a message of ours: show where it comes from
        if ranks.is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
