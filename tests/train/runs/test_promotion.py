"""A challenger becomes champion when it is not worse, and not when that is only not known."""

import re
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow_store import onnx_file, use
from run_folders import make_run
from serve_model import ON_CPU

from export.mlflow_package import ServedModel
from serve.contract.files import file_sha256
from serve.contract.metadata import ModelMetadata
from serve.contract.preprocess import Preprocess
from train import compare
from train.checkpoint import save_checkpoint
from train.evaluation.predictions import StoredAnswers
from train.evaluation.significance import PairedTest, paired_test
from train.runs import promotion
from train.runs.promotion import decide
from train.runs.results import read_run
from train.tracking.client import TrackingStore
from train.tracking.registry import publish_model


def compared(gained: int, lost: int, n: int, loss: float = 0.0) -> PairedTest:
    """`loss`: how much higher the challenger's mean loss is; it varies from image to image by 0.5."""
    run, reference = np.ones(n, bool), np.ones(n, bool)
    reference[:gained], run[n - lost :] = False, False
    losses = np.random.default_rng(0).normal(0, 0.5, n)
    return paired_test(run, reference, losses - losses.mean() + loss, np.zeros(n))


@pytest.mark.parametrize(
    ("test", "margin", "promoted", "failing"),
    [
        (compared(30, 30, 3000), 0.01, True, ""),
        (compared(60, 20, 3000), 0.01, True, ""),
        (compared(0, 0, 3000), 0.01, True, ""),
        (compared(25, 30, 3000), 0.01, True, ""),  # a little less right, within chance and margin
        (compared(30, 30, 1400), 0.01, True, ""),  # just enough images for a bound of 95 % on one side
        (compared(30, 30, 1200), 0.01, False, "accuracy"),
        (compared(3, 3, 100), 0.01, False, "accuracy"),  # too few images to know
        (compared(3, 3, 100), 0.10, True, ""),
        (compared(0, 0, 180), 0.01, False, "accuracy"),
        (compared(10, 60, 3000), 0.01, False, "accuracy"),  # worse
        (compared(100, 200, 50_000), 0.01, False, "McNemar"),  # within the margin, yet certainly worse
        (compared(30, 30, 3000, loss=0.03), 0.01, False, "log loss"),
        (compared(30, 30, 3000, loss=0.01), 0.01, True, ""),  # higher, within chance
        (compared(30, 30, 3000, loss=-0.5), 0.01, True, ""),
        (compared(30, 30, 3000, loss=float("nan")), 0.01, False, "log loss"),
    ],
)
def test_not_worse_takes_all_three_conditions(
    test: PairedTest, margin: float, promoted: bool, failing: str
) -> None:
    decision = decide(test, margin)
    assert decision.promote == promoted
    failed = [reason for reason in decision.reasons if reason.startswith("FAILS")]
    assert (failed == []) == promoted
    assert promoted or failing in failed[0]


def test_a_run_that_is_worse_by_the_margin_is_seldom_promoted() -> None:
    """The promise of the first condition, over simulated validation sets."""
    rng = np.random.default_rng(0)
    n, margin = 2000, 0.02
    tables = rng.multinomial(n, [0.02, 0.02 + margin, 0.96 - margin], 400).tolist()
    promoted = np.mean([decide(compared(b, c, n), margin).promote for b, c, _ in tables])
    assert promoted < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    use(monkeypatch, f"sqlite:///{tmp_path}/mlflow.db")


def registered_run(
    name: str, seed: int, n: int = 3000, skill: float = 1.5, model: str = "pets", precision: str = "fp32"
) -> Path:
    """A run directory and its MLflow run, exported and registered as challenger."""
    folder = make_run(Path("runs") / name, seed=seed, n=n, skill=skill)
    client = mlflow.MlflowClient()
    run_id = client.create_run("0", run_name=name).info.run_id
    client.log_artifact(run_id, str(folder / "val_predictions.npz"))
    save_checkpoint({"run_id": run_id}, folder / "checkpoints" / "best.pt")
    metrics = {k: v for k, v in read_run(folder).best.items() if k.startswith("val/")}
    metadata = ModelMetadata(
        ("class0", "class1"),
        Preprocess("crop", 16, 18),
        metrics=metrics,
        temperature=metrics["val/temperature"],
        run_name=name,
        verified=(ON_CPU,),
        run_id=run_id,
        precision=precision,
        checkpoint_sha256=file_sha256(folder / "checkpoints" / "best.pt"),
    )
    file = onnx_file(folder / "model.onnx", metadata)
    flavor = ServedModel(file, metadata)
    publish_model(TrackingStore(), run_id, file, metadata, folder / "config.yaml", {}, flavor, model)
    return folder


def champion() -> str:
    return str(mlflow.MlflowClient().get_model_version_by_alias("pets", "champion").version)


