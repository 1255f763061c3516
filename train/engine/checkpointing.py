"""What a checkpoint of a run holds, and how a run continues from one."""

import importlib.metadata
from dataclasses import asdict
from typing import Any

from serve.contract.errors import UserError
from serve.contract.heic import heic_version
from train.config import TrainConfig
from train.data.index import Data
from train.engine.state import TrainState
from train.optim.schedule import lr_factor
from train.runs.history import History, changed_settings, is_retuning
from train.runs.snapshots import Position

RECORDED_VERSIONS = ("torch", "torchvision", "timm", "numpy", "pillow")


def checkpoint_state(
    state: TrainState,
    history: History,
    data: Data,
    config: TrainConfig,
    run_id: str,
    position: Position | None = None,
) -> dict[str, Any]:
    """Return tensors and plain types: all that a run needs to continue, and all that an export needs."""
    return {
        **state.state_dict(),
        "history": asdict(history),
        "epoch": history.epochs_done,
        "position": asdict(position or Position()),
        "config": config.to_dict(),
        "class_names": list(data.train.class_names),
        "preprocess": config.preprocess().to_dict(),
        "crops_subject": state.model.subject is not None and state.model.subject.active,
        "data_digest": data.digest,
        "content_digest": data.content_digest,
        "val_root": str(data.val.root.resolve()),
        "run_id": run_id,
        "run_name": config.name,
        "versions": {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS} | heic_version(),
    }


def restore(checkpoint: dict[str, Any], state: TrainState, data: Data, config: TrainConfig) -> History:
    """Load a checkpoint into the state, and return the run's history.

    Raises:
        UserError: the data or a setting changed, so that this would be another run.
    """
    saved = checkpoint["config"]
    if changed := changed_settings(saved, config):
        raise UserError(f"a resumed run keeps its settings, and these differ: {changed}; start a new run")
    if checkpoint["data_digest"] != data.digest:
        raise UserError(
            f"the data of this run changed since it started (digest {checkpoint['data_digest'][:12]} -> "
            f"{data.digest[:12]}): restore the data, or start a new run from its weights with --weights"
        )
    if is_retuning(checkpoint):
        planned = saved["epochs"], saved["patience"]
        if planned != (config.epochs, config.patience):
            raise UserError(
                "once a run is being re-tuned, --epochs {} and --patience {} cannot change".format(*planned)
            )
        least = max(1, checkpoint["history"]["retuned"])
        if config.retune_epochs < least:
            raise UserError(
                f"--retune-epochs {config.retune_epochs}: the run is being re-tuned; give at least {least}"
            )
    if config.epochs < min(checkpoint["epoch"], saved["epochs"]):
        raise UserError(
            f"--epochs {config.epochs} is less than the {checkpoint['epoch']} that this run has done; give "
            f"{checkpoint['epoch']} to end it as it is"
        )
    history = History(**checkpoint["history"])
    if config.epochs > max(saved["epochs"], history.epochs_done) and history.complete(config):
        raise UserError(
            f"--epochs {config.epochs} has no effect: no epoch since {history.best_epoch} was better, and "
            f"--patience {config.patience} is used up; raise that too, or give 0"
        )
    state.load_state_dict(checkpoint)
    return history


def view_change(checkpoint: dict[str, Any], config: TrainConfig) -> str:
    """Return a line on what other --epochs than the checkpoint's do to the images that the network sees, ""
    if they grow and are cropped as before."""
    before, done = config.replace(epochs=checkpoint["config"]["epochs"]), checkpoint["epoch"]
    if not 0 < done < config.epochs or before.epochs == config.epochs or is_retuning(checkpoint):
        return ""
    last, size = before.train_size(done - 1), config.train_size(done)
    changes = [f"of {size} pixels after {last}"] if size < last else []
    if before.crops_subject(done - 1) and not config.crops_subject(done):
        changes.append("whole after it saw cropped ones")
    if not changes:
        return ""
    return (
        f"warning: --epochs {before.epochs} -> {config.epochs} stretches --start-size and --subject-start: "
        f"the network sees images {' and '.join(changes)} from the next epoch on"
    )


def schedule_change(
    checkpoint: dict[str, Any], state: TrainState, config: TrainConfig, steps_per_epoch: int
) -> str:
    """Return a line on what other --epochs than the checkpoint's do to the learning rate, "" if nothing."""
    before, step = config.replace(epochs=checkpoint["config"]["epochs"]), state.scheduler.last_epoch
    planned, now = (lr_factor(step, c, steps_per_epoch) for c in (before, config))
    if not 0 < step < config.epochs * steps_per_epoch or planned == now:
        return ""
    peak, last = state.scheduler.base_lrs[0], lr_factor(step - 1, before, steps_per_epoch)
    warning, change = ("warning: ", "rises") if now > last else ("", "falls")
    return (
        f"{warning}--epochs {before.epochs} -> {config.epochs} changes the {config.schedule} schedule: the "
        f"learning rate {change} from {peak * last:.2e} to {peak * now:.2e} at the next step"
    )
