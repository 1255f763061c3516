"""The validation images of a run that was trained on another machine, from an object store."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from train_data import flat_set

from export.validation_images import ValidationImages
from train.data.download import copy
from train.evaluation.predictions import StoredAnswers


@pytest.mark.parametrize("given", ["pets", "pets/val"])
def test_they_are_found_below_the_url_that_was_trained_on_and_in_a_folder_of_their_own(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flat_set(tmp_path / "pets" / "train", 2)
    flat_set(tmp_path / "pets" / "val", 1)
    url = f"file://{tmp_path}"
    there = copy(f"{url}/pets", tmp_path / "another machine", True, print)
    checkpoint = {"val_root": str(there / "val")}
    shutil.rmtree(there.parent)
    StoredAnswers(["cat.0.png"], np.array([0]), ("cat", "dog"), np.zeros((1, 2))).save(tmp_path)

    images = ValidationImages.of_run(tmp_path, checkpoint, f"{url}/{given}")
    assert images.root.is_relative_to(tmp_path / "cache")
    expected = (tmp_path / "pets" / "val" / "cat.0.png").read_bytes()
    assert (images.root / images.paths[0]).read_bytes() == expected
    assert (images.labels, images.is_whole_set) == (["cat"], True)
