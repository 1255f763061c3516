"""Preparation: what is trained on when nothing is given, and the notes of it."""

from functools import partial
from pathlib import Path

import pytest
from train_data import flat_set, settings

from train.config import TrainConfig
from train.data.sample import make_sample
from train.engine import prepare as preparation
from train.engine.prepare import prepare


def test_without_data_the_sample_set_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "make_sample", partial(make_sample, train_per_class=4, num_test=1))
    config, data = prepare(TrainConfig(name="a"))
    assert config.data == "data/sample/train"
    assert data.train.class_names == ("cat", "dog")
    assert data.notes[0].startswith("no --data")
    written = (tmp_path / "data" / "sample" / "train").stat().st_mtime_ns
    _, again = prepare(TrainConfig(name="b"))
    assert (tmp_path / "data" / "sample" / "train").stat().st_mtime_ns == written
    assert again.digest == data.digest


def test_a_sample_set_that_cannot_be_drawn_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sample").mkdir(parents=True)
    (tmp_path / "data" / "sample" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"data/train.*--data"):
        prepare(settings(tmp_path, data=""))


def test_without_data_data_train_is_taken_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flat_set(Path("data/train"), names=("ant", "bee"))
    config, data = prepare(TrainConfig())
    assert config.data == "data/train"
    assert data.train.class_names == ("ant", "bee")
