"""What is noticed of settings and data before a run trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import build, linear_model, make_data, make_state

from train.checkpoint import save_checkpoint
from train.config import TrainConfig
from train.data.index import prepare_data
from train.data.sampler import EpochPlan
from train.engine import checks
from train.engine import prepare as preparation
from train.engine.checkpointing import checkpoint_state
from train.engine.checks import (
    check_batch_size,
    check_clip,
    check_network,
    check_single_image,
    check_size,
    check_teacher,
    few_steps,
    trained_on_validation,
)
from train.runs.history import History


def test_weights_of_a_run_that_split_the_same_images_otherwise_are_warned_of(tmp_path: Path) -> None:
    config, data = make_data(tmp_path, 20, seed=1)
    state = checkpoint_state(make_state(config, linear_model()), History(), data, config, "run")
    best = tmp_path / "other" / "checkpoints" / "best.pt"
    save_checkpoint(state, best)
    for changes in ({"weights": str(best)}, {"teacher": str(tmp_path / "other")}):
        same = config.replace(**changes)
        assert trained_on_validation(same, prepare_data(same)) == []
        other = same.replace(seed=2)
        (warning,) = trained_on_validation(other, prepare_data(other))
        assert f"--{next(iter(changes))} {next(iter(changes.values()))} " in warning
        assert "--seed 1 --val-fraction 0.15 --folds 0 --fold 0" in warning


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "/proc/runs"}, "--output.*'/proc'"),
        ({"output": "file"}, "--output.*/file'"),
        ({"output": "file/runs"}, "--output.*/file'"),
        ({"teacher": "nowhere"}, "nowhere/checkpoints/best.pt"),
        ({"weights": "none.pt"}, "--weights 'none.pt'"),
        ({"weights": "default", "model": "squeezenet1_1"}, "--weights default: squeezenet1_1"),
        ({"subject_crop": "detector", "crop_detector": "none.pt"}, "--crop-detector 'none.pt'"),
        ({"model": "resnet19"}, "--model 'resnet19'.* resnet18"),
        ({"model": "resnet18", "freeze": 99}, "--freeze 99"),
        ({"model": "inception_v3", "image_size": 32}, "inception_v3 .* 32 pixels"),
        ({"model": "lenet5", "eval_size": 16}, "lenet5 .* 16 pixels"),
        ({"model": "lenet5", "start_size": 16, "image_size": 32}, "lenet5 .* 16 pixels"),
        ({"model": "timm/vit_tiny_patch16_224", "image_size": 100}, "vit_tiny.* 100 pixels"),
    ],
    ids=str,
)
def test_what_cannot_be_had_or_written_is_found_before_the_images_are_read(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan(_: TrainConfig) -> None:
        raise AssertionError("the images are read")

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(preparation, "prepare_data", scan)
    config = TrainConfig(data=".", output="runs", name="a", model="simple_cnn")
    with pytest.raises(AssertionError, match="the images are read"):
        preparation.prepare(config)
    assert not Path("runs").exists()
    with pytest.raises(ValueError, match=message):
        preparation.prepare(config.replace(**changes))


def test_a_network_that_the_meta_device_cannot_run_is_tried_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = []

    def build_model(*arguments: Any) -> Any:
        devices.append(torch.get_default_device().type)
        if devices[-1] == "meta":
            raise NotImplementedError("no such operation on the meta device")
        return model_of(*arguments)

    model_of = checks.build_model
    monkeypatch.setattr(checks, "build_model", build_model)
    check_network(TrainConfig(model="simple_cnn", image_size=16))
    assert devices == ["meta", "cpu"]


def test_overridden_settings_cause_warnings_of_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = make_data(tmp_path, trivial_augment=True, color_jitter=0.3)
    monkeypatch.chdir(tmp_path)
    _, data = preparation.prepare(config)
    assert [note for note in data.notes if "--color-jitter 0.3" in note and "--trivial-augment" in note]


def test_a_model_that_could_never_be_exported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ONNX file holds 2 GiB."""
    model = linear_model()
    check_size(model, "linear")
    with torch.device("meta"):
        model.network = torch.nn.Linear(2**15, 2**14)
    with pytest.raises(ValueError, match=r"--model linear .*2\.15 GB.* 2\.08 GB"):
        check_size(model, "linear")


