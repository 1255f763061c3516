"""Whole-pipeline claims: the README's commands do what it says."""

import csv
import os
import re
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL, TrainedRun, launch, torchrun
from forked import RankJob, run, train

from train.checkpoint import load_checkpoint

PHOTOGRAPHS = os.environ.get("PUREBRED_PHOTOGRAPHS", "")
photographs = pytest.mark.skipif(not PHOTOGRAPHS, reason="PUREBRED_PHOTOGRAPHS names no photographs")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


def test_three_commands_by_path_from_another_directory(tmp_path: Path) -> None:
    """Real torchrun, nothing installed, no data and no MLflow store: the sample set and the store are made.

    The modules are those next to the script that is started, whatever is installed.
    """
    copy, cwd = tmp_path / "copy", tmp_path / "elsewhere"
    cwd.mkdir()
    for package in ("train", "export", "serve"):
        shutil.copytree(REPOSITORY / package, copy / package)
    with (copy / "train" / "distributed.py").open("a") as file:
        file.write("\nprint('this is the copy')\n")
    (cwd / "config.yaml").write_text(
        "epochs: 1\nimage_size: 32\nmodel: simple_cnn\nprecision: fp32\nname: a\n"
    )
    printed = torchrun(2, "--config", "config.yaml", cwd=cwd, root=copy)
    assert printed.count("this is the copy") == 2
    assert (cwd / "data" / "sample" / "train" / "dog.0.jpg").is_file()
    with sqlite3.connect(cwd / "mlflow.db") as db:
        assert db.execute("select name, status from runs").fetchall() == [("a", "FINISHED")]

    launch(sys.executable, copy / "export" / "main.py", "--run", "runs/a", cwd=cwd)
    model, images = "runs/a/export/model.onnx", cwd / "data" / "sample" / "test"
    arguments = ["--model", model, "--images", images, "--output", "predictions.csv"]
    launch(sys.executable, copy / "serve" / "main.py", *arguments, cwd=cwd)
    rows = read_csv(cwd / "predictions.csv")
    assert [row["path"] for row in rows] == sorted(path.name for path in images.iterdir())
    assert all(row["error"] == "" for row in rows)
    # probabilities, not hard answers
    assert any(0 < float(row["probability_dog"]) < 1 for row in rows)


def test_run_directory_is_complete(trained: TrainedRun) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "bad_files.csv",
        "val_predictions.csv",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "figures/curves.png",
        "figures/confusion_matrix.png",
        "figures/worst_mistakes.png",
    ):
        assert (trained.folder / name).is_file(), name


def test_log_names_the_data_layout_and_the_sizes(trained: TrainedRun) -> None:
    assert "136 images: 'cat' 68, 'dog' 68" in trained.printed
    assert "2 processes" in trained.printed


def test_every_validation_image_has_one_prediction(trained: TrainedRun) -> None:
    rows = read_csv(trained.folder / "val_predictions.csv")
    assert len(rows) == len({row["path"] for row in rows}) == 24
    for row in rows:
        assert float(row["probability_cat"]) + float(row["probability_dog"]) == pytest.approx(1, abs=1e-6)


def test_several_processes_make_exactly_one_mlflow_run_with_all_its_parts(trained: TrainedRun) -> None:
    with sqlite3.connect(trained.cwd / "mlflow.db") as db:
        runs = db.execute("select run_uuid, name, status, artifact_uri from runs").fetchall()
        assert len(runs) == 1
        run_id, name, status, artifacts = runs[0]
        assert (name, status) == ("small", "FINISHED")
        params = dict(db.execute("select key, value from params").fetchall())
        assert params["model"] == "simple_cnn"
        assert params["world_size"] == "2"
        metrics = db.execute("select key, step from metrics").fetchall()
        for key in ("train/loss", "val/accuracy", "val/log_loss", "val/roc_auc", "lr", "images_per_second"):
            assert sorted(step for k, step in metrics if k == key) == [1, 2], key
        digests = [digest for (digest,) in db.execute("select digest from datasets").fetchall()]
        assert len(digests) == 2  # of the data set, and of its validation images
        assert params["data_digest"][:36] in digests
    folder = Path(artifacts.removeprefix("file://"))
    for artifact in ("best.pt", "config.yaml", "figures/curves.png", "val_predictions.csv"):
        assert (folder / artifact).is_file(), artifact
    assert load_checkpoint(trained.folder / "checkpoints" / "best.pt")["run_id"] == run_id


