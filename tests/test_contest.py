"""A contest from its files to its submission, in the form of dog-breed: 120 classes, ids without suffix."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from forked import run, train
from PIL import Image

from serve.contract.metadata import ModelMetadata

NUM_CLASSES, EACH = 120, 5  # images of a class
SETTINGS = ["--model", "simple_cnn", "--image-size", 16, "--batch-size", 32, "--epochs", 1]
SETTINGS += ["--precision", "fp32", "--track", "false"]


def draw(path: Path, number: int, seed: int) -> None:
    """Two halves, whose colours are the class's."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(number).integers(0, 256, (2, 1, 1, 3))
    halves = np.concatenate([np.broadcast_to(colour, (9, 18, 3)) for colour in colours])
    Image.fromarray((halves + rng.integers(-20, 21, halves.shape)).clip(0, 255).astype(np.uint8)).save(path)


def make_contest(root: Path, num_test: int = 40) -> None:
    """Draw train/ID.png with labels.csv, test/ID.png and sample_submission.csv."""
    rng = np.random.default_rng(7)
    breeds = [f"breed_{chr(97 + i % 26)}-{i}" for i in range(NUM_CLASSES)]
    ids = [f"{int(number):032x}" for number in rng.permutation(10**6)[: NUM_CLASSES * EACH + num_test]]
    for part in ("train", "test"):
        (root / part).mkdir()
    with (root / "labels.csv").open("w", newline="") as file:
        labels = csv.writer(file)
        labels.writerow(["id", "breed"])
        for i in range(NUM_CLASSES * EACH):
            draw(root / "train" / f"{ids[i]}.png", i % NUM_CLASSES, i)
            labels.writerow([ids[i], breeds[i % NUM_CLASSES]])
    with (root / "sample_submission.csv").open("w", newline="") as file:
        sample = csv.writer(file)  # ends lines as Windows does, and Kaggle
        sample.writerow(["id", *sorted(breeds)])
        for i, name in enumerate(ids[-num_test:]):
            draw(root / "test" / f"{name}.png", i % NUM_CLASSES, 10**6 + i)
            sample.writerow([name, *[str(1 / NUM_CLASSES)] * NUM_CLASSES])


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_submission_equals_its_sample_but_for_the_probabilities(tmp_path: Path) -> None:
    make_contest(tmp_path)
    printed = train(1, "--data", "labels.csv", *SETTINGS, "--name", "dogs", cwd=tmp_path)
    folder = tmp_path / "runs" / "dogs"
    assert "120 classes, 4 in each" in printed
    (epoch,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert epoch["val/accuracy"] <= epoch["val/top5_accuracy"] <= 1
    assert f"{epoch['val/top5_accuracy']:.4f}" in printed
    assert len(rows_of(folder / "per_class.csv")) == 1 + NUM_CLASSES
    assert {path.name for path in (folder / "figures").iterdir()} == {"curves.png", "worst_mistakes.png"}
    assert (folder / "confusion_pairs.csv").is_file()
    assert "confusion_pairs.csv" in printed

    run("export/main.py", "--run", "runs/dogs", cwd=tmp_path)
    model = folder / "export" / "model.onnx"
    assert ModelMetadata.read(model).metrics["val/top5_accuracy"] == epoch["val/top5_accuracy"]
    sample = rows_of(tmp_path / "sample_submission.csv")
    broken = sample[3][0]
    (tmp_path / "test" / f"{broken}.png").write_bytes(b"no image")
    scoring = ("--model", model, "--images", "test", "--output")
    run("serve/main.py", *scoring, "predictions.csv", cwd=tmp_path)
    printed = run(
        "serve/main.py",
        *(*scoring, "submission.csv", "--sample-submission", "sample_submission.csv"),
        cwd=tmp_path,
    )
    submission = rows_of(tmp_path / "submission.csv")
    assert submission[0] == sample[0]
    assert [row[0] for row in submission] == [row[0] for row in sample]
    assert (tmp_path / "submission.csv").read_bytes().count(b"\r\n") == len(sample)
    assert broken in printed
    header, *scored = rows_of(tmp_path / "predictions.csv")
    columns = [header.index(f"probability_{name}") for name in sample[0][1:]]
    expected = {Path(row[0]).stem: [row[column] for column in columns] for row in scored}
    expected[broken] = [str(np.float32(1 / NUM_CLASSES))] * NUM_CLASSES
    for row in submission[1:]:
        assert np.allclose(np.array(row[1:], float), np.array(expected[row[0]], float), atol=1e-5)
        assert sum(map(float, row[1:])) == pytest.approx(1, abs=1e-4)
