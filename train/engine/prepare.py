"""Find the data and the name of a run before it trains."""

import time
from pathlib import Path

from serve.contract.errors import UserError
from train.config import TrainConfig
from train.data.index import Data, prepare_data
from train.data.sample import make_sample
from train.engine.checks import check_start
from train.models.input_settings import resolve_input
from train.optim.optimizers import resolve_optimizer
from train.runs.directory import run_folder
from train.runs.duplicate_report import list_duplicates
from train.runs.resume import settle_run, started_at

DEFAULT_DATA = Path("data/train")


SAMPLE = Path("data/sample")


def prepare(config: TrainConfig) -> tuple[TrainConfig, Data]:
    """Settle the data and the run's name; writes nothing in the run directory. Rank 0 alone calls this.

    An unfinished run of the same name and settings is gone on with.

    Raises:
        UserError: unusable data, or a run of this name exists that is finished or has other settings.
    """
    notes = []
    if not config.data:
        config = config.replace(data=str(DEFAULT_DATA))
        if not DEFAULT_DATA.exists():
            made = "" if SAMPLE.exists() else " (made now)"
            try:
                make_sample(SAMPLE)
            except OSError as error:
                raise UserError(
                    f"no {DEFAULT_DATA}, and the sample set cannot be drawn: {error}; give --data"
                ) from error
            config = config.replace(data=str(SAMPLE / "train"))
            notes.append(f"no --data and no {DEFAULT_DATA}: training on the drawn sample set{made}")
    if config.resume in ("", "auto"):  # a run that is named has its numbers
        config, input_notes = resolve_defaults(config)
        notes += input_notes
        if not config.resume:
            config = named(config)
        config = settle_run(config)
    if config.resume:
        folder = Path(config.resume).resolve()
        config = config.replace(name=folder.name, output=str(folder.parent))
    config = named(config)
    check_start(config)
    data = prepare_data(config)
    data.notes[:0] = notes
    if data.bad:
        listed = run_folder(config) / "bad_files.csv"
        data.notes.append(f"warning: {len(data.bad)} unreadable files are left out, see {listed}")
    duplicates = list_duplicates(data)
    if duplicates:
        listed = run_folder(config) / "duplicates.csv"
        data.notes.append(
            f"{len(duplicates)} groups of duplicates, see {listed} and figures/duplicates.png"
        )
    return config, data


def resolve_defaults(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the settings with a value for each that follows from the weights or the optimizer, and notes.

    Raises:
        UserError: unknown model, or weights that are not there.
    """
    return resolve_input(resolve_optimizer(config))


def named(config: TrainConfig) -> TrainConfig:
    """With the default name, if it has none: time and model."""
    stamp = time.strftime("%Y%m%d-%H%M%S", started_at())
    return config.replace(name=config.name or f"{stamp}-{config.model.replace('/', '-')}")
