"""What a run changes while it trains: saved, restored bit by bit, and never mixed up with another run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_data import CPU, ONE, draw, linear_model, make_data, make_trainee

from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import TrainConfig
from train.data.augment import ImageAugment, PairMix
from train.data.index import Data
from train.data.loader import Loader, PixelDataset
from train.data.sampler import EpochPlan
from train.engine.loop import Criterion, train_one_epoch
from train.engine.state import Trainee, checkpoint_state, restore, schedule_change
from train.models.build import build_model, load_teacher, rebuild
from train.models.subject_crop.build import SubjectCropSettings, add_subject_crop
from train.optim.schedule import lr_factor
from train.runs.history import FREE_TO_CHANGE, History

RANDOM = {"crop_scale": 0.5, "flip": 0.5, "random_erasing": 0.3, "mixup": 0.2, "deterministic": True}


def new_trainee(config: TrainConfig, data: Data, seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    model, _ = build_model("simple_cnn", 2, config.image_size)
    if config.freeze:
        model.freeze(config.freeze)
    return make_trainee(config, model, EpochPlan(len(data.train), config.batch_size, 0).steps)


def train(trainee: Trainee, config: TrainConfig, data: Data, epochs: range) -> None:
    plan = EpochPlan(len(data.train), config.batch_size, config.seed)
    loader = Loader(PixelDataset(data.train, config.seed, ImageAugment(config)), 0, pin_memory=False)
    for epoch in epochs:
        train_one_epoch(
            trainee, Criterion(0.0, None), loader, plan, PairMix(config, 2), config, ONE, CPU, epoch
        )


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of nested state."""
    if isinstance(state, dict):
        items = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:
        return {prefix: state}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    left, right = flat(a), flat(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "muon"},
        {"freeze": 2, "layer_decay": 0.5},
        {"freeze": -1},
    ],
)
def test_a_resumed_run_continues_bit_by_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    config, data = make_data(tmp_path, lr=0.01, **settings, **RANDOM)
    straight = new_trainee(config, data)
    train(straight, config, data, range(3))

    first = new_trainee(config, data)
    train(first, config, data, range(2))
    history = History(2, 1, {"val/accuracy": 0.5, "val/log_loss_calibrated": 0.7})
    save_checkpoint(checkpoint_state(first, history, data, config, "run"), tmp_path / "last.pt")
    second = new_trainee(config, data, seed=99)
    assert restore(load_checkpoint(tmp_path / "last.pt"), second, data, config) == history
    assert_same(first.state_dict(), second.state_dict())
    train(second, config, data, range(2, 3))
    assert_same(straight.state_dict(), second.state_dict())


@pytest.mark.parametrize("part", ["model", "ema", "ema_steps", "optimizer", "scheduler"])
def test_each_part_of_the_state_is_needed_to_continue(tmp_path: Path, part: str) -> None:
    """Proof that the test above would notice: without the optimizer's moments, say, it is another run."""
    config, data = make_data(tmp_path, lr=0.01, **RANDOM)
    trained = new_trainee(config, data)
    train(trained, config, data, range(1))
    state = copy.deepcopy(trained.state_dict())
    state[part] = new_trainee(config, data, seed=99).state_dict()[part]
    resumed = new_trainee(config, data)
    resumed.load_state_dict(state)
    train(trained, config, data, range(1, 2))
    train(resumed, config, data, range(1, 2))
    with pytest.raises(AssertionError):
        assert_same(trained.state_dict(), resumed.state_dict())


def test_frozen_layers_have_no_part_in_training(tmp_path: Path) -> None:
    """Same weights, statistics and average as before; no state in the optimizer; the rest has moved."""
    config, data = make_data(tmp_path, lr=0.01, freeze=2, weight_decay=0.1, ema=0.9)
    trainee = new_trainee(config, data)
    before = {name: value.clone() for name, value in trainee.model.network.state_dict().items()}
    train(trainee, config, data, range(2))
    assert trainee.ema is not None
    for model in (trainee.model, trainee.ema.module):
        moved = {k for k, v in model.network.state_dict().items() if not torch.equal(v, before[k])}
        assert {name.split(".")[1] for name in moved} == {"3", "8", "9", "12", "13", "16", "17"}
    trained = [p for p in trainee.model.parameters() if p.requires_grad]
    assert set(trainee.optimizer.state) == set(trained)
    assert len(trained) == 11


