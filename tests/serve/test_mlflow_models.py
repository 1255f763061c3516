"""What a model's name in MLflow stands for, by a server's REST API, and what is refused with a way out."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from serve_model import build_model, encode, record_verification, solid

from serve import doctor
from serve.contract.errors import UserError
from serve.contract.mlflow_tags import PRECISION_TAG
from serve.local_copy import resolve_model
from serve.main import main
from serve.merge import main as merge
from serve.mlflow_models import find_model, is_mlflow_model, model_server
from serve.tracking_server import TrackingServer
from serve.verification import read_metadata

MODEL_ID, OTHER_ID, RUN_ID = "m-" + "0a" * 16, "m-" + "0b" * 16, "5" * 32


class Registry(BaseHTTPRequestHandler):
    """MLflow's answers for one registered model of two versions, whose files are proxied."""

    champion: ClassVar[str] = "1"
    folder: ClassVar[Path]
    asked: ClassVar[list[str | None]]

    def answer(self, path: str, query: str) -> dict[str, Any] | bytes | None:
        name, _, rest = path.partition("/api/2.0/")[2].partition("/")
        if name == "mlflow-artifacts":
            below = self.folder / unquote(rest).removeprefix("artifacts").strip("/")
            if "path=" in query:
                below = self.folder / unquote(query.partition("path=")[2])
                files = [{"path": file.name, "is_dir": file.is_dir()} for file in below.iterdir()]
                return {"files": files}
            return below.read_bytes() if below.is_file() else None
        return {
            "registered-models/get": {
                "registered_model": {
                    "name": "pets",
                    "aliases": [{"alias": "champion", "version": self.champion}],
                    "latest_versions": [{"version": "2"}],
                }
            }
            if query == "name=pets"
            else None,
            "model-versions/get": {"model_version": {"source": f"models:/{MODEL_ID}", "run_id": RUN_ID}}
            if query == "name=pets&version=1"
            else {"model_version": {"source": f"models:/{OTHER_ID}"}}
            if query == "name=pets&version=2"
            else None,
            f"logged-models/{MODEL_ID}": self.logged(MODEL_ID, 1),
            f"logged-models/{OTHER_ID}": self.logged(OTHER_ID, 2),
            "runs/get": {
                "run": {
                    "info": {"artifact_uri": f"mlflow-artifacts:/1/{RUN_ID}/artifacts"},
                    "outputs": {"model_outputs": [{"model_id": MODEL_ID}, {"model_id": OTHER_ID}]},
                }
            }
            if query == f"run_id={RUN_ID}"
            else None,
        }.get(rest)

    def logged(self, model_id: str, time: int) -> dict[str, Any]:
        info = {
            "model_id": model_id,
            "name": "fold-2",
            "tags": [{"key": PRECISION_TAG, "value": "fp32"}],
            "artifact_uri": f"mlflow-artifacts:/1/models/{model_id}/artifacts",
            "source_run_id": RUN_ID,
            "creation_timestamp_ms": time,
        }
        return {"model": {"info": info}}

    def do_GET(self) -> None:
        self.asked.append(self.headers["Authorization"])
        parts = urlsplit(self.path)
        found = self.answer(parts.path, parts.query)
        self.send_response(404 if found is None else 200)
        self.end_headers()
        self.wfile.write(found if isinstance(found, bytes) else json.dumps(found or {}).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    for number, model_id in enumerate((MODEL_ID, OTHER_ID), 2):
        folder = tmp_path / "store" / "1" / "models" / model_id / "artifacts"
        folder.mkdir(parents=True)
        build_model(folder / "model.onnx", ("red", "green", "blue")[:number])
        (folder / "MLmodel").touch()
        record_verification(folder / "model.onnx", ("cpu:fp32", True, 1.0), ("cuda:fp16", True, 5.0))
    exported = tmp_path / "store" / "1" / RUN_ID / "artifacts" / "export"
    exported.mkdir(parents=True)
    build_model(exported / "model.int8.onnx")
    Registry.folder, Registry.champion, Registry.asked = tmp_path / "store", "1", []
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{http.server_port}")
        yield TrackingServer(f"http://127.0.0.1:{http.server_port}")
        http.shutdown()


@pytest.mark.parametrize(
    ("name", "location", "version", "classes"),
    [
        ("models:/pets@champion", "models:/pets/1", "pets/1", 2),
        ("models:/pets/2", "models:/pets/2", "pets/2", 3),
        ("models:/pets/latest", "models:/pets/2", "pets/2", 3),
        (f"models:/{MODEL_ID}", f"models:/{MODEL_ID}", "", 2),
        (f"runs:/{RUN_ID}/fold-2", f"models:/{OTHER_ID}", "", 3),
        (f"runs:/{RUN_ID}/model", f"models:/{OTHER_ID}", "", 3),
        (f"runs:/{RUN_ID}/export/model.int8.onnx", f"runs:/{RUN_ID}/export/model.int8.onnx", "", 3),
    ],
)
def test_a_name_is_a_file_of_the_server(
    server: TrackingServer, name: str, location: str, version: str, classes: int
) -> None:
    assert is_mlflow_model(name)
    with resolve_model(name) as opened:
        assert (opened.location, opened.version) == (location, version)
        metadata = read_metadata(opened.path)
        assert len(metadata.class_names) == classes
        assert metadata.is_verified("cuda", "fp16") == ("int8" not in name)  # by the record beside it
    assert not opened.path.exists()
    assert all(value and value.startswith("Basic ") for value in Registry.asked)


def test_of_a_run_whose_newest_model_was_deleted_the_one_before_is_taken(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = Registry.logged
    monkeypatch.setattr(
        Registry, "logged", lambda self, model, time: None if time == 2 else logged(self, model, time)
    )
    assert find_model(server, f"runs:/{RUN_ID}/model").model_id == MODEL_ID


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("models:/pets@other", "champion"),
        ("models:/pets/9", "9"),
        ("models:/pets/Production", "champion"),
        ("models:/cars@champion", "cars"),
        ("models:/m-" + "0c" * 16, "0c"),
        ("models:/pets", "models:/NAME@ALIAS"),
        ("models:/", "models:/NAME@ALIAS"),
        ("runs:/" + "6" * 32 + "/model", "666"),
        (f"runs:/{RUN_ID}", "runs:/RUN_ID/model"),
    ],
)
def test_what_the_server_does_not_have_is_refused_by_its_name(
    server: TrackingServer, name: str, hint: str
) -> None:
    with pytest.raises(UserError) as raised:
        find_model(server, name)
    assert hint in str(raised.value)


