"""Predictions of K folds are joined only if they are K folds of the same data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.folds import read_folds
from train.checkpoint import load_checkpoint, save_checkpoint
from train.evaluation.predictions import StoredAnswers

NAMES = ("cat", "dog")


def fold_run(root: Path, fold: int, paths: list[str], logits: list[list[float]] | None = None) -> Path:
    """Write what read_folds reads of a run directory; paths begin with the label."""
    run = root / f"fold{fold}"
    labels = np.array([NAMES.index(path.split(".")[0]) for path in paths])
    values = np.array(logits) if logits else 2.0 * np.eye(2)[labels]
    (run / "checkpoints").mkdir(parents=True)
    StoredAnswers(paths, labels, NAMES, values).save(run)
    state = {
        "config": {"folds": 3, "fold": fold, "seed": 0},
        "content_digest": "a" * 64,
        "class_names": list(NAMES),
        "val_root": str(root),
    }
    save_checkpoint(state, run / "checkpoints" / "best.pt")
    return run


def edit(run: Path, **changes: Any) -> None:
    path = run / "checkpoints" / "best.pt"
    state = load_checkpoint(path)
    state["config"] |= {k: v for k, v in changes.items() if k in state["config"]}
    save_checkpoint({**state, **{k: v for k, v in changes.items() if k not in state["config"]}}, path)


def three(root: Path) -> list[Path]:
    return [fold_run(root, k, [f"cat.{k}.jpg", f"dog.{k}.jpg", f"dog.{k + 3}.jpg"]) for k in (1, 2, 3)]


def test_every_image_has_the_prediction_of_its_own_fold(tmp_path: Path) -> None:
    runs = three(tmp_path)
    data = read_folds(runs[::-1])
    assert len(data.paths) == len(set(data.paths)) == 9
    assert data.folds.tolist() == [3] * 3 + [2] * 3 + [1] * 3
    assert [NAMES[label] for label in data.labels] == [path[:3] for path in data.paths]
    np.testing.assert_allclose(data.probabilities.sum(axis=1), 1)
    assert (data.accuracy, data.missing, data.num_folds, data.root) == (1.0, [], 3, tmp_path)


def test_missing_folds_are_known(tmp_path: Path) -> None:
    assert read_folds([three(tmp_path)[1]]).missing == [1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"fold2 .*fold1 .*--seed 1 .*0"),
        ({"folds": 5}, r"fold2 .*fold1 .*--folds 5 .*3"),
        ({"content_digest": "b" * 64}, r"fold2 .*fold1 .*'bbbbbbbbbbbb' .*'aaaaaaaaaaaa'"),
        ({"class_names": ["cat", "wolf"]}, r"fold2/val_predictions.npz .*best.pt"),
        ({"fold": 1}, r"fold1 .*fold2 .*fold 1"),
        ({"fold": 0, "folds": 0}, r"fold2 .*--folds"),
    ],
)
def test_what_is_not_a_fold_of_the_same_data_is_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    runs = three(tmp_path)
    edit(runs[1], **changes)
    with pytest.raises(ValueError, match=message):
        read_folds(runs)


def test_an_image_in_two_folds_is_an_error_that_names_it(tmp_path: Path) -> None:
    runs = [fold_run(tmp_path, k, ["cat.0.jpg", f"dog.{k}.jpg"]) for k in (1, 2)]
    with pytest.raises(ValueError, match=r"'cat.0.jpg' .*fold1 .*fold2"):
        read_folds(runs)


def test_a_run_without_its_files_is_an_error_that_names_them(tmp_path: Path) -> None:
    runs = three(tmp_path)
    (runs[2] / "val_predictions.npz").unlink()
    with pytest.raises(ValueError, match=r"fold3/val_predictions.npz"):
        read_folds(runs)
    with pytest.raises(ValueError, match=r"nowhere/checkpoints/best.pt"):
        read_folds([tmp_path / "nowhere"])