@pytest.mark.parametrize(("weights", "momentum"), [("", 0.1), ("w.pt", 0.01)])
def test_from_random_weights_batch_norm_statistics_follow_within_tens_of_steps(
    tmp_path: Path, weights: str, momentum: float
) -> None:
    """mobilenet_v3_small has a momentum of 0.01, and validated at chance for hundreds of steps."""
    config, _ = make_data(tmp_path, weights=weights)
    trainee = make_trainee(config, build_model("mobilenet_v3_small", 2, 32)[0], 3)
    found = [module for module in trainee.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(found) == 34
    assert {module.momentum for module in found} == {momentum}


def test_a_larger_momentum_stays(tmp_path: Path) -> None:
    config, _ = make_data(tmp_path)
    model, _ = build_model("simple_cnn", 2, 16)
    model.network.features[1].momentum = 0.5
    model.network.features[5].momentum = None  # the plain mean
    make_trainee(config, model, 3)
    assert [model.network.features[i].momentum for i in (1, 5)] == [0.5, None]


def saved(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], TrainConfig, Data]:
    config, data = make_data(tmp_path, **changes)
    return checkpoint_state(new_trainee(config, data), History(), data, config, "run"), config, data


@pytest.mark.parametrize(
    "change", [{"lr": 0.5}, {"batch_size": 8}, {"seed": 3}, {"model": "resnet18"}, {"freeze": 1}]
)
def test_a_changed_setting_is_refused_and_named(tmp_path: Path, change: dict[str, Any]) -> None:
    state, config, data = saved(tmp_path)
    ((name, value),) = change.items()
    old = getattr(config, name)
    with pytest.raises(ValueError, match=f"these differ: --{name} {old!r} -> {value!r}; start a new run"):
        restore(state, new_trainee(config, data), data, config.replace(**change))


