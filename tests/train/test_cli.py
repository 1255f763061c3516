"""Flags, YAML and resume agree, errors name the value and the limit, torchrun lets flags pass."""

import dataclasses
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

from train.cli import build_parser, parse_config, save_config
from train.config import TrainConfig

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def spellings(name: str) -> set[str]:
    return {f"--{name}", f"--{name.replace('_', '-')}"}


ALL_FLAGS = sorted(flag for name in [*FIELDS, "config"] for flag in spellings(name))


def test_every_setting_has_help_text() -> None:
    text = build_parser().format_help().replace("\n", " ")
    for name in FIELDS:
        start = text.index(f"--{name} ", text.index("Train an image classifier"))
        words = text[start:].split("(type:")[0].split(maxsplit=2)
        assert len(words) == 3, f"no docstring beside {name}"


def test_dashes_and_underscores_are_the_same() -> None:
    assert parse_config(["--batch-size", "8"]) == parse_config(["--batch_size", "8"])
    assert parse_config(["--batch-size=8"]).batch_size == 8


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--deterministic"], True),
        (["--deterministic", "--batch-size", "8"], True),
        (["--deterministic=false"], False),
        (["--deterministic", "false"], False),
        (["--deterministic", "True"], True),
    ],
)
def test_a_bare_switch_is_true(argv: list[str], expected: bool) -> None:
    assert parse_config(argv).deterministic is expected


@pytest.mark.parametrize(
    "value", ["123", "007", "1e3", "true", "null", "~", "[a]", "{a: 1}", "a: b", "고양이"]
)
def test_a_name_stays_text_whatever_it_looks_like(tmp_path: Path, value: str) -> None:
    config = parse_config(["--name", value])
    assert config.name == value
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]).name == value


def test_values_may_hold_equals_signs_dashes_and_be_negative() -> None:
    assert parse_config(["--data=a=b"]).data == "a=b"
    assert parse_config(["--data", "my-pet-photos"]).data == "my-pet-photos"
    assert parse_config(["--num-workers", "-1"]).num_workers == -1