def test_an_alias_that_moves_between_shards_is_found_by_merging(
    server: TrackingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / "images" / f"{number}.png").write_bytes(encode(solid((number, 9, 9)), "PNG"))
    parts = tmp_path / "parts"
    common = ["--model", "models:/pets@champion", "--images", str(tmp_path / "images"), "--batch-size", "1"]
    for index in range(2):
        assert main([*common, "--output", str(parts), "--shard", f"{index}/2", "--resume"]) == 0
        assert f"models:/pets/{index + 1}" in capsys.readouterr().err
        Registry.champion = "2"
    assert merge([str(parts), "--output", str(tmp_path / "all.csv")]) == 2
    error = capsys.readouterr().err
    assert "models:/pets/2" in error
    assert "models:/pets/1" in error
    assert main([*common, "--output", str(parts), "--shard", "0/2", "--resume"]) == 0
    assert merge([str(parts), "--output", str(tmp_path / "all.csv")]) == 0


def test_the_doctor_opens_what_scoring_would(
    server: TrackingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--model", "models:/pets@champion", "--provider", "cpu"]) == 0
    assert "models:/pets/1" in capsys.readouterr().out
    assert doctor.main(["--model", "models:/pets@other", "--provider", "cpu"]) == 1


def test_a_store_without_a_server_is_an_error_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    with pytest.raises(UserError) as raised:
        model_server("models:/pets@champion")
    message = str(raised.value)
    assert "secret" not in message
    assert "mlflow server --backend-store-uri postgresql://***@host/db" in message
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000")
    assert model_server("models:/pets@champion").uri == "http://registry:5000"
    with pytest.raises(UserError):
        model_server("runs:/1/model")


def test_files_of_another_server_get_no_credentials(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Registry,
        "logged",
        lambda *_: {"model": {"info": {"artifact_uri": "mlflow-artifacts://elsewhere:5000/1/x"}}},
    )
    with pytest.raises(UserError, match="elsewhere:5000"), resolve_model("models:/pets/1"):
        pass


def test_files_on_the_servers_disk_are_read_where_they_are_this_machines(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store" / "1" / "models" / MODEL_ID / "artifacts"
    uri = folder.as_uri()
    monkeypatch.setattr(Registry, "logged", lambda *_: {"model": {"info": {"artifact_uri": uri}}})
    with resolve_model("models:/pets/1") as opened:
        assert opened.path == folder / "model.onnx"
    uri = (tmp_path / "gone").as_uri()
    with pytest.raises(UserError, match="--artifacts-destination"), resolve_model("models:/pets/1"):
        pass
