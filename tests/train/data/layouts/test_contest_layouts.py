"""Label files of contests, hubs and tools are read as they are, and trained on."""

import math
from pathlib import Path

import pytest
from contest_layouts import COLUMNS, LAYOUTS
from train_data import make_run, settings, train_epochs

from train.data.index import prepare_data
from train.data.layouts.label_file import read
from train.data.layouts.registry import find_labels
from train.models.build import build_model


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_read_as_it_is_and_trained_on(tmp_path: Path, name: str) -> None:
    source, labels = LAYOUTS[name](tmp_path / name)
    columns = COLUMNS.get(name, "")
    assert find_labels(source, "auto", columns=columns).labels == labels
    config = settings(tmp_path, data=str(source), columns=columns, epochs=1, val_fraction=0.3)
    data = prepare_data(config)
    assert set(data.train.class_names) == set(labels.values())
    assert not data.bad
    run = make_run(config, data, build_model("simple_cnn", len(data.train.class_names), 16)[0])
    (metrics,) = train_epochs(run, 0)
    assert math.isfinite(metrics["train/loss"])


def test_each_says_what_was_inferred(tmp_path: Path) -> None:
    source, _ = LAYOUTS["cassava"](tmp_path)
    layout = read(source).layout
    for part in ("'image_id'", "train_images/", "'label'", "label_num_to_disease_map.json"):
        assert part in layout
