"""Training and evaluation: each real sample counts once, sums are exact, the loss is torch's own."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor
from train_data import CPU, linear_model, make_data, make_run, make_state, train_epochs

from serve.contract.images import load_image
from train.config import TrainConfig
from train.data.index import Data, ImageSet
from train.data.sampler import EpochPlan
from train.distributed import Ranks
from train.engine.loop import EpochProgress, evaluate, train_one_epoch
from train.engine.loss import Criterion
from train.engine.run import TrainingRun
from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.runs.snapshots import Position

PLAIN_SGD = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.0, "warmup_epochs": 0.0, "clip_grad": 0.0}


def pixels(images: ImageSet, config: TrainConfig) -> Tensor:
    """Of all images, loaded one by one."""
    preprocess = config.preprocess()
    arrays = [preprocess(load_image((images.root / path).read_bytes())) for path in images.paths]
    return torch.from_numpy(np.stack(arrays))


def weights_of(model: ImageClassifier) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# train_one_epoch


def manual_epoch(model: ImageClassifier, images: ImageSet, config: TrainConfig) -> float:
    """The textbook's loop with plain SGD with Nesterov momentum; returns the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, nesterov=True)
    order = torch.from_numpy(EpochPlan(len(images), config.batch_size, config.seed).order(0))
    x, y, total = pixels(images, config), torch.from_numpy(images.labels), 0.0
    for chosen in order.split(config.batch_size):
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
    return total / len(images)


@pytest.mark.parametrize("batch_size", [8, 11, 3, 32])
def test_an_epoch_equals_the_textbooks_loop_also_with_an_incomplete_last_batch(
    tmp_path: Path, batch_size: int
) -> None:
    config, data = make_data(tmp_path, per_class=7, batch_size=batch_size, schedule="constant", **PLAIN_SGD)
    images = data.train.take(np.arange(11))
    ours, textbook = linear_model(), linear_model()
    (values,) = train_epochs(make_run(config, Data(images, data.val, {}, "", []), ours), 0)
    loss = manual_epoch(textbook, images, config)
    assert values["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(weights_of(ours), weights_of(textbook), atol=1e-6)
    assert not torch.allclose(weights_of(ours), weights_of(linear_model()), atol=1e-3)


def test_accumulation_does_not_change_the_result(tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 2, 4):
        config, data = make_data(tmp_path, 9, batch_size=8, accumulation=accumulation, lr=1e-3)
        model = linear_model()
        values = train_epochs(make_run(config, data, model), 0, 1)
        results.append((weights_of(model), values[-1]["train/loss"]))
    for weights, loss in results[1:]:
        assert torch.allclose(weights, results[0][0], atol=1e-6)
        assert loss == pytest.approx(results[0][1], rel=1e-5)


def test_training_lowers_the_loss_and_separates_colours(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, 8, batch_size=7, epochs=8, lr=2e-3)
    torch.manual_seed(0)
    model, _ = build_model("simple_cnn", 2, 16)
    values = train_epochs(make_run(config, data, model), *range(8))
    assert values[-1]["train/loss"] < 0.5 * values[0]["train/loss"]
    assert values[-1]["train/accuracy"] == 1.0


def poisoned(tmp_path: Path, images: list[int], **changes: Any) -> TrainingRun:
    """Targets of these images are not finite, as losses of a network that overflows are."""
    config, data = make_data(tmp_path, 8, batch_size=4, lr=1e-2, warmup_epochs=0.0, **changes)
    targets = F.one_hot(torch.from_numpy(data.train.labels), 2).float()
    targets[images] = float("inf")
    return make_run(config, data, build_model("simple_cnn", 2, 16)[0], soft_targets=targets)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, optimizer: str) -> None:
    run = poisoned(tmp_path, [3], optimizer=optimizer)
    (values,) = train_epochs(run, 0)
    assert values["train/skipped_steps"] == 1
    assert np.isfinite(values["train/loss"])
    for name, tensor in run.state.state_dict()["model"].items():
        assert tensor.isfinite().all(), name
    for moments in run.state.optimizer.state.values():
        assert moments.get("exp_avg", moments.get("momentum_buffer")).isfinite().all()
        assert int(moments.get("step", 3)) == 3, "of 4 steps one was skipped"
    assert run.state.scheduler.last_epoch == 4


def test_too_many_such_steps_in_a_row_end_the_run_with_step_rate_and_files(tmp_path: Path) -> None:
    run = poisoned(tmp_path, list(range(14)), max_skipped=1)
    before = weights_of(run.state.model)
    with pytest.raises(FloatingPointError) as raised:
        train_epochs(run, 0)
    message = str(raised.value)
    assert re.search(r"\b2 steps.*step 2 of epoch 1\b.*0\.0.*--lr", message)
    assert len(re.findall(r"'(?:cat|dog)\.\d\.png'", message)) == 4
    assert torch.equal(before, weights_of(run.state.model))


