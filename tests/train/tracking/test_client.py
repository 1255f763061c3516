"""The store is the one of the environment, of the run directory or the default, without its password."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from serve.contract.mlflow_tags import VIEW_TAG
from train.tracking.client import TIMEOUT, UPLOAD_SECONDS, TrackingStore, patience_for_files

pytestmark = pytest.mark.usefixtures("store")


def test_the_default_store_is_sqlite_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert TrackingStore().uri == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 1


def test_a_password_in_the_address_becomes_a_setting_that_no_message_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:p%40ss@localhost:5000")
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    store = TrackingStore()
    assert store.uri == store.client.tracking_uri == "http://localhost:5000"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "user"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"


def test_a_line_end_of_a_secrets_file_is_no_part_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """requests refuses a token with one, and shows it in its error."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000\n")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc\n")
    assert TrackingStore().uri == "http://localhost:5000"
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == "abc"


def test_a_server_may_take_its_time_over_a_file_unless_the_user_has_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given, during in ((None, UPLOAD_SECONDS), ("30", 30)):
        if given:
            monkeypatch.setenv(TIMEOUT, given)
        TrackingStore()
        before = os.environ[TIMEOUT]
        with patience_for_files():
            assert int(os.environ[TIMEOUT]) == during
        assert os.environ[TIMEOUT] == before


def test_an_experiment_that_was_there_gets_the_view_once_and_keeps_a_changed_one() -> None:
    client, (key, value) = TrackingStore().client, VIEW_TAG
    made = client.create_experiment("pets", tags={"owner": "me"})
    assert TrackingStore().experiment_id("pets") == made
    assert client.get_experiment(made).tags == {"owner": "me", key: value}
    client.set_experiment_tag(made, key, "changed")
    assert TrackingStore().experiment_id("pets") == made
    assert client.get_experiment(made).tags[key] == "changed"


@pytest.mark.parametrize(
    ("uri", "artifacts", "refused"),
    [
        ("http://mlflow:5000", "{}/srv/1/abc/artifacts", True),
        ("http://mlflow:5000", "file://{}/srv/1/abc/artifacts", True),
        ("http://mlflow:5000", "{}/1/abc/artifacts", False),  # mounted here, too
        ("http://mlflow:5000", "mlflow-artifacts:/1/abc/artifacts", False),
        ("https://mlflow", "s3://bucket/srv/1/abc/artifacts", False),
        ("http://127.0.0.1:5000", "{}/srv/1/abc/artifacts", False),
        ("http://localhost:5000", "{}/home/me/srv/1/abc/artifacts", True),  # through a tunnel
        ("sqlite:////srv/mlflow.db", "{}/srv/1/abc/artifacts", False),
    ],
)
def test_files_are_not_left_in_a_folder_that_only_the_server_has(
    tmp_path: Path, uri: str, artifacts: str, refused: bool
) -> None:
    store = TrackingStore()
    store.uri = uri
    with pytest.raises(ValueError, match="--serve-artifacts") if refused else nullcontext():
        store.check_artifact_folder(artifacts.format(tmp_path))
