"""What a run changes while it trains: saved, restored bit by bit, and never mixed up with another run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from torch import Tensor, nn
from train_data import (
    CPU,
    FP32,
    draw,
    linear_model,
    make_data,
    make_run,
    make_state,
    settings,
    train_epochs,
)

from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import TrainConfig
from train.data.index import Data, prepare_data
from train.distributed import Ranks, on_main
from train.engine.checkpointing import checkpoint_state, restore, schedule_change, view_change
from train.engine.loop import EpochProgress, train_one_epoch
from train.engine.run import TrainingRun
from train.engine.state import TrainState, build_state
from train.models.build import build_model, load_teacher, rebuild
from train.models.subject_crop.build import add_subject_crop
from train.optim.schedule import lr_factor
from train.precision import Precision
from train.runs.history import History
from train.runs.snapshots import Position
from train.settings import flag

RANDOM = {"crop_scale": 0.5, "flip": 0.5, "random_erasing": 0.3, "mixup": 0.2, "deterministic": True}


def new_run(config: TrainConfig, data: Data, seed: int = 0) -> TrainingRun:
    torch.manual_seed(seed)
    model, _ = build_model("simple_cnn", 2, config.image_size)
    if config.freeze:
        model.freeze(config.freeze)
    return make_run(config, data, model)


def new_state(config: TrainConfig, data: Data) -> TrainState:
    return new_run(config, data).state


def checkpoint_of(run: TrainingRun, history: History | None = None) -> dict[str, Any]:
    return checkpoint_state(run.state, history or History(), run.data, run.config, "run")


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
    straight = new_run(config, data)
    train_epochs(straight, 0, 1, 2)

    first = new_run(config, data)
    train_epochs(first, 0, 1)
    history = History(2, 1, {"val/accuracy": 0.5, "val/log_loss_calibrated": 0.7})
    save_checkpoint(checkpoint_of(first, history), tmp_path / "last.pt")
    second = new_run(config, data, seed=99)
    assert restore(load_checkpoint(tmp_path / "last.pt"), second.state, data, config) == history
    assert_same(first.state.state_dict(), second.state.state_dict())
    train_epochs(second, 2)
    assert_same(straight.state.state_dict(), second.state.state_dict())


@pytest.mark.parametrize("part", ["model", "ema", "ema_steps", "optimizer", "scheduler"])
def test_each_part_of_the_state_is_needed_to_continue(tmp_path: Path, part: str) -> None:
    """Proof that the test above would notice: without the optimizer's moments, say, it is another run."""
    config, data = make_data(tmp_path, lr=0.01, **RANDOM)
    trained = new_run(config, data)
    train_epochs(trained, 0)
    state = copy.deepcopy(trained.state.state_dict())
    state[part] = new_run(config, data, seed=99).state.state_dict()[part]
    resumed = new_run(config, data)
    resumed.state.load_state_dict(state)
    train_epochs(trained, 1)
    train_epochs(resumed, 1)
    with pytest.raises(AssertionError):
        assert_same(trained.state.state_dict(), resumed.state.state_dict())


def test_frozen_layers_have_no_part_in_training(tmp_path: Path) -> None:
    """Same weights, statistics and average as before; no state in the optimizer; the rest has moved."""
    config, data = make_data(tmp_path, lr=0.01, freeze=2, weight_decay=0.1, ema=0.9)
    run = new_run(config, data)
    state = run.state
    before = {name: value.clone() for name, value in state.model.network.state_dict().items()}
    train_epochs(run, 0, 1)
    assert state.ema is not None
    for model in (state.model, state.ema.module):
        moved = {k for k, v in model.network.state_dict().items() if not torch.equal(v, before[k])}
        assert {name.split(".")[1] for name in moved} == {"3", "8", "9", "12", "13", "16", "17"}
    trained = [p for p in state.model.parameters() if p.requires_grad]
    assert set(state.optimizer.state) == set(trained)
    assert len(trained) == 11


@pytest.mark.parametrize(("weights", "momentum"), [("", 0.1), ("w.pt", 0.01)])
def test_from_random_weights_batch_norm_statistics_follow_within_tens_of_steps(
    tmp_path: Path, weights: str, momentum: float
) -> None:
    """mobilenet_v3_small has a momentum of 0.01, and validated at chance for hundreds of steps."""
    config, _ = make_data(tmp_path, weights=weights)
    state = make_state(config, build_model("mobilenet_v3_small", 2, 32)[0])
    found = [module for module in state.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert found
    assert {module.momentum for module in found} == {momentum}


def test_a_larger_momentum_stays(tmp_path: Path) -> None:
    config, _ = make_data(tmp_path)
    model, _ = build_model("simple_cnn", 2, 16)
    model.network.features[1].momentum = 0.5
    model.network.features[5].momentum = None  # the plain mean
    make_state(config, model)
    assert [model.network.features[i].momentum for i in (1, 5)] == [0.5, None]


def saved(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], TrainConfig, Data]:
    config, data = make_data(tmp_path, **changes)
    return checkpoint_of(new_run(config, data)), config, data