def test_an_epoch_after_a_validation_is_trained_with_batch_statistics(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    model, _ = build_model("simple_cnn", 2, 16)
    model.eval()  # as validation leaves it
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    train_epochs(make_run(config, data, model), 0)
    after = dict(model.named_buffers())
    assert before
    assert not any(torch.equal(value, after[name]) for name, value in before.items())


def test_accuracy_counts_images_once(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, 7, batch_size=8, lr=0.0)
    model = linear_model()
    (values,) = train_epochs(make_run(config, data, model), 0)
    predicted = model(pixels(data.train, config)).argmax(1).numpy()
    assert values["train/accuracy"] == pytest.approx((predicted == data.train.labels).mean())


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    changes = PLAIN_SGD | {"clip_grad": 0.01, "lr": 1.0, "schedule": "constant", "batch_size": 100}
    config, data = make_data(tmp_path, **changes)
    model = linear_model()
    train_epochs(make_run(config, data, model), 0)
    moved = (weights_of(model) - weights_of(linear_model())).norm().item()
    assert moved == pytest.approx(0.01 * 1.9, rel=1e-3)  # Nesterov's first step is 1 + momentum


def test_mixing_and_augmentation_train_to_the_same_weights_again(tmp_path: Path) -> None:
    changes = {"mixup": 0.2, "cutmix": 1.0, "crop_scale": 0.5, "flip": 0.5, "random_erasing": 0.5}
    config, data = make_data(tmp_path, batch_size=4, **changes)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model, _ = build_model("simple_cnn", 2, 16)
        torch.manual_seed(seed)  # dropout must not draw from what was left behind
        train_epochs(make_run(config, data, model), 0)
        weights.append(weights_of(model))
    assert torch.equal(*weights)


def test_a_loss_that_is_not_finite_is_an_error_with_epoch_and_learning_rate(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, lr=1000.0, schedule="constant", warmup_epochs=0.0)
    model = linear_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"epoch 1\b.* 3 of 3 .*1e\+03.*--lr"):
        train_epochs(make_run(config, data, model), 0)


def test_dropout_is_drawn_anew_in_each_pass_of_each_epoch_on_each_rank(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, batch_size=4, accumulation=2)
    model, seeds = linear_model(), []
    model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for rank in range(2):
        run = make_run(config, data, make_state(config, model), Ranks(rank, world_size=2))
        train_epochs(run, 0, 1)
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 2 * run.plan.steps


