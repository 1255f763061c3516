"""A served model is evaluated on labelled images, and the numbers are those of export and scikit-learn."""

import csv
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import sklearn.metrics
from conftest import TrainedRun, code_of
from mlflow_store import runs
from serve_model import CLASS_NAMES, broken_files, build_model, colour_of, encode, solid

from export.publish import track
from pipelines.evaluate import main
from pipelines.evaluation_report import FILES
from serve.contract import confidence
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_model(tmp_path / "model.onnx")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """60 images in a folder for each class; every seventh has another class's label."""
    for number in range(60):
        name = CLASS_NAMES[(number + (number % 7 == 0)) % 3]
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{number}.png").write_bytes(encode(solid(colour_of(number)), "PNG"))
    return tmp_path / "data"


def evaluate(model: Path, data: Path, *arguments: object, code: int = 0) -> Path:
    output = data.parent / "evaluation"
    command = ["--model", model, "--data", data, "--output", output, "--no-track", *arguments]
    assert code_of(main, *command) == code
    return output


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def check_against_sklearn(output: Path) -> None:
    """Compare evaluation.json and per_class.csv with what predictions.csv gives."""
    table = read_table(output / "predictions.csv")
    metrics = json.loads((output / "evaluation.json").read_text())["metrics"]
    columns = [column for column in table[0] if column.startswith("probability_")]
    names = [column.removeprefix("probability_") for column in columns]
    probabilities = np.array([[float(row[column]) for column in columns] for row in table])
    labels, predicted = (
        np.array([names.index(row[column]) for row in table]) for column in ("label", "prediction")
    )
    sure = probabilities.max(axis=1)
    precision, recall, f1, images = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), zero_division=0.0
    )
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "log_loss": sklearn.metrics.log_loss(labels, probabilities, labels=range(len(names))),
        "f1_macro": sklearn.metrics.f1_score(labels, predicted, average="macro"),
    }
    if len(set(labels)) == len(names):
        scores = probabilities[:, 1] if len(names) == 2 else probabilities
        expected["roc_auc"] = sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr")
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs(((labels == predicted) - sure)[bins == b].sum()) for b in range(15)]
    expected["ece"] = sum(gaps) / len(sure)
    assert {name: interval["value"] for name, interval in metrics.items()} == pytest.approx(
        expected, abs=1e-6
    )
    for interval in metrics.values():
        if interval["low"] is not None:
            assert interval["low"] <= interval["value"] <= interval["high"]
    rows = {row["class"]: row for row in read_table(output / "per_class.csv")}
    for name, *values in zip(names, precision, recall, f1, images, strict=True):
        numbers = [float(rows[name][key] or 0) for key in ("precision", "recall", "f1", "images")]
        assert numbers == pytest.approx(values)


