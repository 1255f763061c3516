"""What is asked of MLflow about one run: names that it takes, the store, the model that was verified."""

import os
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
from mlflow_store import DIGEST, PARAMETERS, REFUSES, onnx_file, runs, tracker, use, whole_run

from export.publish import check_register, training_run
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from serve.tracking import RecordedRun, recorded_run
from train import sync
from train.checkpoint import save_checkpoint
from train.config import TrainConfig
from train.tracking import client as tracking
from train.tracking import mlflow_run
from train.tracking.client import log_verified_model, metric_name
from train.tracking.mlflow_run import MlflowTracker

pytestmark = pytest.mark.usefixtures("store")

NAMES = ["고양이", "a\nb", "$x", "shiba inu (3)", "x" * 300, "a/b", "🐱", "..."]
PATHS = ["..", "a/", "a//b", "/a"]  # labels of a label file can be anything


@pytest.mark.parametrize(
    "classes",
    [NAMES, *([name] for name in PATHS)],
    ids=str,
)
def test_class_names_of_any_kind_are_metric_names(store: str, classes: list[str]) -> None:
    names = [f"f1/{name}" for name in classes]
    t = tracker()
    t.start({}, "data", DIGEST)
    t.log_metrics(1, {**dict.fromkeys(names, 0.5), "val/accuracy": 0.9})
    t.end("FINISHED")
    (run,) = runs(store)
    assert run.data.metrics["val/accuracy"] == 0.9
    assert set(run.data.metrics) >= {metric_name(name) for name in names}


def test_classes_that_mlflow_would_call_alike_stay_apart() -> None:
    classes = ["a,b", "a;b", "a_b", "a//b", "a/_/b", *(("x" * 300) + end for end in "yz")]
    assert len({metric_name(f"f1/{name}") for name in classes}) == len(classes)
    assert metric_name("f1/a_b") == "f1/a_b"


def test_the_default_store_is_sqlite_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.connect()
    assert mlflow.get_tracking_uri() == "sqlite:///mlflow.db"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 1


