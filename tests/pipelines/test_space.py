"""Search spaces: what is no setting or no value of one is refused before the first trial."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipelines.space import (
    AUGMENTATION,
    augmentation,
    flags,
    read_space,
)
from train.cli import parse_config


def space_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_the_default_space_is_usable_with_the_default_settings() -> None:
    assert set(read_space(None, [])) == {"lr", "weight_decay", AUGMENTATION, "model"}


@pytest.mark.parametrize(
    ("argv", "low", "high"),
    [([], 1e-3, 0.1), (["--weights", "w.pt"], 1e-4, 1e-2), (["--optimizer=sgd"], 0.01, 1.0)],
)
def test_the_default_space_looks_around_the_optimizers_usual_learning_rate(
    argv: list[str], low: float, high: float
) -> None:
    found = read_space(None, argv)["lr"]
    assert isinstance(found, FloatDistribution)
    assert (found.low, found.high, found.log) == (pytest.approx(low), pytest.approx(high), True)


def test_a_flag_takes_its_setting_out_of_the_default_space() -> None:
    assert set(read_space(None, ["--model", "resnet18", "--weight-decay=0.1"])) == {"lr", AUGMENTATION}


def test_a_space_of_ones_own_has_ranges_and_choices(tmp_path: Path) -> None:
    text = "lr: {low: 1e-5, high: 1, log: true}\nbatch_size: {low: 8, high: 64}\n"
    assert read_space(space_file(tmp_path, text + "dropout: {choices: [null, 0.2]}"), []) == {
        "lr": FloatDistribution(1e-5, 1.0, log=True),
        "batch_size": IntDistribution(8, 64),
        "dropout": CategoricalDistribution([None, 0.2]),
    }


def test_every_kind_of_value_arrives_as_drawn() -> None:
    sampled = {
        "lr": 1.2345678901234567e-05,
        "batch_size": 24,
        "dropout": None,
        "channels_last": True,
        "trivial_augment": False,
        "model": "1e3",
        "optimizer": "sgd",
        "weight_decay": 1,
    }
    config = parse_config(flags(sampled, []))
    assert {name: getattr(config, name) for name in sampled} == sampled


def test_augmentation_is_off_at_0_and_grows_with_the_strength() -> None:
    off = {"crop_scale": 1.0, "color_jitter": 0.0, "random_erasing": 0.0, "mixup": 0.0}
    assert augmentation(0) == off
    weak, strong = augmentation(0.3), augmentation(0.9)
    assert 0 < strong.pop("crop_scale") < weak.pop("crop_scale") < 1
    assert all(0 < weak[name] < strong[name] for name in weak)
    assert parse_config(flags({AUGMENTATION: 1.0}, [])).crop_scale == pytest.approx(0.08)


def test_augmentation_leaves_alone_what_the_command_line_fixes() -> None:
    sampled = flags({AUGMENTATION: 0.5}, ["--color-jitter", "0.1", "--deterministic"])
    names = {typed.partition("=")[0] for typed in sampled}
    assert names == {"--crop-scale", "--random-erasing", "--mixup"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: {low: 0.1, high: 1}", "learning_rate"),
        ("lr: {low: one, high: 2}", "one"),
        ("lr: {low: 1, high: 0.1}", "low <= high"),
        ("lr: {low: 0, high: 0.1, log: true}", "lr: "),
        ("lr: {low: 0.1}", "must be {low: , high: , log: }"),
        ("lr: {low: 0.1, high: 1, step: 0.1}", "must be {low: , high: , log: }"),
        ("lr: 0.1", "must be {low: , high: , log: }"),
        ("lr: {low: 0.1, high: 5000}", "outside 0..1000"),
        ("batch_size: {low: 1.5, high: 8}", "whole numbers"),
        ("batch_size: {low: true, high: 8}", "whole numbers"),
        ("model: {low: 1, high: 8}", "takes no range"),
        ("deterministic: {low: 0, high: 1}", "takes no range"),
        ("channels_last: {low: 0, high: 1}", "takes no range"),
        ("schedule: {low: 0, high: 1}", "takes no range"),
        ("schedule: {choices: [cosine, linear]}", "schedule: "),
        ("schedule: {choices: []}", "schedule: "),
        ("schedule: {choices: cosine}", "must be {low: , high: , log: }"),
        ("dropout: {choices: [[1], 2]}", "dropout: "),
        ("seed: {low: 0, high: 9}", "cannot be searched"),
        ("fold: {low: 1, high: 3}", "cannot be searched"),
        ("near_duplicates: {choices: [true, false]}", "cannot be searched"),
        ("augmentation: {low: -1, high: 1}", "outside"),
        ("augmentation: {choices: [weak]}", "augmentation: "),
        ("augmentation: {low: 0, high: 1}\nmixup: {low: 0, high: 1}", "sets mixup too"),
        ("epochs: {low: 1, high: 3}", "which the command line fixes"),
        ("- lr", "must hold lines like"),
        ("", "must hold lines like"),
        ("lr: {low", "space.yaml"),
        ("{}", "nothing is left to search"),
    ],
)
def test_an_unusable_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="space") as raised:
        read_space(space_file(tmp_path, text), ["--epochs", "2"])
    assert message in str(raised.value)


def test_a_space_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml .*No such file"):
        read_space(tmp_path / "none.yaml", [])


def test_what_a_config_file_fixes_is_fixed(tmp_path: Path) -> None:
    """Else sampled values would override a recipe, for they come after it."""
    (tmp_path / "recipe.yaml").write_text("model: lenet5\ncolor_jitter: 0.0\nlr: 0.02\n")
    for argv in (["--config", str(tmp_path / "recipe.yaml")], [f"--config={tmp_path / 'recipe.yaml'}"]):
        assert {"model", "lr"} & read_space(None, argv).keys() == set()
        assert not any(typed.startswith("--color-jitter") for typed in flags({AUGMENTATION: 1.0}, argv))
    with pytest.raises(ValueError, match=r"--config nowhere.yaml"):
        read_space(None, ["--config", "nowhere.yaml"])


def test_a_setting_that_needs_another_is_searched_together_with_it(tmp_path: Path) -> None:
    alone = "subject_zoom: {low: 1.2, high: 2}\n"
    both = space_file(tmp_path, alone + "subject_crop: {choices: [none, cam]}")
    assert set(read_space(both, [])) == {"subject_zoom", "subject_crop"}
    assert flags({"subject_zoom": 1.7, "subject_crop": "none"}, []) == ["--subject-crop=none"]
    assert "--subject-zoom=1.7" in flags({"subject_zoom": 1.7, "subject_crop": "cam"}, [])
    assert read_space(space_file(tmp_path, alone), ["--subject-crop", "cam"])
    with pytest.raises(ValueError, match=r"subject_zoom: .*--subject-crop"):
        read_space(space_file(tmp_path, alone), [])