def test_the_validation_set_gives_the_numbers_of_verification(
    exported: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(confidence, "MIN_IMAGES", 1)
    validation = tmp_path / "validation.csv"
    with validation.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for row in read_table(exported.folder / "val_predictions.csv"):
            writer.writerow([exported.sample / "train" / row["path"], row["label"]])
    output = evaluate(exported.folder / "export" / "model.onnx", validation)
    verification = json.loads((exported.folder / "export" / "verification.json").read_text())
    found = json.loads((output / "evaluation.json").read_text())
    assert found["num_images"] == found["num_scored"] == verification["num_images"]
    assert found["metrics"]["accuracy"]["value"] == verification["accuracy_served"]
    assert found["metrics"]["log_loss"]["value"] == pytest.approx(verification["log_loss_served"], rel=1e-5)
    assert found["model_sha256"] == verification["model_sha256"]
    estimate = found["estimated_accuracy"]
    assert estimate["accuracy"] == pytest.approx(verification["accuracy_served"], abs=1e-6)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert f"{estimate['low']:.4f} to {estimate['high']:.4f}" in page
    assert f" {100 * found['threshold']['probability']:.2f} %" in page
    check_against_sklearn(output)


def test_any_number_of_classes_agrees_with_sklearn(model: Path, labelled: Path) -> None:
    output = evaluate(model, labelled)
    check_against_sklearn(output)
    found = json.loads((output / "evaluation.json").read_text())
    assert found["metrics"]["accuracy"]["value"] == 1 - 9 / 60
    assert found["estimated_accuracy"] is None
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    for path in (labelled / "blue").iterdir():  # a class of the model without images
        path.unlink()
    (labelled / "blue").rmdir()
    check_against_sklearn(evaluate(model, labelled))


def test_of_a_label_file_with_parts_those_held_out_are_evaluated(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(str(path.relative_to(labelled)) for path in labelled.rglob("*.png"))
    rows = [
        f"{Path(path).stem},{Path(path).parent},{i // 2 % 2},{('train', 'val')[i % 3 == 0]}"
        for i, path in enumerate(paths)
    ]
    (labelled / "labels.csv").write_text("\n".join(["id,kind,light,split", *rows]))
    evaluate(model, labelled / "labels.csv", code=2)
    assert "--columns id,kind" in capsys.readouterr().err
    output = evaluate(model, labelled / "labels.csv", "--columns", "id,kind")
    assert {row["path"] for row in read_table(output / "predictions.csv")} == set(paths[::3])


def test_labels_are_read_as_those_of_images_that_were_held_out(model: Path, tmp_path: Path) -> None:
    """Names that training images have too, rows of the part test alone, and numbers of two of the three
    classes that a file names."""
    data = tmp_path / "data"
    for part, shift in (("train", 1), ("val", 0)):
        (data / part).mkdir(parents=True)
        for number in range(6):
            colour = colour_of(number % 2 + shift)
            (data / part / f"{number}.png").write_bytes(encode(solid(colour), "PNG"))
    (data / "classes.json").write_text(json.dumps(dict(enumerate(CLASS_NAMES))))
    rows = [f"{number}.png,{number % 2},test" for number in range(6)]
    (data / "labels.csv").write_text("\n".join(["image,label,split", *rows]))
    output = evaluate(model, data / "labels.csv")
    table = read_table(output / "predictions.csv")
    assert [row["path"] for row in table] == [f"val/{number}.png" for number in range(6)]
    assert {row["correct"] for row in table} == {"1"}


def test_of_a_folder_of_parts_the_flag_for_one_that_was_held_out_is_named(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = labelled.parent / "whole"
    shutil.copytree(labelled, whole / "train")
    shutil.copytree(labelled, whole / "val")
    evaluate(model, whole, code=2)
    error = capsys.readouterr().err
    assert f"--data {whole / 'val'}" in error
    assert "--val-data" not in error


@pytest.mark.parametrize(("least", "code"), [(0.85, 0), (0.851, 4)])
def test_the_exit_code_compares_accuracy_with_the_least(
    model: Path, labelled: Path, least: float, code: int
) -> None:
    output = evaluate(model, labelled, "--min-accuracy", least, code=code)
    found = json.loads((output / "evaluation.json").read_text())
    assert found["passed"] == (code == 0)


def test_unreadable_images_are_listed_and_in_no_metric(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (data, _) in broken_files().items():
        (labelled / "red" / name).write_bytes(data)
    count = len(broken_files())
    evaluate(model, labelled, code=2)
    assert "--max-bad" in capsys.readouterr().err
    output = evaluate(model, labelled, "--max-bad", 0.2)
    found = json.loads((output / "evaluation.json").read_text())
    assert (found["num_scored"], found["num_errors"], found["num_images"]) == (60, count, 60 + count)
    assert found["metrics"]["accuracy"]["value"] == 51 / 60
    assert found["accuracy_errors_wrong"] == pytest.approx(51 / (60 + count))
    assert {Path(row["path"]).name for row in read_table(output / "bad_files.csv")} == set(broken_files())


def test_the_limit_of_pixels_is_a_flag_as_in_training(model: Path, labelled: Path) -> None:
    (labelled / "red" / "large.png").write_bytes(encode(solid((255, 0, 0)).resize((1100, 1000)), "PNG"))
    counts = []
    for flags in ((), ("--max-megapixels", 1, "--max-bad", 0.5)):
        output = evaluate(model, labelled, *flags)
        counts.append(json.loads((output / "evaluation.json").read_text())["num_errors"])
    assert counts == [0, 1]


def test_classes_that_the_model_does_not_know_are_named_or_ignored(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (labelled / "violet").mkdir()
    (labelled / "violet" / "1.png").write_bytes(encode(solid((200, 0, 200)), "PNG"))
    evaluate(model, labelled, code=2)
    error = capsys.readouterr().err
    assert "'violet'" in error
    assert "--ignore-unknown" in error
    output = evaluate(model, labelled, "--ignore-unknown")
    found = json.loads((output / "evaluation.json").read_text())
    assert (found["num_ignored"], found["num_scored"]) == (1, 60)
    only = labelled.parent / "only"
    (labelled / "violet").rename(only)
    (only / "x").mkdir()
    for name in ("Red", "x"):
        (only / name).mkdir(exist_ok=True)
        (only / name / "1.png").write_bytes(encode(solid((200, 0, 200)), "PNG"))
    (only / "1.png").unlink()
    evaluate(model, only, code=2)
    assert "'Red' is probably 'red'" in capsys.readouterr().err
    evaluate(model, only, "--ignore-unknown", code=2)


@pytest.mark.parametrize(
    "arguments", [["--min-accuracy", 1.5], ["--max-bad", -1], ["--provider", "openvino"]], ids=str
)
def test_unusable_arguments_have_exit_code_2(model: Path, labelled: Path, arguments: list[object]) -> None:
    evaluate(model, labelled, *arguments, code=2)


def test_a_file_of_another_origin_is_not_replaced(model: Path, labelled: Path) -> None:
    output = evaluate(model, labelled)
    evaluate(model, labelled)
    (output / "predictions.csv").write_text("mine\n")
    evaluate(model, labelled, code=2)
    assert (output / "predictions.csv").read_text() == "mine\n"
    evaluate(model, labelled, "--overwrite")


def test_mlflow_has_the_evaluation_below_the_training_run_and_on_the_logged_model(
    published: Path, exported: TrainedRun, tmp_path: Path
) -> None:
    data, output = exported.sample / "train", tmp_path / "evaluation"
    model = published / "export" / "model.onnx"
    track(ModelMetadata.read(model), published)
    command = ["--model", str(model), "--data", str(data), "--output", str(output)]
    assert main(command) == 0
    client = mlflow.MlflowClient()
    found = {run.data.tags.get("purebred.kind", "training"): run for run in runs(mlflow.get_tracking_uri())}
    trained, evaluated = found["training"], found["evaluation"]
    assert evaluated.info.status == "FINISHED"
    assert evaluated.info.experiment_id == trained.info.experiment_id
    assert evaluated.data.tags["mlflow.parentRunId"] == trained.info.run_id
    summary = json.loads((output / "evaluation.json").read_text())
    accuracy = summary["metrics"]["accuracy"]["value"]
    assert evaluated.data.metrics["evaluation/accuracy"] == accuracy
    assert evaluated.data.params["model_sha256"] == file_sha256(model)
    (given,) = evaluated.inputs.dataset_inputs
    assert given.dataset.digest == summary["data_digest"][:36]
    assert {file.path for file in client.list_artifacts(evaluated.info.run_id)} == set(FILES)
    (model_input,) = client.get_run(evaluated.info.run_id).inputs.model_inputs
    logged = client.get_logged_model(model_input.model_id)
    (metric,) = [metric for metric in logged.metrics if metric.key == "evaluation/accuracy"]
    assert (metric.value, metric.dataset_digest) == (accuracy, given.dataset.digest)


def test_a_store_that_does_not_answer_costs_a_warning(
    model: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    evaluate(model, labelled, "--track")
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_an_evaluation_whose_files_mlflow_does_not_take_has_failed_and_has_its_metrics(
    model: Path,
    labelled: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def away(*_: object) -> None:
        raise OSError("the artifact store does not answer")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", away)
    evaluate(model, labelled, "--track")
    assert "the artifact store does not answer" in capsys.readouterr().err
    (run,) = runs(store)
    assert run.info.status == "FAILED"
    assert run.data.metrics["evaluation/accuracy"] == 51 / 60
