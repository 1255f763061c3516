"""The last stage: statistics and head fitted to the view that is served, everything else left alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import BatchNorm2d, Module
from train_data import CPU, ONE, make_data, make_run, pixel_dataset, train_epochs

from train.checkpoint import load_checkpoint, save_checkpoint
from train.data.augment import BatchAugment, PairMix
from train.data.loader import Loader
from train.engine.checkpointing import checkpoint_state, restore
from train.engine.retune import begin_retuning, head_state, refresh_statistics, retuning_settings
from train.engine.run import TrainingRun
from train.models.build import build_model
from train.models.classifier import ImageClassifier
from train.models.subject_crop.crop import SubjectCrop, whole
from train.runs.history import History

STAGE = {"eval_size": 24, "retune_epochs": 2, "flip": 0.5, "lr": 0.05, "ema": 0.9}


def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return build_model("simple_cnn", 2, 16)[0]


def begun(tmp_path: Path) -> TrainingRun:
    """A run after one epoch, with its head alone to train."""
    config, data = make_data(tmp_path, **STAGE)
    run = make_run(config, data, classifier())
    train_epochs(run, 0)
    run.history.epochs_done = 1
    begin_retuning(run)
    return run


@pytest.mark.parametrize("trivial", [False, True])
def test_the_stage_trains_on_the_view_and_size_of_validation(tmp_path: Path, trivial: bool) -> None:
    random = {"crop_scale": 0.3, "trivial_augment": trivial, "random_erasing": 1.0, "color_jitter": 0.4}
    sizes = {"start_size": 8, "eval_size": 24, "retune_epochs": 9}
    config, data = make_data(tmp_path, **sizes, **random, mixup=0.5, cutmix=0.5)
    stage = retuning_settings(config)
    run = make_run(config, data, classifier(), stage=stage)
    batch = next(run.train_loader(run.plan.batches(1)))
    seen = Loader(pixel_dataset(data.train, config), 0, pin_memory=False)
    expected = next(seen([[(0, int(i), 1.0) for i in batch.indices]]))
    assert torch.equal(batch.images, expected.images)
    coloured = BatchAugment(stage)(batch.images.clone(), batch.indices, 0, 1)
    assert torch.equal(PairMix(stage, 2)(coloured, batch.labels, 0)[0], expected.images)


def test_its_rate_is_a_tenth_of_the_peak_from_its_first_step_on_and_ends_at_0(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, **STAGE, epochs=9, warmup_epochs=2.0)
    run = make_run(config, data, classifier())
    steps = run.plan.steps
    head = head_state(run.state, retuning_settings(config), run.plan, ONE, CPU)
    assert [head.rates(step)[0] for step in (0, steps, 2 * steps)] == pytest.approx([5e-3, 2.5e-3, 0])


def test_it_continues_from_the_moving_average_and_changes_the_head_only(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, **STAGE)
    run = make_run(config, data, classifier())
    train_epochs(run, 0)
    average = {k: v.clone() for k, v in run.state.evaluated.state_dict().items()}
    begin_retuning(run)
    statistics = {k: v.clone() for k, v in run.state.model.state_dict().items() if "running" in k}
    train_epochs(run, 1)
    for name, value in run.state.model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, statistics[name]), "statistics stay as they were computed"
            assert not torch.equal(value, average[name])
        elif "tracked" not in name:
            is_head = name.startswith("network.classifier.3")
            assert torch.equal(value, average[name]) != is_head, name


def test_statistics_are_those_of_the_images_at_the_new_size(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, flip=0.0, eval_size=24, batch_size=5)
    model = classifier()
    run = make_run(config, data, model, stage=retuning_settings(config))
    batches = list(run.train_loader(run.plan.batches(0)))
    refresh_statistics(run)
    first = model.network.features[0]
    with torch.no_grad():
        outputs = [first((b.images.permute(0, 3, 1, 2) - model.mean) / model.std) for b in batches]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    var = torch.stack([out.var((0, 2, 3)) for out in outputs]).mean(0)
    norm = model.network.features[1]
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.momentum == BatchNorm2d(1).momentum
    assert model.training


def test_a_small_variance_of_large_features_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the difference of two means, in float32, it would be lost in rounding."""
    config, data = make_data(tmp_path)
    model = classifier()
    run = make_run(config, data, model, stage=retuning_settings(config))
    norm = model.network.features[1]

    def passed(images: object) -> None:
        norm.running_mean.fill_(20.0)
        norm.running_var.fill_(1e-5)

    monkeypatch.setattr(model, "forward", passed)
    refresh_statistics(run)
    torch.testing.assert_close(norm.running_var, torch.full_like(norm.running_var, 1e-5), rtol=1e-3, atol=0)


def test_the_network_sees_the_size_of_validation_also_of_a_subject_cut_out(tmp_path: Path) -> None:
    config, _ = make_data(tmp_path, eval_size=24, subject_crop="cam", subject_zoom=1.5)
    stage = retuning_settings(config)
    assert stage.train_size(5) == 24
    assert stage.input_size(24) == config.preprocess().size == 36
    assert stage.crops_subject(1), "although the stage counts its own epochs"
    longer = retuning_settings(config.replace(epochs=3, retune_epochs=12))
    assert longer.crops_subject(3), "as the run's epochs are counted"


def test_a_detectors_statistics_are_left_alone(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, eval_size=24, batch_size=5)
    model = classifier()
    norm = BatchNorm2d(3)
    norm.running_mean.fill_(5.0)

    class Located(Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm.eval()

        def forward(self, pixels: Tensor, classifier: object) -> tuple[Tensor, None]:
            self.norm(pixels)
            return whole(pixels), None

    model.subject = SubjectCrop(Located(), zoom=1.5, margin=0.0, average=False)
    refresh_statistics(make_run(config, data, model, stage=retuning_settings(config)))
    assert norm.running_mean.tolist() == [5.0] * 3


def test_a_run_stopped_while_it_is_retuned_continues_bit_by_bit(tmp_path: Path) -> None:
    straight = begun(tmp_path)
    config, data = straight.config, straight.data
    train_epochs(straight, 1)
    metrics = {"val/accuracy": 0.5, "val/log_loss_calibrated": 0.7}
    history = History(2, 1, metrics, retuned=1)
    save_checkpoint(checkpoint_state(straight.state, history, data, config, "run"), tmp_path / "last.pt")
    train_epochs(straight, 2)

    stage = retuning_settings(config)
    other = make_run(config, data, build_model("simple_cnn", 2, 16)[0], stage=stage)
    other.state = head_state(other.state, stage, other.plan, ONE, CPU)
    restored = restore(load_checkpoint(tmp_path / "last.pt"), other.state, data, config)
    assert restored.retuned == 1
    train_epochs(other, 2)
    for name, value in straight.state.evaluated.state_dict().items():
        assert torch.equal(value, other.state.evaluated.state_dict()[name]), name


def test_more_epochs_after_retuning_are_refused(tmp_path: Path) -> None:
    run = begun(tmp_path)
    checkpoint = checkpoint_state(run.state, History(2, 1, {}, retuned=1), run.data, run.config, "run")
    with pytest.raises(ValueError, match=r"--epochs 3\b"):
        restore(checkpoint, run.state, run.data, run.config.replace(epochs=9))