@pytest.mark.parametrize(
    "change", [{"lr": 0.5}, {"batch_size": 8}, {"seed": 3}, {"model": "resnet18"}, {"freeze": 1}]
)
def test_a_changed_setting_is_refused_and_named(tmp_path: Path, change: dict[str, Any]) -> None:
    state, config, data = saved(tmp_path)
    ((name, value),) = change.items()
    old = getattr(config, name)
    with pytest.raises(ValueError, match=f"{flag(name)} {old!r} -> {value!r}"):
        restore(state, new_state(config, data), data, config.replace(**change))


def test_what_does_not_decide_the_result_may_change(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    changed = config.replace(
        epochs=9, patience=3, num_workers=1, accumulation=2, name="other", stop_after=1
    )
    restore(state, new_state(config, data), data, changed)


def test_re_tuning_that_has_begun_cannot_be_undone(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path, epochs=20, patience=2, retune_epochs=1)
    state["history"] |= {"epochs_done": 5, "best_epoch": 3, "best": {"val/accuracy": 1.0}}
    state["position"] = {"step": 1, "retuning": True}
    assert restore(state, new_state(config, data), data, config).retuning(config)
    with pytest.raises(ValueError, match=r"--patience 2\b"):
        restore(state, new_state(config, data), data, config.replace(patience=50))
    with pytest.raises(ValueError, match=r"--retune-epochs 0: .* 1$"):
        restore(state, new_state(config, data), data, config.replace(retune_epochs=0))


def test_changed_data_are_refused_with_both_digests(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    draw(Path(config.data) / "cat.77.png", 0, 77)
    _, other = make_data(tmp_path)
    with pytest.raises(ValueError, match=f"{data.digest[:12]} -> {other.digest[:12]}"):
        restore(state, new_state(config, data), other, config)


def test_more_epochs_than_were_planned_follow_the_schedule_that_has_them(tmp_path: Path) -> None:
    """The rate at the end of the plan was 0; the next step's must not be."""
    config, data = make_data(tmp_path, epochs=2, layer_decay=0.5)
    run = new_run(config, data)
    train_epochs(run, 0, 1)
    checkpoint = checkpoint_of(run, History(epochs_done=2, best_epoch=1, best={"val/accuracy": 1.0}))
    assert {group["lr"] for group in run.state.optimizer.param_groups} == {0.0}
    longer = config.replace(epochs=4)
    resumed, planned = new_run(longer, data), new_run(longer, data)
    restore(checkpoint, resumed.state, data, longer)
    train_epochs(planned, 0, 1)
    groups = (run.state.optimizer.param_groups for run in (resumed, planned))
    for ours, theirs in zip(*groups, strict=True):
        assert ours["lr"] == theirs["lr"] > 0


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    history = History(epochs_done=2, best_epoch=1, best={"val/accuracy": 1.0})
    state = checkpoint_of(new_run(config, data), history)
    with pytest.raises(ValueError, match=r"--epochs 1\b.*\b2\b"):
        restore(state, new_state(config, data), data, config.replace(epochs=1))
    restore(state, new_state(config, data), data, config.replace(epochs=2))


def test_more_epochs_of_a_run_whose_patience_is_used_up_are_refused(tmp_path: Path) -> None:
    """They would not be trained, and the run would look as if they were."""
    config, data = make_data(tmp_path, epochs=5, patience=2)
    history = History(epochs_done=4, best_epoch=2, best={"val/accuracy": 1.0})
    state = checkpoint_of(new_run(config, data), history)
    longer = config.replace(epochs=9)
    with pytest.raises(ValueError, match=r"--epochs 9\b.*\b2\b.*--patience 2\b"):
        restore(state, new_state(config, data), data, longer)
    restore(state, new_state(config, data), data, longer.replace(patience=3))
    restore(state, new_state(config, data), data, config)


def test_a_step_that_does_not_count_leaves_batch_norm_statistics_as_they_were(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    state = new_state(config, data)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    for factor, unchanged in ((1.0, False), (float("nan"), True)):
        statistics = [b for name, b in state.model.named_buffers() if "running" in name]
        before = [buffer.clone() for buffer in statistics]
        state.batch_norm.save()
        state.backward(factor * state.forward(images).sum())
        assert not torch.equal(statistics[0], before[0])
        state.update(0.0)
        assert all(map(torch.equal, statistics, before)) == unchanged


def test_turning_the_average_on_or_off_is_refused(tmp_path: Path) -> None:
    state, config, data = saved(tmp_path)
    with pytest.raises(ValueError, match="--ema"):
        restore(state, new_state(config.replace(ema=0.0), data), data, config.replace(ema=0.0))


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
    with_ema, without = new_state(config, data), new_state(config.replace(ema=0.0), data)
    assert with_ema.ema is not None
    assert with_ema.evaluated is with_ema.ema.module
    assert without.evaluated is without.model
    assert without.state_dict()["ema"] is None


def subject_run(config: TrainConfig, data: Data, seed: int = 0) -> TrainingRun:
    torch.manual_seed(seed)
    model, _ = build_model("simple_cnn", 2, config.image_size)
    add_subject_crop(model, config.to_dict(), config.preprocess().size)
    return make_run(config, data, model)


def test_a_run_that_looks_for_subjects_continues_bit_by_bit_also_at_its_start(tmp_path: Path) -> None:
    """One epoch of whole images, a stop, two of subjects = three epochs without a stop."""
    config, data = make_data(
        tmp_path, image_size=32, subject_crop="cam", subject_start=0.34, deterministic=True
    )
    straight = subject_run(config, data)
    states = []
    for epoch in range(3):
        train_epochs(straight, epoch)
        states.append(copy.deepcopy(checkpoint_of(straight)))
    assert [state["crops_subject"] for state in states] == [False, True, True]

    resumed = subject_run(config, data, seed=99)
    restore(states[0], resumed.state, data, config)
    train_epochs(resumed, 1, 2)
    assert_same(straight.state.state_dict(), resumed.state.state_dict())
    for model in (straight.state.model, straight.state.evaluated):
        assert model.subject is not None
        assert model.subject.active
    plain = new_run(config.replace(subject_crop="none"), data)
    train_epochs(plain, 0, 1, 2)
    with pytest.raises(AssertionError):
        assert_same(straight.state.state_dict(), plain.state.state_dict())


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_is_rebuilt_with_what_it_saw(tmp_path: Path, epoch: int) -> None:
    config, data = make_data(tmp_path, image_size=32, subject_crop="cam", subject_start=0.34)
    run = subject_run(config, data)
    run.state.begin_epoch(epoch, config)
    save_checkpoint(checkpoint_of(run), tmp_path / "best.pt")
    rebuilt = rebuild(load_checkpoint(tmp_path / "best.pt"))
    images = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), run.state.evaluated.eval()(images))
        assert torch.equal(rebuilt.locate(images), run.state.evaluated.locate(images))


def test_a_teacher_that_takes_images_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its network would see the student's larger images whole, or a part of smaller ones."""
    config, data = make_data(tmp_path, image_size=32, subject_crop="cam", subject_zoom=1.5)
    state = checkpoint_of(subject_run(config, data))
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
        run = make_run(chosen, data, linear_model())
        train_epochs(run, 0)
        weights.append(run.state.model.state_dict())
        assert (run.state.model.network._compiled_call_impl is not None) == compiled
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


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
    run = new_run(config, data)
    train_epochs(run, *range(done))
    last = run.state.optimizer.param_groups[0]["lr"]
    state = checkpoint_of(run, History(epochs_done=done, best_epoch=1))
    longer, steps = config.replace(epochs=epochs), run.plan.steps
    resumed = new_state(longer, data)
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


def test_the_first_scale_of_fp16_leaves_room_for_gradients(tmp_path: Path) -> None:
    """A run of one step an epoch ends where that step overflows."""
    config, _ = make_data(tmp_path)
    model, _ = build_model("simple_cnn", 2, config.image_size)
    state = build_state(config, model, 1, Precision("float16"), Ranks(), CPU)
    gradients = 50.0  # of which fp16 holds up to 65,504
    assert state.scaler.scale(torch.tensor(gradients)).half().isfinite()


@pytest.mark.parametrize(
    ("settings", "epochs", "done", "words"),
    [
        ({"image_size": 224, "start_size": 96, "epochs": 15}, 30, 15, ["of 184 pixels after 224"]),
        ({"image_size": 224, "start_size": 96, "epochs": 15}, 15, 9, []),
        ({"image_size": 224, "start_size": 96, "epochs": 15}, 12, 3, []),
        ({"subject_crop": "cam", "epochs": 10}, 60, 10, ["whole after it saw cropped"]),
        ({"epochs": 10}, 60, 10, []),
    ],
)
def test_more_epochs_that_turn_growing_images_back_are_a_warning(
    settings: dict[str, Any], epochs: int, done: int, words: list[str]
) -> None:
    config = TrainConfig(model="simple_cnn", **settings)
    checkpoint = {"config": config.to_dict(), "epoch": done}
    checkpoint |= {"history": {"retuned": 0}, "position": {"retuning": False}}
    printed = view_change(checkpoint, config.replace(epochs=epochs))
    assert bool(printed) == bool(words)
    assert all(word in printed for word in words)


def ranked_run(config: TrainConfig, ranks: Ranks, seed: int = 0) -> TrainingRun:
    data = prepare_data(config)
    torch.manual_seed(seed)
    model, _ = build_model("simple_cnn", 2, config.image_size)
    state = build_state(config, model, len(data.train) // config.batch_size, FP32, ranks, CPU)
    return make_run(config, data, state, ranks)


def interrupted(ranks: Ranks) -> list[dict[str, Any]]:
    """Return the state after two epochs, and after a snapshot in the first and its continuation."""
    config = settings(Path.cwd(), lr=0.01, **RANDOM)
    straight, resumed = ranked_run(config, ranks), ranked_run(config, ranks, seed=99)
    progress = EpochProgress(ranks, CPU)

    def snapshot() -> None:
        if progress.step == 2:
            own = straight.state.statistics_of_ranks(ranks)
            position = progress.position(ranks, False)
            if own is not None:
                assert not torch.equal(*own), "both ranks have the same statistics"
                state = straight.state.state_dict() | {"rows": own, "step": position.step}
                save_checkpoint(state | {"sums": position.sums}, Path("middle.pt"))

    train_one_epoch(straight, progress, snapshot)
    on_main(ranks, lambda: None)
    middle = load_checkpoint(Path("middle.pt"))
    resumed.state.load_state_dict(middle)
    resumed.state.load_statistics(middle["rows"], ranks)
    train_one_epoch(resumed, EpochProgress(ranks, CPU, Position(middle["step"], middle["sums"])))
    first = copy.deepcopy(straight.state.state_dict())
    for run in (straight, resumed):
        train_epochs(run, 1)
    return [first, straight.state.state_dict(), resumed.state.state_dict()]


def test_ranks_have_one_set_of_statistics_after_an_epoch_also_of_one_resumed_in_its_middle(
    tmp_path: Path,
) -> None:
    make_data(tmp_path)
    (first, straight, resumed), (first_of_1, *_) = on_ranks(interrupted, 2, tmp_path)
    assert_same(first, first_of_1)
    assert_same(straight, resumed)


def test_statistics_of_another_number_of_ranks_are_their_mean(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, ema=0.0)
    state = new_state(config, data)
    before = state.statistics()
    state.load_statistics(torch.stack([before, before + 1, before + 2]), Ranks())
    torch.testing.assert_close(state.statistics(), before + 1)


def one_step(ranks: Ranks) -> list[Tensor]:
    """Return mean and variance of the first batch-norm layer after one step, of this rank and of all."""
    run = ranked_run(settings(Path.cwd(), batch_size=8, lr=0.0, ema=0.0, val_fraction=0.33), ranks)
    assert run.plan.steps == 1
    layer, own = run.state.model.network.features[1], []
    train_one_epoch(
        run,
        EpochProgress(ranks, CPU),
        lambda: own.extend([layer.running_mean.clone(), layer.running_var.clone()]),
    )
    return [*own, layer.running_mean, layer.running_var]


def test_averaged_statistics_are_those_of_the_whole_batch_but_for_the_variance_of_the_ranks_means(
    tmp_path: Path,
) -> None:
    make_data(tmp_path)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "images").symlink_to(tmp_path / "images")
    ((*_, mean, whole),) = on_ranks(one_step, 1, folders[0])
    (mean_0, var_0, averaged_mean, averaged), (mean_1, var_1, *others) = on_ranks(one_step, 2, folders[1])
    assert torch.equal(averaged, others[1])
    torch.testing.assert_close(averaged_mean, mean)
    torch.testing.assert_close(averaged, (var_0 + var_1) / 2)
    n, momentum = 4 * 16 * 16, 0.1  # elements of a channel on each rank
    part_0, part_1, all_of_it = (1 + (var - 1) / momentum for var in (var_0, var_1, whole))
    between = ((mean_0 - mean_1) / momentum / 2) ** 2
    expected = ((n - 1) * (part_0 + part_1) + 2 * n * between) / (2 * n - 1)
    torch.testing.assert_close(all_of_it, expected, rtol=1e-3, atol=1e-5)
