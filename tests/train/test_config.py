"""What settings follow from each other, and which do not go together."""

import pytest

from serve.contract.errors import UserError
from train.cli import parse_config
from train.config import TrainConfig


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--folds", "1", "--fold", "1"], r"--folds 1 .*2\.\.1000"),
        (["--folds", "3"], r"--fold 0 .*1\.\.3"),
        (["--folds", "3", "--fold", "4"], r"--fold 4 .*1\.\.3"),
        (["--fold", "2"], "--fold 2 .*--folds"),
        (["--folds", "3", "--fold", "1", "--val-data", "x"], "--folds .*--val-data"),
    ],
)
def test_folds_that_make_no_sense_are_an_error(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(argv)


def test_the_resize_size_follows_the_image_size() -> None:
    assert TrainConfig(image_size=224).preprocess().resize_size == 256
    assert TrainConfig(image_size=224, resize_size=240).preprocess().resize_size == 240


def test_validation_may_have_another_size_than_training() -> None:
    config = TrainConfig(image_size=112, eval_size=128)
    assert (config.preprocess().size, config.preprocess().resize_size) == (128, 146)
    assert TrainConfig(image_size=112).preprocess().size == 112


def test_a_resize_size_is_checked_against_the_weights_size_once_that_is_known() -> None:
    config = TrainConfig(weights="runs/a/checkpoints/best.pt", resize_size=73)
    assert config.replace(image_size=64).preprocess().resize_size == 73
    with pytest.raises(UserError, match=r"--resize-size 73 .*128"):
        config.replace(image_size=128)


def test_training_images_grow_in_four_parts_and_end_at_the_image_size() -> None:
    config = TrainConfig(image_size=112, start_size=64, epochs=8)
    assert [config.train_size(epoch) for epoch in range(8)] == [64, 64, 80, 80, 96, 96, 112, 112]
    assert TrainConfig(image_size=100, start_size=64, epochs=1).train_size(0) == 100
    assert config.replace(eval_size=128).input_sizes() == [64, 80, 96, 112, 128]
    odd = TrainConfig(image_size=21, start_size=20, epochs=4)
    assert {odd.train_size(epoch) for epoch in range(4)} <= {20, 21}
    assert {TrainConfig(image_size=100, epochs=9).train_size(epoch) for epoch in range(12)} == {100}


def test_patience_that_ends_before_the_next_validation_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--patience 2 .*--val-interval 3"):
        TrainConfig(patience=2, val_interval=3)


def test_training_images_cannot_shrink() -> None:
    with pytest.raises(ValueError, match=r"--start-size 128 .*--image-size 112"):
        TrainConfig(image_size=112, start_size=128)


def test_a_subject_is_cut_from_a_larger_image_of_which_nothing_was_cut_before() -> None:
    config = TrainConfig(image_size=96, eval_size=128, subject_crop="cam", subject_zoom=1.5)
    assert (config.preprocess().size, config.preprocess().resize_size) == (192, 192)
    assert config.input_size(config.train_size(0)) == 144
    assert config.replace(subject_crop="none").input_size(96) == 96


def test_looking_for_the_subject_starts_after_a_share_of_the_epochs() -> None:
    config = TrainConfig(epochs=10, subject_crop="cam", subject_start=0.3)
    assert [config.crops_subject(epoch) for epoch in range(10)] == [False] * 3 + [True] * 7
    assert config.replace(subject_start=0.0).crops_subject(0)
    assert not config.replace(subject_crop="none").crops_subject(9)
    detector = config.replace(subject_crop="detector", crop_detector="d.pt")
    assert detector.crops_subject(0), "a detector knows where to look from the start"
