"""A run directory in an object store can be resumed on any machine, at any moment."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import SMALL
from forked import RankJob, train
from s3 import s3_server

from benchmarks.jobs import wait_until
from serve import storage
from serve.main import main as serve_main
from train.config import TrainConfig
from train.data.sample import make_sample
from train.distributed import Ranks
from train.runs.mirror import UNPUBLISHED, Mirror, localise
from train.runs.snapshots import list_snapshots

EXACT = [*SMALL, "--precision", "fp32", "--deterministic", "--snapshot-steps", "1", "--track", "false"]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with s3_server() as client:
        yield client


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the local copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "purebred"


def names(client: Any, prefix: str) -> set[str]:
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix) for item in found}


def silent(text: str) -> None: ...


def a_run(folder: Path, *snapshots: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("{}\n" * len(snapshots))
    for name in snapshots:
        (folder / "checkpoints" / name).write_text(name)
    return folder


def test_killed_on_one_machine_it_is_resumed_on_another_exported_and_scored_from_the_store(
    client: Any, home: Path, tmp_path: Path
) -> None:
    """Two processes; each machine starts with an empty disk."""
    make_sample(tmp_path / "sample", train_per_class=40, num_test=4)
    command = ["--data", tmp_path / "sample" / "train", *EXACT, "--epochs", 4]
    command += ["--output", "s3://bucket/runs", "--name", "pets"]
    with RankJob(tmp_path, *command) as job:
        published = lambda: any("epoch-00000" in name for name in names(client, "runs/pets/"))  # noqa: E731
        job.wait_until(published, "a snapshot in the store")
    assert published()
    shutil.rmtree(home)
    printed = train(2, *command, cwd=tmp_path)
    assert "next: python export/main.py --run s3://bucket/runs/pets" in printed
    (local,) = home.glob("runs-*/pets")
    there = names(client, "runs/pets/")
    here = {
        str(p.relative_to(local)) for p in local.rglob("*") if p.is_file() and not p.name.startswith(".")
    }
    assert there == here
    assert {"config.yaml", "metrics.jsonl", "checkpoints/best.pt", "figures/curves.png"} <= there
    shutil.rmtree(home)

    forked.run("export/main.py", "--run", "s3://bucket/runs/pets", cwd=tmp_path)
    assert {"export/model.onnx", "export/verification.json"} <= names(client, "runs/pets/")
    scores = ["--model", "s3://bucket/runs/pets/export/model.onnx", "--output", "s3://bucket/scores.csv"]
    assert serve_main([*scores, "--images", str(tmp_path / "sample" / "test")]) == 0


def test_a_folder_that_is_deleted_under_a_run_takes_nothing_from_the_store(
    client: Any, tmp_path: Path
) -> None:
    folder = a_run(tmp_path / "run", "epoch-000000-step-00000001.pt")
    mirror = Mirror(folder, "s3://bucket/deleted", silent)
    mirror.publish()
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="run"):
        mirror.publish()
    folder.mkdir()
    mirror.publish()
    assert len(names(client, "deleted/")) == 2


def test_the_snapshot_comes_last_and_older_ones_go(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path / "run", "epoch-000000-step-00000001.pt", "epoch-000000-step-00000002.pt")
    mirror = Mirror(folder, "s3://bucket/order", silent)
    put: list[str] = []
    honest = storage.put_file
    monkeypatch.setattr(storage, "put_file", lambda path, url: (put.append(path.name), honest(path, url)))
    mirror.publish()
    assert put == ["metrics.jsonl", "epoch-000000-step-00000001.pt", "epoch-000000-step-00000002.pt"]
    (folder / "checkpoints" / "epoch-000000-step-00000001.pt").unlink()
    (folder / ".hidden").touch()
    mirror.publish()
    assert names(client, "order/") == {"metrics.jsonl", "checkpoints/epoch-000000-step-00000002.pt"}
    assert not (folder / UNPUBLISHED).exists()


@pytest.mark.parametrize(("marked", "here", "wins"), [(True, 3, 3), (True, 1, 2), (False, 3, 2)])
def test_work_that_was_not_published_is_not_lost_unless_the_store_is_further(
    client: Any, home: Path, tmp_path: Path, marked: bool, here: int, wins: int
) -> None:
    url = f"s3://bucket/both-{marked}-{here}"
    Mirror(a_run(tmp_path / "there", "epoch-000000-step-00000002.pt"), f"{url}/pets", silent).publish()
    config = TrainConfig(output=url, name="pets")
    local, _ = localise(config, Ranks(), silent)
    folder = Path(local.output) / "pets"
    shutil.rmtree(folder)
    a_run(folder, f"epoch-000000-step-0000000{here}.pt")
    if marked:
        (folder / UNPUBLISHED).touch()
    localise(config, Ranks(), silent)
    (newest,) = list_snapshots(folder / "checkpoints")
    assert newest.name == f"epoch-000000-step-0000000{wins}.pt"
    expected = {f"checkpoints/{newest.name}", "metrics.jsonl"}
    assert names(client, f"{url.removeprefix('s3://bucket/')}/pets/") == expected


def test_a_store_that_goes_away_stops_nothing_and_gets_all_of_it_later(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.runs.mirror.RETRY_SECONDS", 0.05)
    folder, said = a_run(tmp_path / "run", "epoch-000000-step-00000001.pt"), []
    away = True
    honest = Mirror.publish

    def publish(self: Mirror) -> None:
        if away:
            raise OSError("Connection refused")
        honest(self)

    monkeypatch.setattr(Mirror, "publish", publish)
    with Mirror(folder, "s3://bucket/later", said.append) as wanted:
        wanted()
        wait_until(lambda: bool(said))
        (warning,) = said
        assert "s3://bucket/later" in warning
        assert "Connection refused" in warning
        away = False
        wait_until(lambda: len(said) > 1)
    assert "s3://bucket/later" in said[-1]
    assert len(names(client, "later/")) == 2
    away = True
    with (
        pytest.raises(ValueError, match=r"s3://bucket/later.*Connection refused.*/run"),
        Mirror(folder, "s3://bucket/later", said.append),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "s3://bucket/runs"}, "--output s3://bucket/runs.*--name"),
        ({"output": "https://host/runs", "name": "a"}, "--output https://host/runs"),
        ({"output": "s3://no-such-bucket/runs", "name": "a", "seed": 1}, "no-such-bucket"),
        ({"output": "nonsense://host/runs", "name": "a"}, "nonsense"),
    ],
)
def test_a_store_that_cannot_be_used_is_an_error_before_training(
    client: Any, home: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        localise(TrainConfig(**settings), Ranks(), silent)


def test_without_a_home_the_error_names_where_the_copy_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ValueError, match=r"s3://bucket/runs.*HOME"):
        localise(TrainConfig(output="s3://bucket/runs", name="a"), Ranks(), silent)


def test_every_scheme_takes_a_run(home: Path, tmp_path: Path) -> None:
    url = f"memory:/{tmp_path}/runs"
    snapshot = "epoch-000000-step-00000001.pt"
    folder = a_run(tmp_path / "run", snapshot)
    with Mirror(folder, f"{url}/pets", silent) as wanted:
        wanted()
    local, _ = localise(TrainConfig(output=url, name="pets"), Ranks(), silent)
    copied = Path(local.output) / "pets"
    assert [path.name for path in list_snapshots(copied / "checkpoints")] == [
        "epoch-000000-step-00000001.pt"
    ]
    assert (copied / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_local_folder_is_left_alone(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path))
    assert localise(config, Ranks(), silent) == (config, "")


def test_what_ended_a_run_is_seen_though_the_store_is_away_too(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(Mirror, "publish", away)
    said: list[str] = []
    folder = a_run(tmp_path / "run")
    with pytest.raises(KeyError, match="own"), Mirror(folder, "s3://bucket/ended", said.append):
        raise KeyError("the run's own")
    assert re.search("s3://bucket/ended.*the store is away", said[-1])
