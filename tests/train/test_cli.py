"""Flags, YAML and resume agree, errors name the value and the limit, torchrun lets flags pass."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

from serve.contract.errors import UserError
from train.cli import build_parser, given_values, parse_config, parse_unchecked, save_config
from train.config import SETTINGS, TrainConfig
from train.settings import flag

FLAGS = """
accumulation batch-size best-by cache-size calibrate cam-threshold cam-zoom channels-last class-weights
clip-grad clip-probabilities color-jitter columns compile config crop-classes crop-detector crop-min-score
crop-scale cutmix data data-format deterministic device drop-path dropout ema epochs eval-size exclude
experiment flip flip-tta fold folds freeze hang-minutes help image-size interpolation label-smoothing
layer-decay lr max-bad max-megapixels max-skipped mixup model name near-duplicates num-workers optimizer
output patience pixel-cache precision profile random-erasing resize-mode resize-size resume retune-epochs
schedule seed snapshot-minutes snapshot-steps start-size stop-after subject-average subject-crop
subject-margin subject-start subject-zoom teacher teacher-share teacher-temperature track
trivial-augment val-data val-fraction val-interval warmup-epochs weight-decay weights
"""
GROUPS = [
    *(
        "usual settings",
        "data",
        "model",
        "subject crop",
        "augmentation",
        "optimisation",
        "evaluation",
        "hardware",
    ),
    *("run and tracking", "fault tolerance"),
]


def test_a_new_flag_needs_a_reason_and_the_question_which_one_it_replaces() -> None:
    flags = re.findall(r"^  (?:-h, )?--([a-z-]+)", build_parser().format_help(), re.MULTILINE)
    assert sorted(flags) == FLAGS.split()


def test_help_has_a_text_and_one_form_of_default_and_range_for_every_setting() -> None:
    text = " ".join(build_parser().format_help().split())
    for name in SETTINGS:
        after = text[text.index(f" {flag(name)} ", text.index("usual settings:")) :]
        words = after.split(" --")[1].split(maxsplit=2)
        assert len(words) == 3, f"no docstring beside {name}"
    assert "(default: 0.15; range: 0.001..0.9)" in text
    assert "(default: true)" in text
    assert "range: 0 or 8..2048)" in text
    assert "type:" not in text


def test_help_lists_the_settings_in_groups() -> None:
    found = re.findall(r"^([a-z ]+):$", build_parser().format_help(), re.MULTILINE)
    assert found == ["options", *GROUPS]


def test_help_is_printed_whatever_else_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_config(["--epocs", "3", "-h"])
    assert raised.value.code == 0
    assert "--epochs" in capsys.readouterr().out


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
    data=printable.filter(lambda text: text[:1] != "~"),
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


def test_a_home_folder_is_expanded_in_paths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data: ~/photos\nval_data: '~/more'\nname: '~'\nepochs: 3\n")
    config = parse_config(["--config=~/c.yaml", "--output=~/runs", "--weights", "~/w.pt"])
    assert (config.data, config.val_data) == (f"{tmp_path}/photos", f"{tmp_path}/more")
    assert (config.output, config.weights, config.name) == (f"{tmp_path}/runs", f"{tmp_path}/w.pt", "~")
    assert given_values(["--config", "~/c.yaml"])["data"] == f"{tmp_path}/photos"
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", "~/config.yaml"]) == config


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


def test_a_resumed_run_forgets_stop_after(tmp_path: Path) -> None:
    run = saved_run(tmp_path, stop_after=2)
    assert parse_config(["--resume", run]).stop_after == 0
    assert parse_config(["--resume", run, "--stop-after", "3"]).stop_after == 3


def test_resume_of_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--resume '{tmp_path}'"):
        parse_config(["--resume", str(tmp_path)])


def test_a_run_that_is_resumed_keeps_its_name(tmp_path: Path) -> None:
    """Under --name the user expects another run, and this one untouched."""
    run = saved_run(tmp_path)
    with pytest.raises(ValueError, match=f"--name b .*--resume {run}"):
        parse_config(["--resume", run, "--name", "b"])
    assert parse_config(["--resume", run, "--name", "a"]).name == "a"


def test_a_run_that_is_resumed_stays_in_its_folder(tmp_path: Path) -> None:
    run = saved_run(tmp_path, output=str(tmp_path / "before"))
    with pytest.raises(ValueError, match=f"--output other .*--resume {run}"):
        parse_config(["--resume", run, "--output", "other"])
    assert parse_config(["--resume", run, "--output", str(tmp_path / "runs")]).resume == run


def test_resume_of_a_file_in_a_run_is_an_error_that_names_the_run(tmp_path: Path) -> None:
    run = saved_run(tmp_path)
    with pytest.raises(ValueError, match=f"--resume .*last.pt.* give {run}$"):
        parse_config(["--resume", f"{run}/checkpoints/last.pt"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "2000"], r"--lr 2000.0 .*0\.\.1000"),
        (["--image-size", "4"], r"--image-size 4 .*8\.\.2048"),
        (["--epochs", "0"], r"--epochs 0 .*1\.\.100000"),
        (["--batch_size", "0"], r"--batch-size 0 .*1\.\.1000000"),
        (["--dropout", "1"], r"--dropout 1.0 .*0\.\.0.95"),
        (["--lr", "fast"], r"--lr 'fast'"),
        (["--lr", "nan"], r"--lr 'nan'"),
        (["--optimizer", "adam"], r"--optimizer 'adam' .*auto, adamw, sgd, muon"),
        (["--resize-mode", "adam"], r"--resize-mode 'adam' .*crop, squash, pad"),
        (["--epochs", "1.5"], r"--epochs '1.5'"),
        (["--dropout", "some"], r"--dropout 'some'"),
        (["--track=maybe"], r"--track 'maybe' .*true, false"),
        (["--channels-last=maybe"], r"--channels-last 'maybe' .*true, false"),
        (["--epocs", "3"], r"--epocs .*--epochs"),
        (["--batch-sise", "3"], r"--batch-sise .*--batch-size"),
        (["--name", "a/b"], r"--name 'a/b'"),
        (["--name", ".."], r"--name '..'"),
        (["--name", 101 * "é"], r"--name '.*' .*200 bytes"),
        (["--data", "d\udce9"], r"--data 'd.*' .*UTF-8"),
        (["--start-size", "3"], r"--start-size 3 .*8\.\.2048"),
        (["--eval-size", "7"], r"--eval-size 7 .*8\.\.2048"),
        (["--image-size", "128", "--resize-size", "100"], r"--resize-size 100 .*128"),
        (["--subject-crop", "detector"], r"--subject-crop detector .*--crop-detector"),
        (["--crop-detector", "d.pt"], r"--crop-detector d.pt .*--subject-crop detector"),
        (["--crop-detector", "d.pt", "--subject-crop", "cam"], r"--crop-detector d.pt"),
        (["--subject-zoom", "2"], r"--subject-zoom 2.0 .*--subject-crop"),
        (["--subject-average=false"], r"--subject-average False .*--subject-crop"),
        (["--teacher-share", "0.3"], r"--teacher-share 0.3 .*--teacher"),
        (["--crop-classes", "17;18"], r"--crop-classes '17;18' .*17,18"),
        (["--no-such-flag", "1"], r"--no-such-flag .*--help"),
        (["stray"], r"stray"),
        (["--model"], r"--model"),
        (["--model", "--epochs", "3"], r"--model"),
        (["--config", "nowhere.yaml"], r"--config nowhere.yaml"),
    ],
)
def test_an_unusable_value_is_an_error_that_names_it_and_the_limit(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(argv)


def test_a_run_of_an_earlier_version_resumes_though_a_setting_of_it_has_no_effect(tmp_path: Path) -> None:
    run = saved_run(tmp_path, teacher_share=0.3)
    assert parse_unchecked(["--config", f"{run}/config.yaml"]).teacher_share == 0.3
    assert parse_config(["--resume", run]).teacher_share == 0.3


def test_default_values_of_settings_without_effect_are_not_taken_for_given(tmp_path: Path) -> None:
    save_config(TrainConfig(), tmp_path / "config.yaml")
    assert (
        parse_config(["--config", str(tmp_path / "config.yaml"), "--subject-zoom", "1.5"]) == TrainConfig()
    )


def test_values_given_by_flags_and_files_are_found(tmp_path: Path) -> None:
    """As a sweep needs them: drawn values must not override a recipe, which comes before them."""
    (tmp_path / "recipe.yaml").write_text("model: lenet5\ncolor-jitter: 0.0\nlr: 0.02\n")
    for argv in (["--config", str(tmp_path / "recipe.yaml")], [f"--config={tmp_path / 'recipe.yaml'}"]):
        found = given_values([*argv, "--lr", "0.3", "--deterministic"])
        assert found == {"model": "lenet5", "color_jitter": 0.0, "lr": "0.3", "deterministic": "true"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", "learning_rate"),
        ("epocs: 1\n", "epocs.*--epochs"),
        ("config: other.yaml\n", "config.yaml"),
        ("lr: [1\n", "config.yaml"),
        ("lr: [1]\n", r"--lr \[1\]"),
        ("lr: fast\n", "--lr 'fast'"),
        ("epochs: 0\n", "--epochs 0"),
        ("- 1\n", "config.yaml"),
        ("\0", "config.yaml"),
    ],
)
def test_a_faulty_config_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_config(["--config", str(tmp_path / "config.yaml")])
    with pytest.raises(UserError, match=message):
        parse_config(["--resume", str(tmp_path)])


def test_a_config_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00lr")
    for path in (tmp_path / "c.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            parse_config(["--config", str(path)])


def test_torchrun_lets_all_flags_pass() -> None:
    """torchrun's parser sees the script's flags first, and takes abbreviations for its own."""
    parser = get_args_parser()
    names = [*SETTINGS, "config"]
    for typed in [*map(flag, names), *(f"--{name}" for name in names)]:
        assert not [option for option in parser._option_string_actions if option.startswith(typed)]
        for arguments in ([typed, "1"], [f"{typed}=1"], [typed]):
            values = parser.parse_args(["--nproc_per_node=4", "train/main.py", *arguments])
            assert values.training_script_args == arguments
            assert values.nproc_per_node == "4"


def test_without_arguments_the_defaults_hold() -> None:
    assert parse_config([]) == TrainConfig()


@pytest.mark.parametrize("classes", ["", "17", "17,18"])
def test_detector_classes_stay_text_in_the_yaml_file(tmp_path: Path, classes: str) -> None:
    config = TrainConfig(subject_crop="detector", crop_detector="d.pt", crop_classes=classes)
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config
    flags = ["--subject-crop", "detector", "--crop-detector", "d.pt", f"--crop-classes={classes}"]
    assert parse_config(flags) == config


def test_a_recipe_is_found_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [parse_config(["--config", name]) for name in ("fine_tune", "train/recipes/fine_tune.yaml")]
    assert given[0] == given[1] == parse_config([f"--config={REPOSITORY}/train/recipes/fine_tune.yaml"])
    Path("fine_tune.yaml").write_text("lr: 0.5\n")
    assert parse_config(["--config", "fine_tune.yaml"]).lr == 0.5
    assert parse_config(["--config", "fine_tune"]) == given[0]
    for unknown in ("fine_tun", "other/fine_tune.yaml"):
        with pytest.raises(UserError, match=re.escape(unknown)) as raised:
            parse_config(["--config", unknown])
        assert "fine_tune, from_scratch" in str(raised.value)


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        (["--learning-rate", "0.1"], "--lr"),
        (["-b", "64"], "--batch-size"),
        (["lr=0.1"], "--lr"),
        (["--no-flip"], "--flip false"),
        (["--num_classes", "3"], ""),
    ],
)
def test_names_of_other_tools_lead_to_the_flag(typed: list[str], instead: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_config(typed)
    assert typed[0].split("=")[0].replace("_", "-") in str(raised.value).replace("_", "-")
    assert instead in str(raised.value)


RECIPES = sorted((REPOSITORY / "train" / "recipes").iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_configuration(recipe: Path) -> None:
    config = parse_config(["--config", str(recipe), "--data", "images"])
    assert config.data == "images"
    assert config.model != TrainConfig.model