def test_subjects_are_found_in_training_export_and_serving(sample: Path, tmp_path: Path) -> None:
    """Two processes; the graph that serves cuts out what the trained network cut out."""
    settings = [*SMALL, "--image-size", 48, "--epochs", 2, "--subject-crop", "cam"]
    printed = train(
        2, "--data", sample / "train", *settings, "--track", "false", "--name", "cam", cwd=tmp_path
    )
    assert "subject crop by " in printed
    folder = tmp_path / "runs" / "cam"
    assert (folder / "figures" / "subject_crops.png").is_file()
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    assert best["preprocess"]["size"] == 72
    assert best["crops_subject"] == (best["history"]["best_epoch"] > 1)

    printed = run("export/main.py", "--run", folder, cwd=tmp_path)
    assert "same class          100.00%" in printed
    model, output = folder / "export" / "model.onnx", tmp_path / "predictions.csv"
    run("serve/main.py", "--model", model, "--images", sample / "train", "--output", output, cwd=tmp_path)
    served = {row["path"]: float(row["probability_dog"]) for row in read_csv(output)}
    for row in read_csv(folder / "val_predictions.csv"):
        assert served[row["path"]] == pytest.approx(float(row["probability_dog"]), abs=1e-3)


NO_BATCH_NORM = [
    *("--model", "squeezenet1_1", "--dropout", 0, "--image-size", 32, "--batch-size", 32),
    *("--precision", "fp32", "--deterministic", "--mixup", 0.2, "--ema", 0, "--epochs", 1),
    *("--track", "false", "--optimizer", "sgd", "--lr", 0.02),
]


