"""MLflow has each verified model file once, with its record, and registers what it is asked to."""

from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow_store import DIGEST, PARAMETERS, REFUSES, onnx_file, runs, tracker, use, whole_run
from serve_model import ON_CPU

from export.mlflow_package import ServedModel
from export.publish import check_register, training_run
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata
from serve.contract.mlflow_tags import BEST_CHECKPOINT_TAG
from serve.contract.preprocess import Preprocess
from serve.tracking import RecordedRun, recorded_run
from train import sync
from train.checkpoint import save_checkpoint
from train.config import TrainConfig
from train.tracking import mlflow_tracker
from train.tracking.client import TrackingStore
from train.tracking.errors import RefusedError
from train.tracking.mlflow_tracker import MlflowTracker
from train.tracking.parent_run import open_parent
from train.tracking.registry import check_registrable, find_by_checkpoint, publish_model, read_aliases

pytestmark = pytest.mark.usefixtures("store")


def described(**values: Any) -> ModelMetadata:
    return ModelMetadata(("cat", "dog"), Preprocess("crop", 16, 18), verified=(ON_CPU,), **values)


def published(
    run_id: str, metadata: ModelMetadata, metrics: dict[str, float] | None = None, register: str = ""
) -> str:
    model, verification = onnx_file(Path(f"{metadata.precision}.onnx"), metadata), Path("verification.json")
    verification.touch()
    flavor = ServedModel(model, metadata)
    return publish_model(
        TrackingStore(), run_id, model, metadata, verification, metrics or {}, flavor, register
    )


def test_a_model_that_cannot_be_uploaded_leaves_the_run_as_it_ended(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tracker()
    t.start(PARAMETERS, ("data/train", DIGEST))
    t.end("FINISHED")
    (before,) = runs(store)

    def away(*_: object, **__: object) -> None:
        raise OSError("503")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", away)
    with pytest.raises(ConnectionError, match="503"):
        published(t.run_id, described())
    (after,) = runs(store)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)


def test_a_verified_model_has_its_own_metrics_in_mlflow(store: str) -> None:
    t = whole_run()
    mlflow.MlflowClient(store).log_metric(t.run_id, "system/cpu_utilization_percentage", 3.0, step=0)
    values = {"served/accuracy": 0.75, "served/log_loss": 0.5}
    model_id = published(t.run_id, described(), values)
    logged = mlflow.MlflowClient(store).get_logged_model(model_id)
    assert logged.experiment_id == runs(store)[0].info.experiment_id
    assert {metric.key: metric.value for metric in logged.metrics} == values
    (run,) = runs(store)
    assert run.data.metrics["served/accuracy"] == 0.75
    assert run.info.status == "FINISHED"


def test_a_model_file_is_logged_once_and_gets_the_present_record(store: str) -> None:
    t = whole_run()
    files = {precision: described(precision=precision) for precision in ("fp32", "int8")}
    ids = {precision: published(t.run_id, metadata) for precision, metadata in files.items()}
    assert len(set(ids.values())) == 2
    Path("verification.json").write_text('{"new": 1}')
    assert published(t.run_id, files["int8"]) == ids["int8"]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{ids['int8']}", dst_path="copy"))
    assert (folder / "verification.json").read_text() == '{"new": 1}'
    # the copy is the very file: its record is about these bytes
    assert file_sha256(folder / "model.onnx") == file_sha256(Path("int8.onnx"))
    (run,) = runs(store)
    assert len(run.outputs.model_outputs) == 2

    for _ in range(2):
        published(t.run_id, files["int8"], register="pets")
    version = mlflow.MlflowClient(store).get_model_version_by_alias("pets", "challenger")
    assert (str(version.version), version.run_id) == ("1", t.run_id)
    assert version.source == f"models:/{ids['int8']}"
    assert len(mlflow.MlflowClient(store).search_model_versions("name = 'pets'")) == 1


@pytest.mark.parametrize("name", ["it's", '"mine"'])
def test_a_registered_model_may_have_quotes_in_its_name(store: str, name: str) -> None:
    t = whole_run()
    check_registrable(TrackingStore(), t.run_id, name)
    for _ in range(2):
        published(t.run_id, described(), register=name)
    version = mlflow.MlflowClient(store).get_model_version_by_alias(name, "challenger")
    assert str(version.version) == "1"


def test_a_file_that_is_not_verified_any_more_is_not_logged(store: str) -> None:
    t = whole_run()
    assert published(t.run_id, ModelMetadata(("cat", "dog"), Preprocess("crop", 16, 18))) == ""
    assert not runs(store)[0].outputs.model_outputs


def test_what_cannot_be_registered_is_known_before_the_work(store: str) -> None:
    t = whole_run()
    check_registrable(TrackingStore(), t.run_id, "pets")
    for run_id, name in (("0" * 32, "pets"), (t.run_id, "a/b:c"), (t.run_id, 'it\'s "mine"')):
        with pytest.raises(RefusedError):
            check_registrable(TrackingStore(), run_id, name)


def test_a_run_that_began_in_an_outage_is_linked_to_what_is_exported(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint and the model, made meanwhile, know no run ID."""
    run = Path("runs/small")
    (run / "export").mkdir(parents=True)
    save_checkpoint({"run_id": ""}, run / "checkpoints" / "best.pt")
    digest = file_sha256(run / "checkpoints" / "best.pt")
    use(monkeypatch, REFUSES)
    monkeypatch.setattr(mlflow_tracker, "LAST_TRIES", 1)
    t = MlflowTracker(TrainConfig(name="small"), run / "metrics.jsonl", 0, "")
    t.start(PARAMETERS, ("data/train", DIGEST))
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

    published(trained.info.run_id, described(checkpoint_sha256=digest), register="pets")
    version = mlflow.MlflowClient(store).get_model_version_by_alias("pets", "challenger")
    assert version.run_id == trained.info.run_id


def test_a_run_is_found_among_more_experiments_than_a_page_has(store: str) -> None:
    t, opened = whole_run(), TrackingStore()
    opened.client.set_tag(t.run_id, BEST_CHECKPOINT_TAG, "ab" * 32)
    for i in range(4):
        opened.client.create_experiment(f"other {i}")
    opened.client.search_experiments = partial(opened.client.search_experiments, max_results=2)
    assert find_by_checkpoint(opened, "ab" * 32) == t.run_id
    assert find_by_checkpoint(opened, "cd" * 32) == ""


@pytest.mark.parametrize("uri", [REFUSES, "sqlite:////proc/no/such.db"])
def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    use(monkeypatch, uri)
    with pytest.raises((ConnectionError, RefusedError), match=uri):
        read_aliases(TrackingStore(), "pets")
    with pytest.raises((ConnectionError, RefusedError), match=uri):
        open_parent("purebred", "sweep", "", {})