def test_what_does_not_decide_the_result_may_change(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    changed = config.replace(epochs=9, patience=3, num_workers=1, name="other", stop_after=1)
    restore(state, new_trainee(config, data), data, changed)
    assert set(config.to_dict()) >= FREE_TO_CHANGE


def test_re_tuning_that_has_begun_cannot_be_undone(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path, epochs=20, patience=2, retune_epochs=1)
    state["history"] |= {"epochs_done": 5, "best_epoch": 3, "best": {"val/accuracy": 1.0}}
    state["position"] = {"step": 1, "retuning": True}
    assert restore(state, new_trainee(config, data), data, config).retuning(config)
    with pytest.raises(ValueError, match=r"being re-tuned.*keep --patience 2"):
        restore(state, new_trainee(config, data), data, config.replace(patience=50))


def test_changed_data_are_refused_with_both_digests(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    draw(Path(config.data) / "cat.77.png", 0, 77)
    _, other = make_data(tmp_path)
    with pytest.raises(
        ValueError, match=f"data of this run changed.*{data.digest[:12]} -> {other.digest[:12]}"
    ):
        restore(state, new_trainee(config, data), other, config)


def test_more_epochs_than_were_planned_follow_the_schedule_that_has_them(tmp_path: Path) -> None:
    """The rate at the end of the plan was 0; the next step's must not be."""
    config, data = make_data(tmp_path, epochs=2, layer_decay=0.5)
    trainee = new_trainee(config, data)
    train(trainee, config, data, range(2))
    history = History(epochs_done=2, best_epoch=1, best={"val/accuracy": 1.0})
    state = checkpoint_state(trainee, history, data, config, "run")
    assert {group["lr"] for group in trainee.optimizer.param_groups} == {0.0}
    longer = config.replace(epochs=4)
    gone_on = new_trainee(longer, data)
    restore(state, gone_on, data, longer)
    planned = new_trainee(longer, data)
    train(planned, longer, data, range(2))
    for ours, theirs in zip(gone_on.optimizer.param_groups, planned.optimizer.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"] > 0


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    history = History(epochs_done=2, best_epoch=1, best={"val/accuracy": 1.0})
    state = checkpoint_state(new_trainee(config, data), history, data, config, "run")
    with pytest.raises(ValueError, match=r"--epochs 1 is less than the 2 that this run has done; give 2"):
        restore(state, new_trainee(config, data), data, config.replace(epochs=1))
    restore(state, new_trainee(config, data), data, config.replace(epochs=2))


def test_a_step_that_does_not_count_leaves_batch_norm_statistics_as_they_were(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    trainee = new_trainee(config, data)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    for factor, unchanged in ((1.0, False), (float("nan"), True)):
        before = [buffer.clone() for buffer in trainee.statistics]
        trainee.begin_step()
        trainee.backward(factor * trainee.forward(images).sum())
        assert not torch.equal(trainee.statistics[0], before[0])
        trainee.update(0.0)
        assert all(map(torch.equal, trainee.statistics, before)) == unchanged


def test_turning_the_average_on_or_off_is_refused(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    with pytest.raises(ValueError, match="--ema"):
        restore(state, new_trainee(config.replace(ema=0.0), data), data, config.replace(ema=0.0))


def test_a_checkpoint_holds_what_an_export_needs_under_bare_names(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    model, _ = build_model("simple_cnn", 2, 16)
    model.load_state_dict(state["ema"])
    assert state["class_names"] == ["cat", "dog"]
    assert state["preprocess"] == config.preprocess().to_dict()
    assert state["data_digest"] == data.digest
    assert TrainConfig(**state["config"]) == config
    assert set(state["versions"]) >= {"torch", "torchvision", "pillow"}


def test_the_average_is_evaluated_unless_it_is_off(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    with_ema, without = new_trainee(config, data), new_trainee(config.replace(ema=0.0), data)
    assert with_ema.ema is not None
    assert with_ema.evaluated is with_ema.ema.module
    assert without.evaluated is without.model
    assert without.state_dict()["ema"] is None


# history


def update_all(rows: list[tuple[float, float]], config: TrainConfig) -> tuple[History, list[bool]]:
    """Rows are (accuracy, log loss)."""
    history = History()
    metrics = [{"val/accuracy": accuracy, "val/log_loss_calibrated": loss} for accuracy, loss in rows]
    return history, [history.update(m, config) for m in metrics]


def test_best_is_by_accuracy_and_ties_by_log_loss() -> None:
    rows = [(0.5, 0.9), (0.7, 0.8), (0.7, 0.9), (0.7, 0.7), (0.7, 0.7), (0.6, 0.1)]
    history, improved = update_all(rows, TrainConfig())
    assert improved == [True, True, False, True, False, False]
    assert (history.best_epoch, history.epochs_done) == (4, 6)
    assert history.best == {"val/accuracy": 0.7, "val/log_loss_calibrated": 0.7}


def test_best_can_be_by_log_loss() -> None:
    rows = [(0.5, 0.9), (0.4, 0.8), (0.9, 0.8), (0.99, 0.85)]
    history, improved = update_all(rows, TrainConfig(best_by="log_loss"))
    assert improved == [True, True, True, False]
    assert history.best_epoch == 3


def test_a_log_loss_of_nan_is_never_an_improvement() -> None:
    _, improved = update_all([(0.5, 0.9), (0.5, float("nan"))], TrainConfig())
    assert improved == [True, False]


def test_a_log_loss_of_nan_is_soon_no_longer_the_best() -> None:
    rows = [(0.5, float("nan")), (0.6, 0.7), (0.6, 0.8)]
    history, improved = update_all(rows, TrainConfig(best_by="log_loss"))
    assert improved == [True, True, False]
    assert history.best_epoch == 2


def test_patience_ends_the_run() -> None:
    config = TrainConfig(epochs=10, patience=2)
    history, _ = update_all([(0.5, 1), (0.6, 1), (0.5, 1)], config)
    assert not history.complete(config)
    history.update({"val/accuracy": 0.6, "val/log_loss_calibrated": 2}, config)
    assert history.complete(config)
    assert not history.complete(config.replace(patience=0))


def test_re_tuning_that_patience_began_goes_on_to_its_end_and_is_validated_in_each_epoch() -> None:
    """Also when its first epoch is the best so far, which ends what patience waits for."""
    config = TrainConfig(epochs=20, patience=3, val_interval=3, retune_epochs=3)
    history, validated = History(), []
    while not history.complete(config):
        due = history.validates(config)
        accuracy = 0.9 if history.retuning(config) else 0.5
        history.update({"val/accuracy": accuracy, "val/log_loss_calibrated": 1.0} if due else {}, config)
        validated += [history.epochs_done] * due
    assert validated == [1, 2, 5, 6, 7]
    assert (history.best_epoch, history.retuned) == (5, 3)


def test_stop_after_stops_a_run_that_is_not_complete() -> None:
    config = TrainConfig(epochs=10, stop_after=2)
    history, _ = update_all([(0.5, 1)], config)
    assert not history.stopped(config)
    history.update({"val/accuracy": 0.6, "val/log_loss_calibrated": 2}, config)
    assert history.stopped(config)
    assert not history.complete(config)
    assert not history.stopped(config.replace(stop_after=0))


def subject_trainee(config: TrainConfig, data: Data, seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    model, _ = build_model("simple_cnn", 2, config.image_size)
    add_subject_crop(model, SubjectCropSettings.of(config.to_dict()), config.preprocess().size)
    return make_trainee(config, model, EpochPlan(len(data.train), config.batch_size, 0).steps)


def test_a_run_that_looks_for_subjects_continues_bit_by_bit_also_at_its_start(tmp_path: Path) -> None:
    """One epoch of whole images, a stop, two of subjects = three epochs without a stop."""
    config, data = make_data(
        tmp_path, image_size=32, subject_crop="cam", subject_start=0.34, deterministic=True
    )
    straight = subject_trainee(config, data)
    states = []
    for epoch in range(3):
        train(straight, config, data, range(epoch, epoch + 1))
        states.append(copy.deepcopy(checkpoint_state(straight, History(), data, config, "run")))
    assert [state["crops_subject"] for state in states] == [False, True, True]

    resumed = subject_trainee(config, data, seed=99)
    restore(states[0], resumed, data, config)
    train(resumed, config, data, range(1, 3))
    assert_same(straight.state_dict(), resumed.state_dict())
    for model in (straight.model, straight.evaluated):
        assert model.subject is not None
        assert model.subject.active
    plain = new_trainee(config.replace(subject_crop="none"), data)
    train(plain, config.replace(subject_crop="none"), data, range(3))
    with pytest.raises(AssertionError):
        assert_same(straight.state_dict(), plain.state_dict())


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_is_rebuilt_with_what_it_saw(tmp_path: Path, epoch: int) -> None:
    config, data = make_data(tmp_path, image_size=32, subject_crop="cam", subject_start=0.34)
    trainee = subject_trainee(config, data)
    trainee.begin_epoch(epoch, config)
    save_checkpoint(checkpoint_state(trainee, History(), data, config, "run"), tmp_path / "best.pt")
    rebuilt = rebuild(load_checkpoint(tmp_path / "best.pt"))
    images = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), trainee.evaluated.eval()(images))
        assert torch.equal(rebuilt.locate(images), trainee.evaluated.locate(images))


def test_a_teacher_that_takes_images_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its network would see the student's larger images whole, or a part of smaller ones."""
    config, data = make_data(tmp_path, image_size=32, subject_crop="cam", subject_zoom=1.5)
    trainee = subject_trainee(config, data)
    state = checkpoint_state(trainee, History(), data, config, "run")
    save_checkpoint(state, tmp_path / "run" / "checkpoints" / "best.pt")
    with pytest.raises(ValueError, match=r"--teacher '.*run'.* 1\.5 .* 1 "):
        load_teacher(str(tmp_path / "run"), ("cat", "dog"))
    assert load_teacher(str(tmp_path / "run"), ("cat", "dog"), 1.5) is not None


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, epochs=1, optimizer="sgd", lr=0.01)
    weights = []
    for compiled in (False, True):
        chosen = config.replace(compile=compiled)
        torch.manual_seed(0)
        trainee = make_trainee(chosen, linear_model())
        train(trainee, chosen, data, range(1))
        weights.append(trainee.model.state_dict())
        assert (trainee.model.network._compiled_call_impl is not None) == compiled
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


def test_the_first_the_last_and_every_second_epoch_before_it_are_validated() -> None:
    config, history = TrainConfig(epochs=6, val_interval=2, retune_epochs=2), History()
    validated = []
    while not history.complete(config):
        due = history.validates(config)
        metrics = {"val/accuracy": 0.5, "val/log_loss": 1.0, "val/log_loss_calibrated": 1.0}
        history.update(metrics if due else {}, config)
        if due:
            validated.append(history.epochs_done)
    assert validated == [1, 2, 4, 6, 7, 8]
    assert history.best_epoch == 1


@pytest.mark.parametrize(
    ("settings", "epochs", "done", "word"),
    [
        ({}, 4, 2, "rises"),
        ({"warmup_epochs": 0.0}, 4, 1, "rises"),
        ({"epochs": 4}, 3, 2, "falls"),
        ({}, 1, 1, ""),
        ({}, 2, 1, ""),
        ({"schedule": "constant", "warmup_epochs": 0.0}, 4, 2, ""),
        ({}, 4, 0, ""),
    ],
)
def test_what_more_epochs_do_to_the_learning_rate_is_printed(
    tmp_path: Path, settings: dict[str, Any], epochs: int, done: int, word: str
) -> None:
    config, data = make_data(tmp_path, **{"epochs": 2, "lr": 0.01, **settings})
    trainee = new_trainee(config, data)
    train(trainee, config, data, range(done))
    last = trainee.optimizer.param_groups[0]["lr"]
    state = checkpoint_state(trainee, History(epochs_done=done, best_epoch=1), data, config, "")
    longer, steps = config.replace(epochs=epochs), EpochPlan(len(data.train), config.batch_size, 0).steps
    resumed = new_trainee(longer, data)
    resumed.load_state_dict(state)
    printed = schedule_change(state, resumed, longer, steps)
    assert bool(printed) == bool(word)
    if word:
        following = resumed.optimizer.param_groups[0]["lr"]
        step = done * steps
        before = 0.01 * lr_factor(step - 1, config, steps)
        assert f"--epochs {config.epochs} -> {epochs}" in printed
        assert f"{word} from {before:.2e} to {following:.2e}" in printed
        assert printed.startswith("warning") == (word == "rises")
        assert last <= before