def test_the_first_the_better_and_not_the_worse(capsys: pytest.CaptureFixture[str]) -> None:
    first = registered_run("first", seed=0)
    assert compare.main([str(first), "--promote", "pets"]) == 0
    assert champion() == "1"
    assert "pets version 1" in capsys.readouterr().out
    assert compare.main([str(first), "--promote", "pets"]) == 0

    better = registered_run("better", seed=1, skill=2.5)
    assert compare.main([str(first), str(better), "--promote", "pets"]) == 0
    assert champion() == "2"
    printed = capsys.readouterr().out
    assert re.search(r"better \(version 2\).* first \(version 1\).* 3000 ", printed)
    assert "FAILS" not in printed

    worse = registered_run("worse", seed=2, skill=2.0)
    assert compare.main([str(worse), "--promote", "pets"]) == 1  # the champion's answers come from MLflow
    assert champion() == "2"
    printed = capsys.readouterr().out
    assert "FAILS: accuracy -0." in printed

    assert compare.main([str(better), "--promote", "pets"]) == 2
    assert "run worse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n", "skill", "reason"),
    [(400, 0.0, "train"), (3, 99.0, "on 3 images")],
)
def test_a_first_champion_that_may_be_at_chance_is_refused(
    n: int, skill: float, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = registered_run("first", seed=0, n=n, skill=skill)
    assert compare.main([str(run), "--promote", "pets"]) == 1
    printed = capsys.readouterr().out
    assert "FAILS: accuracy" in printed
    assert reason in printed
    assert not mlflow.MlflowClient().get_registered_model("pets").aliases.get("champion")


def test_too_few_images_say_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (registered_run(f"r{seed}", seed=0, n=100) for seed in range(2))
    compare.main([str(first), "--promote", "pets"])
    mlflow.MlflowClient().set_registered_model_alias("pets", "champion", "1")
    assert compare.main([str(first), str(second), "--promote", "pets"]) == 1
    assert re.search(r"100 .*0\.01.*--margin", capsys.readouterr().out)
    assert compare.main([str(first), str(second), "--promote", "pets", "--margin", "0.05"]) == 0
    assert champion() == "2"


def test_a_promotion_that_another_overtook_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = registered_run("first", seed=0)
    compare.main([str(first), "--promote", "pets"])
    second = registered_run("second", seed=1, skill=2.5)

    def meanwhile(test: PairedTest, margin: float) -> promotion.Decision:
        registered_run("third", seed=2)
        return decide(test, margin)

    monkeypatch.setattr(promotion, "decide", meanwhile)
    assert compare.main([str(first), str(second), "--promote", "pets"]) == 2
    assert "aliases of pets" in capsys.readouterr().err
    assert champion() == "1"


def test_predictions_of_another_checkpoint_than_was_registered_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = registered_run("first", seed=0)
    compare.main([str(first), "--promote", "pets"])
    second = registered_run("second", seed=1)
    client = mlflow.MlflowClient()
    run_id = client.get_model_version("pets", "1").run_id
    client.log_artifact(run_id, str(second / "val_predictions.npz"))  # as a resumed run would
    assert compare.main([str(second), "--promote", "pets"]) == 2
    assert "version 1 " in capsys.readouterr().err
    save_checkpoint(
        {"run_id": client.get_model_version("pets", "2").run_id, "later": 1},
        second / "checkpoints" / "best.pt",
    )
    assert compare.main([str(first), str(second), "--promote", "pets"]) == 2
    assert re.search(r"version 2 .*second/checkpoints/best\.pt", capsys.readouterr().err)
    assert champion() == "1"


@pytest.mark.parametrize("precisions", [("fp32", "int8"), ("fp16", "fp32")])
def test_float32_answers_do_not_judge_a_file_of_lower_precision(
    precisions: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """They differ from those of an int8 file by as much as its conversion may lose."""
    for alias, seed, precision in zip(("champion", "challenger"), (0, 1), precisions, strict=True):
        folder = registered_run(alias, seed, skill=3.0, precision=precision)
        mlflow.MlflowClient().set_registered_model_alias("pets", alias, str(seed + 1))
    assert compare.main([str(folder), "--promote", "pets"]) == 2
    assert re.search("version . is a file in (int8|fp16).*evaluate", capsys.readouterr().err)
    assert champion() == "1"


def test_a_champion_without_predictions_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    first = registered_run("first", seed=0)
    compare.main([str(first), "--promote", "pets"])
    client = mlflow.MlflowClient()
    artifacts = client.get_run(client.get_model_version("pets", "1").run_id).info.artifact_uri
    (Path(artifacts.removeprefix("file://")) / "val_predictions.npz").unlink()
    second = registered_run("second", seed=1)
    assert compare.main([str(second), "--promote", "pets"]) == 2
    assert re.search(r"run first .*val_predictions\.npz", capsys.readouterr().err)
    assert compare.main([str(first), str(second), "--promote", "pets"]) in (0, 1)


def test_no_shared_images_no_promotion(capsys: pytest.CaptureFixture[str]) -> None:
    first = registered_run("first", seed=0, n=100, skill=2.5)
    compare.main([str(first), "--promote", "pets"])
    second = registered_run("second", seed=1, n=50)
    answers = StoredAnswers.load(second)
    replace(answers, paths=[f"{path}.jpg" for path in answers.paths]).save(second)
    assert compare.main([str(first), str(second), "--promote", "pets"]) == 2
    assert "--val-data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--promote", "dogs"], "dogs"),
        (["--promote", "pets", "--margin", "0"], "--margin 0.0"),
        (["--promote", "pets", "--margin", "1"], "--margin 1.0"),
    ],
)
def test_an_unusable_request_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("a"))
    assert compare.main(["a", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_challenger_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    mlflow.MlflowClient().create_registered_model("pets")
    make_run(Path("a"))
    assert compare.main(["a", "--promote", "pets"]) == 2
    assert "export/main.py --run RUN --register pets" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    make_run(Path("a"))
    assert compare.main(["a", "--promote", "pets"]) == 2
    assert "MLflow at http://127.0.0.1:9" in capsys.readouterr().err