def test_a_teacher_of_other_images_has_seen_none_of_these(tmp_path: Path) -> None:
    config, data = make_data(tmp_path / "theirs", 20)
    state = checkpoint_state(make_state(config, linear_model()), History(), data, config, "run")
    save_checkpoint(state, tmp_path / "other" / "checkpoints" / "best.pt")
    ours, data = make_data(tmp_path / "ours", 10, teacher=str(tmp_path / "other"))
    assert trained_on_validation(ours, data) == []


def test_weights_of_other_kinds_are_nobodys_run(tmp_path: Path) -> None:
    config, data = make_data(tmp_path)
    (tmp_path / "w.pt").write_bytes(b"not ours")
    for weights in ("", "default", "package", str(tmp_path / "w.pt")):
        assert trained_on_validation(config.replace(weights=weights), data) == []


def test_a_network_that_cannot_learn_from_single_images_is_an_error_that_names_the_cause() -> None:
    model, config = build("resnet18"), TrainConfig(model="resnet18", image_size=64)
    check_single_image(model, config)
    for smaller in ({"image_size": 32}, {"start_size": 32}):
        with pytest.raises(ValueError, match=r"resnet18 .* 32 pixels .*--batch-size"):
            check_single_image(model, config.replace(**smaller))


def test_a_teacher_that_cannot_take_a_size_of_the_training_is_an_error_that_names_the_cause() -> None:
    teacher = build("vit_tiny_patch16_224", size=224)
    grown = TrainConfig(model="resnet18", image_size=224, start_size=160, epochs=4, teacher="runs/a")
    with pytest.raises(ValueError, match=r"--teacher 'runs/a'.*\b1\d\d\b"):
        check_teacher(teacher, grown, 3)
    check_teacher(teacher, grown.replace(start_size=0), 3)
    assert not teacher.training
    retuned = TrainConfig(model="resnet18", image_size=224, eval_size=256, teacher="runs/a")
    check_teacher(teacher, retuned, 3)
    with pytest.raises(ValueError, match=r"--teacher.*\b256\b"):
        check_teacher(teacher, retuned.replace(retune_epochs=1), 3)
    of_the_first_size = build("vit_tiny_patch16_224", size=160)
    with pytest.raises(ValueError, match="--teacher"):
        check_teacher(of_the_first_size, grown, 3)


def test_a_run_of_few_steps_is_warned_of() -> None:
    config = TrainConfig(epochs=15, batch_size=128)
    (warning,) = few_steps(config, EpochPlan(700, 128, 0))
    assert "90 optimizer steps" in warning
    assert "--batch-size" in warning
    assert few_steps(config, EpochPlan(800, 128, 0)) == []


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_pairs_that_would_be_divided_among_processes_are_an_error_before_anything_is_done(mix: str) -> None:
    mixed = TrainConfig(batch_size=6).replace(**{mix: 0.2})
    check_batch_size(mixed, 3)
    check_batch_size(TrainConfig(batch_size=6), 2)
    with pytest.raises(ValueError, match=r"--batch-size 33 .* 2"):
        check_batch_size(TrainConfig(batch_size=33), 2)
    with pytest.raises(ValueError, match=r"--batch-size 6 .* 4 \(2 processes x 1"):
        check_batch_size(mixed, 2)
    with pytest.raises(ValueError, match=r"--batch-size 10 .* 4 \(1 processes x 2"):
        check_batch_size(mixed.replace(batch_size=10, accumulation=2), 1)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(32, 32), (24, 8), (1, 1)])
def test_every_second_image_is_cropped_only_in_batches_that_have_one(
    batch_size: int, accumulation: int
) -> None:
    """Else none of them would be, and validation would see crops."""
    config = TrainConfig(batch_size=batch_size, accumulation=accumulation, subject_crop="cam")
    with pytest.raises(ValueError, match=f"--batch-size {batch_size} .*--subject-average false"):
        check_batch_size(config, 1)
    check_batch_size(config.replace(subject_average=False), 1)
    check_batch_size(config.replace(batch_size=2 * batch_size), 1)


def test_a_clip_that_leaves_too_little_for_the_answer_is_refused() -> None:
    check_clip(0.0005, 1000)
    check_clip(0.1, 5)
    with pytest.raises(ValueError, match=r"--clip-probabilities 0.01 .* 1000 .* 0.0005"):
        check_clip(0.01, 1000)
