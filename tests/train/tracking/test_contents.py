"""Names that MLflow takes, and what a resumed run logs of its parameters."""

import pytest
from mlflow_store import DIGEST, runs, tracker

from serve.contract.mlflow_tags import CLASSES_TAG, DATA_TAG, KIND_TAG
from train.config import TrainConfig
from train.tracking.contents import changed_parameters, kind_tags, metric_name, resumed_name, sources_of

NAMES = ["고양이", "a\nb", "$x", "shiba inu (3)", "x" * 300, "a/b", "🐱", "..."]
PATHS = ["..", "a/", "a//b", "/a"]  # labels of a label file can be anything


@pytest.mark.parametrize(
    "classes",
    [NAMES, *([name] for name in PATHS)],
    ids=str,
)
@pytest.mark.usefixtures("store")
def test_class_names_of_any_kind_are_metric_names(store: str, classes: list[str]) -> None:
    names = [f"f1/{name}" for name in classes]
    t = tracker()
    t.start({}, ("data", DIGEST))
    t.log_metrics(1, {**dict.fromkeys(names, 0.5), "val/accuracy": 0.9})
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.data.metrics["val/accuracy"] == 0.9
    assert set(run.data.metrics) >= {metric_name(name) for name in names}


def test_classes_that_mlflow_would_call_alike_stay_apart() -> None:
    classes = ["a,b", "a;b", "a_b", "a//b", "a/_/b", *(("x" * 300) + end for end in "yz")]
    assert len({metric_name(f"f1/{name}") for name in classes}) == len(classes)
    assert metric_name("f1/a_b") == "f1/a_b"


def test_only_what_differs_from_the_last_value_is_a_change() -> None:
    known = {"epochs": "6", "lr": "0.1", "resume.10.epochs": "9", "resume.6.epochs": "8"}
    assert changed_parameters(known, {"epochs": "9", "lr": "0.1", "new": "1"}) == {}
    assert changed_parameters(known, {"epochs": "6"}) == {"epochs": "6"}
    assert resumed_name(known, 6, "epochs") == "resume.6-2.epochs"
    assert resumed_name(known, 7, "epochs") == "resume.7.epochs"


def test_folds_are_distinguished_from_trainings_by_a_tag() -> None:
    assert kind_tags(TrainConfig(folds=3, fold=1), {"num_classes": 7}, "s3://b/pets/")[KIND_TAG] == "fold"
    tags = kind_tags(TrainConfig(), {"num_classes": 7}, "s3://b/pets/")
    assert tags | {KIND_TAG: "training", CLASSES_TAG: "7", DATA_TAG: "pets"} == tags


@pytest.mark.parametrize(
    ("given", "used", "sources"),
    [
        ({"data": "a"}, {"data": "a"}, ("a", "a")),
        ({"data": "a", "val_data": "b"}, {"data": "a", "val_data": "b"}, ("a", "b")),
        ({"data": "a"}, {"data": "a/train", "val_data": "a/val"}, ("a", "a/val")),
        ({"data": "s3://a"}, {"data": "copy/train", "val_data": "copy/val"}, ("s3://a", "s3://a")),
        ({}, {"data": "data/train"}, ("data/train", "data/train")),
    ],
)
def test_sources_are_what_the_user_gave(
    given: dict[str, str], used: dict[str, str], sources: tuple[str, str]
) -> None:
    assert sources_of(TrainConfig(**given), TrainConfig(**used)) == sources
