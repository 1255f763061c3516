"""Preparation on rank 0: the data, the name and the directory of a run, before anything is built."""

import time
from pathlib import Path

from serve.contract.errors import UserError
from serve.contract.images import memory_note
from serve.processors import available_processors
from train.config import TrainConfig
from train.data.index import Data, prepare_data
from train.data.labels import describe_counts
from train.data.layouts.part_folders import take_parts
from train.data.sample import make_sample
from train.engine.checks import check_start
from train.models.input_settings import resolve_input
from train.optim.optimizers import resolve_optimizer
from train.runs.directory import run_folder
from train.runs.duplicate_report import list_duplicates
from train.runs.resume import choose_run, started_at
from train.settings import overridden_settings

DEFAULT_DATA = Path("data/train")
SAMPLE = Path("data/sample")


def prepare(config: TrainConfig) -> tuple[TrainConfig, Data]:
    """Return complete settings, and the scanned data with notes for the user.

    Nothing is written in the run directory. An unfinished run of the same name and settings is continued.

    Raises:
        UserError: unusable data, or a run of this name exists that is finished or has other settings.
    """
    config, notes = choose_data(config)
    config, part_notes = take_parts(config)
    notes += part_notes
    if config.resume in ("", "auto"):  # a run that is given by its directory has all settings
        notes += overridden_settings(config)
        config, input_notes = resolve_defaults(config)
        notes += input_notes
        config = choose_run(config if config.resume else with_name(config))
    if config.resume:  # the directory may have been moved
        folder = Path(config.resume).resolve()
        config = config.replace(name=folder.name, output=str(folder.parent))
    config = with_name(config)
    check_start(config)
    if note := memory_note(config.max_megapixels, available_processors()):
        notes.append(note)
    data = prepare_data(config)
    data.notes[:] = [*notes, *data.notes, *notes_on(data, run_folder(config))]
    return config, data


def choose_data(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Fill in --data: data/train if it exists, else a sample set, which is drawn if need be."""
    if config.data:
        return config, []
    if DEFAULT_DATA.exists():
        return config.replace(data=str(DEFAULT_DATA)), []
    made = "" if SAMPLE.exists() else " (made now)"
    try:
        make_sample(SAMPLE)
    except OSError as error:
        raise UserError(
            f"no {DEFAULT_DATA}, and the sample set cannot be drawn: {error}; give --data"
        ) from error
    note = f"no --data and no {DEFAULT_DATA}: training on the drawn sample set{made}"
    return config.replace(data=str(SAMPLE / "train")), [note]


def resolve_defaults(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the settings with a value for each that follows from the weights or the optimizer, and notes.

    Raises:
        UserError: unknown model, or missing weights.
    """
    return resolve_input(resolve_optimizer(config))


def with_name(config: TrainConfig) -> TrainConfig:
    """Fill in --name: time and model."""
    stamp = time.strftime("%Y%m%d-%H%M%S", started_at())
    return config.replace(name=config.name or f"{stamp}-{config.model.replace('/', '-')}")


def notes_on(data: Data, folder: Path) -> list[str]:
    """Return lines on unreadable files and duplicates, listed in `folder`, and on numbers of images."""
    notes, duplicates = [], list_duplicates(data)
    if data.bad:
        listed = folder / "bad_files.csv"
        notes.append(f"warning: {len(data.bad)} unreadable files are left out, see {listed}")
    if duplicates:
        listed = folder / "duplicates.csv"
        notes.append(f"groups of duplicates: {len(duplicates)}, see {listed} and figures/duplicates.png")
    notes.append(f"train {len(data.train)} images: {describe_counts(data.train.counts())}")
    notes.append(f"val   {len(data.val)} images: {describe_counts(data.val.counts())}")
    return notes
