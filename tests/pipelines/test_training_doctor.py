"""The doctor finds what would stop a training before it starts, and leaves no trace."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_data import flat_set

import pipelines.doctor as doctor
from export.convert import to_graph
from pipelines.doctor import main
from train.engine import device as device_module
from train.models.zoo import SimpleCNN


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory of a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device_module, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(device_module, "CONTROL_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "to_graph", lambda scorer, size: None)  # seconds in each test
    return tmp_path


def diagnosis(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Return the exit code, and the level of each check by what it is about."""
    code = main(argv)
    lines = capsys.readouterr().out.splitlines()
    return code, {line[8:].split(":")[0].split(" ")[0]: line.split()[0] for line in lines}


def test_a_usable_machine_and_data_set_are_ok_and_nothing_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat_set(folder / "images")
    before = sorted(folder.rglob("*"))
    code, found = diagnosis(["--data", "images", "--model", "simple_cnn"], capsys)
    assert code == 0
    assert "error" not in found.values()
    for about in ("versions", "device", "processors", "shared", "write", "MLflow", "onnxruntime", "batch"):
        assert about in found
    assert found["settings"] == found["--data"] == "ok"
    assert sorted(folder.rglob("*")) == before


def test_the_data_set_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat_set(folder / "images" / "train", 5)
    flat_set(folder / "images" / "val", 3)
    main(["--data", "images", "--model", "simple_cnn"])
    printed = capsys.readouterr().out
    assert "--data images/train: 10 images: 'cat' 5, 'dog' 5" in printed
    assert "--val-data images/val: 6 images" in printed


@pytest.mark.parametrize(
    ("argv", "about"),
    [
        (["--data", "nowhere"], "--data"),
        (["--exclude", "nowhere.csv"], "--data"),
        (["--batch-size", "127", "--nproc_per_node", "2"], "batch"),
        (["--device", "cuda"], "device"),
        (["--model", "no_such_model"], "settings"),
        (["--weights", "nowhere.pt"], "settings"),
        (["--output", "file/runs"], "write"),
    ],
)
def test_what_would_stop_the_training_is_an_error(
    argv: list[str], about: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat_set(folder / "images")
    (folder / "file").write_text("")
    code, found = diagnosis(["--data", "images", "--model", "simple_cnn", *argv], capsys)
    assert (code, found[about]) == (1, "error")


@pytest.mark.parametrize("problem", ["one class", "two spellings", "other classes"])
def test_labels_that_would_stop_the_training_are_an_error(
    problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"one class": ["cat"], "two spellings": ["cat", "Cat"]}.get(problem, ["cat", "dog"])
    flat_set(folder / "images")
    images = sorted(path.name for path in (folder / "images").iterdir())
    for file, labels in (("train", names), ("val", ["cat", "cow"])):
        rows = [f"{image},{labels[i % len(labels)]}" for i, image in enumerate(images)]
        (folder / "images" / f"{file}.csv").write_text("\n".join(["path,label", *rows]))
    flags = ["--val-data", "images/val.csv"] if problem == "other classes" else []
    code, found = diagnosis(["--data", "images/train.csv", "--model", "simple_cnn", *flags], capsys)
    assert (code, found["--data"]) == (1, "error")


def test_a_network_that_torch_cannot_export_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat_set(folder / "images")
    monkeypatch.setattr(doctor, "to_graph", to_graph)
    assert diagnosis(["--data", "images", "--model", "simple_cnn"], capsys)[1]["export"] == "ok"
    monkeypatch.setattr(SimpleCNN, "forward", lambda self, x: torch.special.bessel_j0(x).flatten(1)[:, :2])
    code, found = diagnosis(["--data", "images", "--model", "simple_cnn"], capsys)
    assert (code, found["settings"], found["export"]) == (1, "ok", "error")


def test_memory_is_that_of_the_container(folder: Path) -> None:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text("0::/\n")
    (folder / "sys/fs/cgroup").mkdir(parents=True)
    (folder / "sys/fs/cgroup/memory.max").write_text(f"{2**29}\n")
    finding = doctor.check_memory(folder)
    assert finding.level == "warning"
    assert "of 0.5 GiB" in finding.message


def test_a_driver_that_torch_cannot_use_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05\n")
    assert diagnosis([], capsys)[1]["device"] == "error"
    assert diagnosis(["--device", "cpu"], capsys)[1]["device"] == "ok"


def test_broken_images_are_found_in_a_sample_of_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list(flat_set(folder / "images", 60).iterdir())[::2]:
        path.write_bytes(path.read_bytes()[:40])
    assert diagnosis(["--data", "images", "--model", "simple_cnn"], capsys)[1]["--data"] == "error"


def test_a_server_that_does_not_answer_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SERVER_SECONDS", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert diagnosis([], capsys)[1]["MLflow"] == "warning"
    assert diagnosis(["--track", "false"], capsys)[1]["MLflow"] == "ok"
    for uri, level in (("./mlruns", "warning"), ("file:///srv/mlruns", "warning"), ("databricks", "ok")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert doctor.check_mlflow(doctor.read_arguments([])[0]).level == level


@pytest.mark.parametrize("argv", [["--learning-rate", "1"], ["--nproc-per-node", "none"], ["--lr", "-1"]])
def test_unusable_flags_are_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().out == ""


def test_gpus_compute_and_each_needs_a_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = torch.device("cpu")
    pretended = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "is_bf16_supported": lambda including_emulation: True,
        "mem_get_info": lambda device: (2**33, 2**34),
        "get_device_name": lambda device: "Pretended",
        "get_device_capability": lambda device: (8, 0),
        "get_arch_list": lambda: ["sm_80"],
    }
    for name, function in pretended.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(doctor, "torch", SimpleNamespace(**{**vars(torch), "device": lambda *_: cpu}))
    config = doctor.read_arguments([])[0]
    for processes, expected in ((2, ["ok"] * 3), (1, ["ok", "warning", "ok", "ok"]), (3, ["ok", "error"])):
        found = [finding.level for finding in doctor.check_devices(config, processes)]
        assert found[: len(expected)] == expected
    pretended_old = lambda: ["sm_90"]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_arch_list", pretended_old)
    assert [f.level for f in doctor.check_devices(config, 2)] == ["ok", "error", "error"]