def test_a_password_in_the_address_becomes_a_setting_that_no_message_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow.set_tracking_uri(None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:p%40ss@localhost:5000")
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    tracking.connect()
    assert mlflow.get_tracking_uri() == "http://localhost:5000"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "user"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"


def test_a_model_that_cannot_be_uploaded_leaves_the_run_as_it_ended(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tracker()
    t.start(PARAMETERS, "data/train", DIGEST)
    t.end("FINISHED")
    (before,) = runs(store)

    def away(*_: object, **__: object) -> None:
        raise OSError("503")

    monkeypatch.setattr(mlflow, "log_artifact", away)

    with pytest.raises(OSError, match="503"):
        log_verified_model(t.run_id, Path("model.onnx"), Path("verification.json"), 16, 2, {}, "")
    (after,) = runs(store)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)


def test_a_verified_model_has_its_own_metrics_in_mlflow(store: str) -> None:
    t = whole_run()
    metadata = ModelMetadata(("cat", "dog"), Preprocess("crop", 16, 18))
    model, verification = onnx_file(Path("model.onnx"), metadata), Path("verification.json")
    verification.write_text("{}")
    values = {"served/accuracy": 0.75, "served/log_loss": 0.5}
    uri = log_verified_model(t.run_id, model, verification, 16, 2, values, "", "5" * 64)
    logged = mlflow.MlflowClient(store).get_logged_model(uri.rpartition("/")[2])
    assert {metric.key: metric.value for metric in logged.metrics} == values
    outputs = mlflow.models.get_model_info(uri).signature.outputs.inputs
    assert [(output.name, output.shape) for output in outputs] == [
        ("logits", (-1, 2)),
        ("probabilities", (-1, 2)),
        ("y", (-1, 2)),  # as embeddings are: the file's other outputs
    ]
    (run,) = runs(store)
    assert run.data.metrics["served/accuracy"] == 0.75
    assert run.info.status == "FINISHED"


def test_a_logged_model_is_found_by_its_bytes_and_gets_the_present_record(store: str) -> None:
    t = whole_run()
    verification = Path("verification.json")
    verification.write_text("{}")
    ids = {}
    for precision in ("fp32", "int8"):
        metadata = ModelMetadata(("cat", "dog"), Preprocess("crop", 16, 18), precision=precision)
        file = onnx_file(Path(f"model.{precision}.onnx"), metadata)
        assert tracking.find_logged_model(t.run_id, file_sha256(file)) == ""
        uri = log_verified_model(t.run_id, file, verification, 16, 2, {}, "", "5" * 64, precision)
        ids[precision] = uri.rpartition("/")[2]
        assert tracking.find_logged_model(t.run_id, file_sha256(file)) == ids[precision]
    assert len(set(ids.values())) == 2
    verification.write_text('{"new": 1}')
    tracking.log_verification(t.run_id, ids["int8"], verification)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{ids['int8']}", dst_path="copy"))
    assert (folder / "verification.json").read_text() == '{"new": 1}'
    # the copy is the very file: its record is about these bytes
    assert file_sha256(folder / "model.onnx") == file_sha256(Path("model.int8.onnx"))

    for _ in range(2):
        tracking.register_logged_model(ids["int8"], "pets")
    version = mlflow.MlflowClient(store).get_model_version_by_alias("pets", "challenger")
    assert (str(version.version), version.run_id) == ("1", t.run_id)
    assert version.source == f"models:/{ids['int8']}"
    assert len(mlflow.MlflowClient(store).search_model_versions("name = 'pets'")) == 1


def test_what_cannot_be_registered_is_known_before_the_work(store: str) -> None:
    t = whole_run()
    tracking.check_registrable(t.run_id, "pets")
    for run_id, name in (("0" * 32, "pets"), (t.run_id, "a/b:c")):
        with pytest.raises(mlflow.MlflowException):
            tracking.check_registrable(run_id, name)


def test_a_run_that_began_in_an_outage_is_linked_to_what_is_exported(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint and the model, made meanwhile, know no run ID."""
    run = Path("runs/small")
    (run / "export").mkdir(parents=True)
    save_checkpoint({"run_id": ""}, run / "checkpoints" / "best.pt")
    digest = file_sha256(run / "checkpoints" / "best.pt")
    use(monkeypatch, REFUSES)
    monkeypatch.setattr(mlflow_run, "LAST_TRIES", 1)
    t = MlflowTracker(TrainConfig(name="small"), run / "metrics.jsonl", 0, "")
    t.start(PARAMETERS, "data/train", DIGEST)
    t.end("FINISHED")
    use(monkeypatch, store)
    assert training_run(run, "", digest) == ""
    with pytest.raises(ValueError, match=r"--register.*train/sync\.py"):
        check_register(run, "", "pets")
    before = (run / "tracking.json").read_text()
    assert sync.main([str(run)]) == 0
    (trained,) = runs(store)
    assert training_run(run, "", digest) == trained.info.run_id
    assert recorded_run(run) == RecordedRun(True, trained.info.run_id, store)
    (run / "tracking.json").write_text(before)  # as in a copy that an object store has from the outage
    assert training_run(run, "", digest) == trained.info.run_id

    metadata = ModelMetadata(("cat", "dog"), Preprocess("crop", 16, 18), checkpoint_sha256=digest)
    model = onnx_file(run / "export" / "model.onnx", metadata)
    report = Path("verification.json")
    report.write_text("{}")
    log_verified_model(trained.info.run_id, model, report, 16, 2, {}, "pets", digest)
    version = mlflow.MlflowClient(store).get_model_version_by_alias("pets", "challenger")
    assert version.run_id == trained.info.run_id


@pytest.mark.parametrize(
    ("uri", "artifacts", "refused"),
    [
        ("http://mlflow:5000", "{}/srv/1/abc/artifacts", True),
        ("http://mlflow:5000", "file://{}/srv/1/abc/artifacts", True),
        ("http://mlflow:5000", "{}/1/abc/artifacts", False),  # mounted here, too
        ("http://mlflow:5000", "mlflow-artifacts:/1/abc/artifacts", False),
        ("https://mlflow", "s3://bucket/srv/1/abc/artifacts", False),
        ("http://127.0.0.1:5000", "{}/srv/1/abc/artifacts", False),
        ("sqlite:////srv/mlflow.db", "{}/srv/1/abc/artifacts", False),
    ],
)
def test_files_are_not_left_in_a_folder_that_only_the_server_has(
    tmp_path: Path, uri: str, artifacts: str, refused: bool
) -> None:
    with pytest.raises(ValueError, match="--serve-artifacts") if refused else nullcontext():
        tracking.check_artifact_folder(uri, artifacts.format(tmp_path))