def test_config_yaml_gives_the_same_settings_back(tmp_path: Path) -> None:
    config = TrainConfig(data="x", lr=1e-05, dropout=0.3, channels_last=False, deterministic=True, seed=7)
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(
    data=printable,
    experiment=printable,
    lr=st.floats(1e-12, 1000, allow_subnormal=False),
    weight_decay=st.floats(0, 100, allow_subnormal=False),
    dropout=st.none() | st.floats(0, 0.95),
    channels_last=st.none() | st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_survive_the_yaml_file(tmp_path: Path, **values: object) -> None:
    config = TrainConfig(**values)  # type: ignore[arg-type]
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_flags_override_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 0.5\nepochs: 7\n")
    config = parse_config(["--config", str(tmp_path / "c.yaml"), "--lr", "0.25"])
    assert (config.lr, config.epochs) == (0.25, 7)


def saved_run(tmp_path: Path, **changes: object) -> str:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    save_config(TrainConfig(name="a", **changes), run / "config.yaml")  # type: ignore[arg-type]
    return str(run)


def test_resume_takes_the_runs_settings_and_flags_override_them(tmp_path: Path) -> None:
    run = saved_run(tmp_path, lr=0.03, epochs=4, deterministic=True)
    config = parse_config(["--resume", run, "--epochs", "9"])
    assert (config.lr, config.epochs, config.deterministic, config.resume) == (0.03, 9, True, run)
    assert parse_config(["--resume", run, "--deterministic=false"]).deterministic is False


def test_resume_goes_on_after_stop_after(tmp_path: Path) -> None:
    run = saved_run(tmp_path, stop_after=2)
    assert parse_config(["--resume", run]).stop_after == 0
    assert parse_config(["--resume", run, "--stop-after", "3"]).stop_after == 3


def test_resume_of_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--resume '{tmp_path}' is not a run directory"):
        parse_config(["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "2000"], r"--lr 2000.0 is outside 0..1000"),
        (["--image-size", "4"], r"--image_size 4 is outside 8..2048"),
        (["--epochs", "0"], r"--epochs 0 is outside 1..100000"),
        (["--dropout", "1"], r"--dropout 1.0 is outside 0..0.95"),
        (["--lr", "fast"], r"^--lr 'fast' is no number \("),
        (["--lr", "nan"], r"lr(.|\n)*nan"),
        (["--optimizer", "adam"], r"^--optimizer 'adam' is none of auto, adamw, sgd, muon \("),
        (["--epochs", "1.5"], r"^--epochs '1.5' is no whole number \("),
        (["--dropout", "some"], r"^--dropout 'some' is no number \("),
        (["--track=maybe"], r"^--track 'maybe' is neither true nor false \("),
        (["--epocs", "3"], r"^unrecognized arguments: --epocs 3; the closest flag is --epochs \("),
        (["--mixup", "0.2", "--batch-size", "7"], r"--batch_size 7 .* must be a multiple of 2"),
        (["--cutmix", "1", "--batch-size", "10", "--accumulation", "2"], r"must be a multiple of 4"),
        (["--device", "cpu", "--precision", "fp16"], r"--precision fp16 is for CUDA; .* use bf16 or fp32"),
        (["--name", "a/b"], r"--name 'a/b' must be a plain folder name"),
        (["--name", ".."], r"--name '..' must be a plain folder name"),
        (["--name", 101 * "é"], r"--name '.*' is longer than 200 bytes"),
        (["--data", "d\udce9"], r"--data 'd.*' is not UTF-8, .*: rename that, or give a link to it"),
        (["--start-size", "3"], r"--start_size 3 is outside 8..2048"),
        (["--eval-size", "7"], r"--eval_size 7 is outside 8..2048"),
        (["--resize-size", "100"], r"resize_size 100 is outside 128"),
        (
            ["--subject-crop", "detector"],
            r"--subject_crop detector with --crop_detector '': .* belong together",
        ),
        (["--crop-detector", "d.pt"], r"--subject_crop none with --crop_detector 'd.pt'"),
        (["--crop-classes", "17;18"], r"--crop_classes '17;18' must be numbers with commas, as in 17,18"),
        (["--no-such-flag", "1"], r"unrecognized arguments: --no_such_flag.*--help lists the settings"),
        (["stray"], r"unrecognized arguments: stray"),
        (["--model"], r"--model: expected one argument"),
        (["--config", "nowhere.yaml"], r"^--config: File does not exist: .*nowhere.yaml"),
    ],
)
def test_an_unusable_value_is_an_error_that_names_it_and_the_limit(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(argv)


@pytest.mark.parametrize("text", ["learning_rate: 1\n", "lr: [1\n", "- 1\n"])
def test_a_faulty_config_file_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config|learning_rate"):
        parse_config(["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config|learning_rate"):
        parse_config(["--resume", str(tmp_path)])


def test_torchrun_lets_all_flags_pass() -> None:
    """torchrun's parser sees the script's flags first, and takes abbreviations for its own."""
    parser = get_args_parser()
    for flag in ALL_FLAGS:
        assert not [option for option in parser._option_string_actions if option.startswith(flag)]
        for arguments in ([flag, "1"], [f"{flag}=1"], [flag]):
            values = parser.parse_args(["--nproc_per_node=4", "train/main.py", *arguments])
            assert values.training_script_args == arguments
            assert values.nproc_per_node == "4"


def test_without_arguments_the_defaults_hold() -> None:
    assert parse_config([]) == TrainConfig()


@pytest.mark.parametrize("classes", ["", "17", "17,18"])
def test_detector_classes_stay_text_in_the_yaml_file(tmp_path: Path, classes: str) -> None:
    config = TrainConfig(crop_classes=classes)
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert parse_config([f"--crop-classes={classes}"]) == config


RECIPES = sorted((REPOSITORY / "train" / "recipes").iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_configuration(recipe: Path) -> None:
    config = parse_config(["--config", str(recipe), "--data", "images"])
    assert config.data == "images"
    assert config.model != TrainConfig.model