@pytest.mark.parametrize(
    ("ranks", "sums"),
    [
        (Ranks(0, world_size=3), [1.0, 2.0]),
        (Ranks(2, world_size=3), [5.0, 6.0]),
        (Ranks(0, world_size=2), [9.0, 12.0]),
        (Ranks(1, world_size=2), [0.0, 0.0]),
        (Ranks(), [9.0, 12.0]),
    ],
)
def test_sums_of_an_interrupted_epoch_count_once_on_any_number_of_processes(
    ranks: Ranks, sums: list[float]
) -> None:
    position = Position(1, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert EpochProgress(ranks, CPU, position).sums.tolist() == sums


def test_images_per_second_of_a_resumed_epoch_are_those_trained_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = make_data(tmp_path, per_class=7, batch_size=5)
    assert len(data.train) == 12
    clock = [0.0]

    def second() -> None:
        clock[0] += 1

    monkeypatch.setattr("train.engine.loop.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run = make_run(config, data, linear_model())
    for step, rate in ((0, 12 / 3), (1, 7 / 2), (2, 2 / 1)):
        progress = EpochProgress(run.ranks, CPU, Position(step, [[0.0, 0.0]]))
        assert train_one_epoch(run, progress, second)["images_per_second"] == rate


# evaluate


def evaluated(
    model: ImageClassifier, data: Data, config: TrainConfig, criterion: Criterion
) -> tuple[dict[str, float], np.ndarray]:
    metrics, evaluation = evaluate(make_run(config.replace(ema=0.0), data, model, criterion=criterion))
    assert evaluation is not None
    return metrics, evaluation.logits


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_evaluation_equals_a_direct_computation(tmp_path: Path, batch_size: int) -> None:
    config, data = make_data(tmp_path, 12, val_fraction=0.45, batch_size=batch_size)
    torch.manual_seed(0)
    model, _ = build_model("simple_cnn", 2, 16)
    criterion = Criterion(0.1, [0.5, 2.0])
    metrics, logits = evaluated(model, data, config, criterion)
    with torch.no_grad():
        expected = model.eval()(pixels(data.val, config))
    labels = data.val.labels
    probabilities = expected.double().softmax(1).numpy()
    assert logits.shape == (len(data.val), 2) == (10, 2)
    assert np.allclose(logits, expected.numpy(), atol=1e-5)
    assert metrics["val/accuracy"] == accuracy_score(labels, probabilities.argmax(1))
    assert metrics["val/log_loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    losses = criterion(expected, F.one_hot(torch.from_numpy(labels), 2).float())
    assert metrics["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_order_in_which_ranks_deliver_cannot_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = make_data(tmp_path, 12, val_fraction=0.45)
    criterion = Criterion(0.1, None)
    expected = evaluated(linear_model(), data, config, criterion)
    monkeypatch.setattr("train.engine.loop.gather_rows", lambda rows, ranks: rows.flip(0))
    metrics, logits = evaluated(linear_model(), data, config, criterion)
    assert metrics == expected[0]
    assert np.array_equal(logits, expected[1])


@pytest.mark.parametrize("right", [0, 1])
def test_an_image_that_cannot_be_read_any_more_counts_as_wrong(tmp_path: Path, right: int) -> None:
    """Whatever its class, and though the network would answer that one."""
    config, data = make_data(tmp_path, 12, val_fraction=0.45)
    model = linear_model()
    with torch.no_grad():
        model.network.layer.weight.zero_()
        model.network.layer.bias.copy_(torch.eye(2)[right] * 5)
    before, _ = evaluated(model, data, config, Criterion(0.0))
    lost = int(np.flatnonzero(data.val.labels == right)[0])
    (data.val.root / data.val.paths[lost]).unlink()
    after, logits = evaluated(model, data, config, Criterion(0.0))
    assert after["val/accuracy"] == pytest.approx(before["val/accuracy"] - 1 / len(data.val))
    assert logits[lost].argmax() != right
    assert np.ptp(logits[lost]) < 1e-3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_callback_runs_equally_often_on_all_ranks_though_one_has_a_batch_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """It communicates: a rank that calls it alone waits for ever."""
    config, data = make_data(tmp_path, 12, val_fraction=0.45, batch_size=2 * batch_size)
    images = data.val.take(np.arange(4 * batch_size + 1))
    monkeypatch.setattr("train.engine.loop.gather_rows", lambda rows, ranks: None)
    monkeypatch.setattr("train.engine.loop.on_main", lambda ranks, function: {})
    calls: list[int] = []
    for rank in range(2):
        run = make_run(config, replace(data, val=images), linear_model(), Ranks(rank, world_size=2))
        evaluate(run, partial(calls.append, rank))
    assert calls == [0, 1]


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    model, _ = build_model("simple_cnn", 2, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated(model, data, config, Criterion(0.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_answers_that_are_not_finite_end_the_run_and_are_no_accuracy(tmp_path: Path) -> None:
    """argmax of NaN is the first class, which half of the images have."""
    config, data = make_data(tmp_path)
    model = linear_model()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=f"{len(data.val)} of {len(data.val)} .* epoch 1\\b.*--lr"):
        evaluate(make_run(config, data, model))


def test_an_image_evaluated_twice_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = make_data(tmp_path)
    monkeypatch.setattr("train.engine.loop.evaluation_batches", lambda *args: [[(0, 0, 1.0), (0, 0, 1.0)]])
    with pytest.raises(AssertionError):
        evaluated(linear_model(), data, config, Criterion(0.0))


def test_a_student_without_labels_comes_to_agree_with_its_teacher(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, **{**PLAIN_SGD, "lr": 2e-4}, flip=0.5, epochs=30)
    teacher = linear_model(seed=7).eval()
    run = make_run(
        config, data, linear_model(seed=1), criterion=Criterion(0.0, None, share=1.0), teacher=teacher
    )
    losses = [values["train/loss"] for values in train_epochs(run, *range(10))]
    assert losses[-1] < 0.2 * losses[0]


def test_soft_targets_replace_the_labels(tmp_path: Path) -> None:
    """With all targets turned round, the network learns the opposite of the labels."""
    config, data = make_data(tmp_path, **PLAIN_SGD)
    targets = 1 - F.one_hot(torch.from_numpy(data.train.labels), 2).float()
    values = train_epochs(make_run(config, data, linear_model(), soft_targets=targets), *range(5))
    assert values[-1]["train/accuracy"] < 0.2