def test_the_number_of_processes_does_not_change_the_run(sample: Path, tmp_path: Path) -> None:
    """Same global batch, model without batch norm: same validation set, same weights up to rounding."""
    for count in (1, 4):
        train(count, "--data", sample / "train", *NO_BATCH_NORM, "--name", f"n{count}", cwd=tmp_path)
    one, four = (tmp_path / "runs" / f"n{count}" for count in (1, 4))
    weights = weights_of(four)
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    validated = [[row["path"] for row in read_csv(run / "val_predictions.csv")] for run in (one, four)]
    assert validated[0] == validated[1]


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    trained: TrainedRun, sample: Path, empty_store: Path, tmp_path: Path
) -> None:
    """2 epochs, a stop, 2 more = 4 epochs: weights, average, optimizer, metrics; one MLflow run.

    Training images grow during the run, the last epoch is one of re-tuning at a larger size, the second one
    is not validated, the first layers are frozen and the others have their own learning rates.
    """
    settings = ["--data", sample / "train", *SMALL, "--deterministic", "--cutmix", 1.0, "--epochs", 3]
    settings += ["--start-size", 16, "--eval-size", 40, "--retune-epochs", 1, "--flip-tta"]
    settings += ["--val-interval", 2, "--dropout", 0.2]
    settings += [
        "--weights",
        trained.folder / "checkpoints" / "best.pt",
        "--freeze",
        1,
        "--layer-decay",
        0.7,
    ]
    train(2, *settings, "--name", "whole", "--track", "false", cwd=tmp_path)
    shutil.copy(empty_store, tmp_path)
    train(2, *settings, "--name", "parts", "--stop-after", 2, cwd=tmp_path)
    train(2, "--resume", "runs/parts", "--stop-after", 0, cwd=tmp_path)
    whole, parts = (
        load_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last.pt") for name in ("whole", "parts")
    )
    assert whole["epoch"] == parts["epoch"] == 4
    for part in ("model", "ema"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, parts[part][name]), f"{part} {name}"
    for index, moments in whole["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, parts["optimizer"]["state"][index][name]), name
    assert whole["history"] == parts["history"]
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("select name, status from runs").fetchall() == [("parts", "FINISHED")]
        steps = db.execute("select step from metrics where key = 'val/accuracy' order by step").fetchall()
        assert sorted(set(steps)) == [(1,), (3,), (4,)]


def test_a_checkpoint_is_fine_tuned_by_two_processes(
    trained: TrainedRun, sample: Path, tmp_path: Path
) -> None:
    """Frozen layers stay bit for bit; the input is the checkpoint's."""
    weights = trained.folder / "checkpoints" / "best.pt"
    settings = ["--data", sample / "train", "--model", "simple_cnn", "--weights", weights, "--freeze", 3]
    settings += ["--layer-decay", 0.7, "--batch-size", 32, "--epochs", 2, "--track", "false"]
    printed = train(2, *settings, "--name", "tuned", cwd=tmp_path)
    assert f"({weights}): image_size 32, " in printed
    assert "head kept" in printed
    told = [line for line in printed.splitlines() if "arning" in line]
    assert all("--batch-size" in line or "val/f1_macro" in line for line in told)
    assert re.search(r"frozen: [\d,]+ of [\d,]+ .*features\.9\.bias", printed)
    tuned = load_checkpoint(tmp_path / "runs" / "tuned" / "checkpoints" / "last.pt")
    start = load_checkpoint(weights)["ema"]
    for part in ("model", "ema"):
        for name, tensor in tuned[part].items():
            layer = name.removeprefix("network.features.").split(".")[0]
            if layer.isdigit() and int(layer) < 12:
                assert torch.equal(tensor, start[name]), f"{part} {name} was frozen"
    learnt = "network.features.12.weight"
    assert not torch.equal(tuned["model"][learnt], start[learnt])
    for name, value in {"image_size": 32, "resize_size": 37, "interpolation": "bilinear"}.items():
        assert tuned["config"][name] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "99"], "--freeze 99 "),
        (["--data", "nowhere"], "--data 'nowhere' "),
    ],
)
def test_bad_settings_are_one_clear_line_and_no_rank_waits(
    arguments: list[str], message: str, sample: Path, tmp_path: Path
) -> None:
    data = [] if "--data" in arguments else ["--data", sample / "train"]
    printed = train(2, *data, "--track", "false", *arguments, cwd=tmp_path, code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.slow
def test_with_no_arguments_it_trains_on_data_train(sample: Path, empty_store: Path, tmp_path: Path) -> None:
    """The README's command, as it stands."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for path in (sample / "train").glob("*.[12]?.jpg"):
        shutil.copy(path, folder)
    shutil.copy(empty_store, tmp_path)
    with RankJob(tmp_path) as job:
        job.wait_for_text("epoch 1/15: ")  # one of fifteen epochs shows it
    assert "data/train: 40 images" in job.printed()
    assert len(list((tmp_path / "runs").glob("*-resnet18/metrics.jsonl"))) == 1


@photographs
def test_photographs_of_any_size_are_scored(exported: TrainedRun, tmp_path: Path) -> None:
    images, model = Path(PHOTOGRAPHS) / "kaggle" / "test1", exported.folder / "export" / "model.onnx"
    ids = list(range(1, 501))
    (tmp_path / "sampleSubmission.csv").write_text("id,label\n" + "".join(f"{i},0\n" for i in ids))
    scoring = ["--model", model, "--images", images, "--output", tmp_path / "p.csv"]
    scoring += ["--sample-submission", "sampleSubmission.csv", "--submission-values", "probability"]
    run("serve/main.py", *scoring, cwd=tmp_path)
    rows = read_csv(tmp_path / "p.csv")
    assert [int(row["id"]) for row in rows] == ids
    assert all(0 < float(row["label"]) < 1 for row in rows)


@pytest.mark.slow
@photographs
def test_photographs_are_learnt_and_exported(tmp_path: Path) -> None:
    """Four short epochs on a part of them are enough for above 70 % on images never seen."""
    data = Path(PHOTOGRAPHS)
    files = sorted((data / "kaggle" / "train").iterdir())[::5]
    rows = "".join(f"{path},{path.name.partition('.')[0]}\n" for path in files)
    (tmp_path / "part.csv").write_text(f"path,label\n{rows}")
    arguments = ["--model", "simple_cnn", "--image-size", 48, "--epochs", 4, "--ema", 0.98]
    arguments += ["--batch-size", 32, "--optimizer", "muon", "--lr", 0.01, "--val-interval", 4]
    train(2, "--data", tmp_path / "part.csv", *arguments, "--name", "photographs", cwd=tmp_path)
    folder = tmp_path / "runs" / "photographs"
    run("export/main.py", "--run", folder, cwd=tmp_path)
    predictions = read_csv(folder / "val_predictions.csv")
    assert len(predictions) == len(files) * 0.15
    assert sum(int(row["correct"]) for row in predictions) / len(predictions) > 0.7
