"""The comparison has the figures of the runs' files, and an exit code for runs that cannot be compared."""

import csv
import json
import math
import re
from pathlib import Path

import matplotlib.image
import pytest
from run_folders import make_run
from scipy.stats import binomtest
from sklearn.metrics import log_loss, roc_auc_score

from train import compare
from train.runs import results


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows() -> list[dict[str, str]]:
    with open("comparison/comparison.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def floats(row: dict[str, str], *names: str) -> list[float]:
    return [float(row[name]) for name in names]


def test_two_runs_in_figures(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("a"), seed=0, n=400)
    make_run(Path("b"), seed=1, n=400, skill=3.0, lr=0.01)
    assert compare.main(["a", "b"]) == 0
    a, b = rows()
    with open("b/val_predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    labels = [int(row["label"] == "class1") for row in table]
    probabilities = [float(row["probability_class1"]) for row in table]
    hits = sum(int(row["correct"]) for row in table)
    wilson = binomtest(hits, 400).proportion_ci(0.95, "wilson")
    assert floats(b, "accuracy", "accuracy_low", "accuracy_high") == [hits / 400, wilson.low, wilson.high]
    assert float(b["log_loss"]) == pytest.approx(log_loss(labels, probabilities), abs=1e-5)
    assert float(b["roc_auc"]) == pytest.approx(roc_auc_score(labels, probabilities))
    with open("a/val_predictions.csv", newline="") as file:
        reference = [int(row["correct"]) for row in csv.DictReader(file)]
    pairs = list(zip((int(row["correct"]) for row in table), reference, strict=True))
    gained, lost = pairs.count((1, 0)), pairs.count((0, 1))
    assert floats(b, "shared_images", "gained", "lost") == [400, gained, lost]
    assert float(b["mcnemar_p"]) == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert float(b["accuracy_difference"]) == pytest.approx(float(b["accuracy"]) - float(a["accuracy"]))
    assert float(b["log_loss_difference"]) == pytest.approx(float(b["log_loss"]) - float(a["log_loss"]))
    assert float(b["log_loss"]) == pytest.approx(sum(float(row["loss"]) for row in table) / 400)
    assert a["mcnemar_p"] == ""
    assert (a["setting_lr"], b["setting_lr"]) == ("0.001", "0.01")
    assert "setting_epochs" not in a

    text = Path("comparison/comparison.md").read_text()
    printed = capsys.readouterr().out
    assert text.startswith("# Comparison of 2 runs")
    cell = f"{hits / 400:.4f} [{wilson.low:.4f}, {wilson.high:.4f}]"
    assert cell in text
    assert cell in printed
    assert "| lr " in text
    height, width, _ = matplotlib.image.imread("comparison/curves.png").shape
    assert 1000 < width < 4 * height


def test_p_values_of_several_runs_are_corrected() -> None:
    for i, skill in enumerate((1.5, 1.9, 1.0)):
        make_run(Path(f"r{i}"), seed=i, n=300, skill=skill)
    compare.main(["r0", "r1", "r2"])
    _, one, two = rows()
    p = sorted([float(one["mcnemar_p"]), float(two["mcnemar_p"])])
    corrected = sorted([float(one["mcnemar_p_holm"]), float(two["mcnemar_p_holm"])])
    assert corrected == pytest.approx([min(1, 2 * p[0]), max(2 * p[0], p[1])])


def test_other_validation_images_are_counted_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("a"), n=40)
    make_run(Path("b"), n=50, first=20)
    make_run(Path("c"), n=15, seed=1)
    assert compare.main(["a", "b", "c"]) == 0
    assert [row["shared_images"] for row in rows()] == ["", "20", "15"]
    assert [row["num_images"] for row in rows()] == ["40", "50", "15"]
    printed = capsys.readouterr().out
    for name, shared, count in (("b", 20, 50), ("c", 15, 15)):
        assert re.search(rf"Note: {name} .*\b{shared}\b.*\b{count}\b.*\b40 of a\b", printed)


def test_no_shared_image_is_an_error_after_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("a"), n=40)
    make_run(Path("b"), first=40)
    make_run(Path("c"), n=40, seed=1)
    assert compare.main(["a", "b", "c"]) == 2
    printed = capsys.readouterr()
    assert re.search(r"^error: .* a: b$", printed.err, re.M)
    assert [row["mcnemar_p"] == "" for row in rows()] == [True, True, False]
    assert "| b " in printed.out
    assert Path("comparison/curves.png").is_file()


@pytest.mark.parametrize("name", ["data", "val_data"])
def test_different_data_is_a_warning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("a"), **{name: "photographs"})
    make_run(Path("b"), **{name: "drawings"})
    compare.main(["a", "b"])
    assert f"--{name.replace('_', '-')} " in capsys.readouterr().out


def test_one_run_has_a_table_and_no_test() -> None:
    make_run(Path("a"))
    assert compare.main(["a", "--output", "x/y"]) == 0
    text = Path("x/y/comparison.md").read_text()
    assert "| a " in text
    assert "Against" not in text


def test_very_many_classes_have_an_auc_without_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(Path("a"), n=300, names=("class0", "class1", "class2"))
    assert compare.main(["a"]) == 0
    (row,) = rows()
    assert 0.5 < float(row["roc_auc_low"]) < float(row["roc_auc"]) < float(row["roc_auc_high"]) < 1
    monkeypatch.setattr(results, "MOST_AUC_CLASSES", 2)
    assert compare.main(["a"]) == 0
    (row,) = rows()
    assert 0.5 < float(row["roc_auc"]) < 1
    assert math.isnan(float(row["roc_auc_low"]))
    assert "(no interval)" in Path("comparison/comparison.md").read_text()


def test_runs_of_one_name_are_distinguished_by_their_paths() -> None:
    make_run(Path("x/same"))
    make_run(Path("y/same"), seed=1)
    assert compare.main(["x/same", "y/same"]) == 0
    assert [row["run"] for row in rows()] == ["x/same", "y/same"]


def test_a_name_that_is_markup_stays_a_name() -> None:
    make_run(Path("a|b $x$"))
    assert compare.main(["a|b $x$"]) == 0
    assert "| a\\|b $x$ |" in Path("comparison/comparison.md").read_text()


def test_a_run_of_settings_that_are_not_known_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with (make_run(Path("a")) / "config.yaml").open("a") as file:
        file.write("new_one: 3\n")
    assert compare.main(["a"]) == 2
    assert re.search(r"a/config\.yaml .*new", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "none"], "'none'"),
        (["a", "./a"], "'a'"),
        (["a", "damaged"], "damaged/metrics.jsonl"),
    ],
)
def test_an_unusable_run_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("a"))
    (make_run(Path("damaged")) / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + "\n")
    assert compare.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("name", ["comparison.md", "comparison.csv", "curves.png"])
def test_a_file_of_the_users_is_not_replaced_and_a_comparison_is(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("a"))
    Path("notes").mkdir()
    Path("notes", name).write_text("mine")
    assert compare.main(["a", "--output", "notes"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.read_text() for path in Path("notes").iterdir()] == ["mine"]
    assert compare.main(["a", "--output", "notes", "--overwrite"]) == 0
    assert compare.main(["a", "--output", "notes"]) == 0


@pytest.mark.parametrize(("num_classes", "shown"), [(9, False), (12, True)])
def test_top5_accuracy_is_compared_from_ten_classes_on(
    num_classes: int, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tuple(f"class{i}" for i in range(num_classes))
    for seed, name in enumerate("ab"):
        make_run(Path(name), seed=seed, n=120, skill=0.2, names=names)
    assert compare.main(["a", "b"]) == 0
    assert ("top-5 accuracy" in capsys.readouterr().out) == shown
    for row in rows():
        values = floats(row, "top5_accuracy", "accuracy") if shown else [1.0, 0.0]
        assert (row["top5_accuracy"] == "") != shown
        assert values[0] > values[1]
