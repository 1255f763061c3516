"""python serve/main.py as a user starts it: by path, from elsewhere, on folders as they are found."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pyarrow import parquet
from serve_model import (
    CLASS_NAMES,
    broken_files,
    build_model,
    encode,
    solid,
)

from serve import Classifier
from serve.contract.doubts import NARROW
from serve.contract.errors import UserError
from serve.contract.metadata import (
    EMBEDDINGS_NAME,
    INPUT_NAME,
    LOGITS_NAME,
    PROBABILITIES_NAME,
    ModelMetadata,
)
from serve.contract.preprocess import Preprocess
from serve.inputs.sources import open_source
from serve.main import main
from serve.predictor import Predictor
from serve.progress import Progress, resampling_warning

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "serve" / "main.py"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx", ("red", "green"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images in a folder."""
    root = tmp_path / "images"
    root.mkdir()
    for number, colour in enumerate((RED, GREEN, BLUE)):
        (root / f"{number}.png").write_bytes(encode(solid(colour), "PNG"))
    return root


def run(
    cwd: Path, *arguments: object, command: tuple[object, ...] = (sys.executable, SCRIPT)
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in (*command, *arguments)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_image_can_be_given_instead_of_a_folder(tmp_path: Path, model: Path, images: Path) -> None:
    done = run(tmp_path, "--model", model, "--images", images / "1.png")
    assert done.returncode == 0
    rows = read_csv(tmp_path / "predictions.csv")
    assert [(row["path"], row["label"]) for row in rows] == [("1.png", "green")]


def test_a_run_directory_is_its_exported_model(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, out = tmp_path / "runs" / "a", tmp_path / "out.csv"
    (run_folder / "checkpoints").mkdir(parents=True)
    arguments = ["--model", str(run_folder), "--images", str(images), "--output", str(out)]
    assert main(arguments) == 2
    assert f"export/main.py --run {run_folder}" in capsys.readouterr().err
    (run_folder / "export").mkdir()
    shutil.copy(model, run_folder / "export")
    assert main(arguments) == 0
    assert f"{run_folder}/export/model.onnx" in capsys.readouterr().err
    assert main([*arguments[:-1], f"{run_folder}/export/model.onnx", "--overwrite"]) == 2
    assert main(["--model", str(images), *arguments[2:]]) == 2
    assert "export/model.onnx" in capsys.readouterr().err


def test_what_looks_wrong_and_what_is_left_out_is_named_at_the_end(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48)
    Image.fromarray(narrow).save(images / "narrow.png")
    (images / "camera.JXL").write_bytes(b"\xff\x0a")
    arguments = ["--model", str(model), "--images", str(images), "--output", str(tmp_path / "out.csv")]
    assert main(arguments) == 0
    errors = capsys.readouterr().err
    assert "'narrow.png'" in errors
    assert NARROW in errors
    assert ".jxl 1" in errors
    assert len(read_csv(tmp_path / "out.csv")) == 4


def test_ordinary_pictures_bring_no_warning(
    tmp_path: Path, model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "labels.txt").touch()
    arguments = ["--model", str(model), "--images", str(images), "--output", str(tmp_path / "out.csv")]
    assert main(arguments) == 0
    assert "warning" not in capsys.readouterr().err


def test_system_folders_are_reported(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("@eaDir", "sub/@eaDir", "lost+found"):
        (images / name).mkdir(parents=True)
    Progress(3).print_end("out.csv", open_source(str(images)))
    assert "@eaDir 2, lost+found 1" in capsys.readouterr().err


SAMPLE = "id,label\r\n3,0.5\r\n1,0.5\r\n0,0.5\r\n"


def test_a_submission_is_as_its_sample(tmp_path: Path, two_classes: Path, images: Path) -> None:
    (images / "3.jpg").write_bytes(b"")
    (images / "4").symlink_to(".")
    (tmp_path / "sample.csv").write_bytes(SAMPLE.encode())
    arguments = ("--model", two_classes, "--images", images, "--sample-submission", "sample.csv")
    done = run(tmp_path, *arguments, "--output", "submission.csv")
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "submission.csv")
    assert [row["id"] for row in rows] == ["3", "1", "0"]
    assert rows[0]["label"] == "0.5"
    assert [float(row["label"]) > 0.5 for row in rows[1:]] == [True, False]
    assert (tmp_path / "submission.csv").read_bytes().count(b"\r\n") == 4
    assert re.search(r"\b3 rows\b.*\b2 scored\b.*\b1 error", done.stdout)
    assert "'3.jpg'" in done.stderr
    assert "'2.png'" in done.stderr


def test_a_submission_is_made_of_tar_files_and_lists_too(
    tmp_path: Path, two_classes: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "k.tar", "w") as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, path.name)
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        tar.addfile(link)
    (tmp_path / "list.txt").write_text("images/0.png\nimages/3.jpg\nimages/1.png\n")
    (tmp_path / "sample.csv").write_text(SAMPLE)
    written = []
    for source in ("k.tar", "list.txt"):
        output = tmp_path / f"{source}.csv"
        arguments = ["--model", two_classes, "--images", tmp_path / source, "--output", output]
        assert main([*map(str, arguments), "--sample-submission", str(tmp_path / "sample.csv")]) == 0
        written.append(output.read_text())
    assert written[0] == written[1]
    assert "'k.tar/3.jpg'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["--shard", "0/2"],
        ["--resume"],
        ["--top-k", "1"],
        ["--format", "jsonl"],
        ["--output", "out.parquet"],
        ["--output", "sample.csv"],
        ["--images", "images/0.png"],
        ["--sample-submission", "missing.csv"],
    ],
    ids=" ".join,
)
def test_what_a_submission_cannot_be_is_refused_before_scoring(
    tmp_path: Path,
    two_classes: Path,
    images: Path,
    given: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.csv").write_bytes(SAMPLE.encode())
    fixed = ["--model", str(two_classes), "--images", str(images), "--sample-submission", "sample.csv"]
    assert main([*fixed, *given]) == 2
    assert "--sample-submission" in capsys.readouterr().err
    assert (tmp_path / "sample.csv").read_bytes() == SAMPLE.encode()
    assert {path.name for path in tmp_path.iterdir()} == {"images", "sample.csv"}


@pytest.mark.parametrize("closed", [False, True], ids=["full", "closed"])
def test_nobody_who_listens_costs_no_finished_job(
    tmp_path: Path, model: Path, images: Path, closed: bool
) -> None:
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--images", str(images)]
    with open("/dev/full", "w") as full:
        code = subprocess.run(
            [*command, "--output", "prédiction.csv"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL if closed else full,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=False,
        ).returncode
    assert code == 0
    assert (tmp_path / "prédiction.csv").is_file()


def test_a_reader_of_messages_that_leaves_costs_no_row(tmp_path: Path, model: Path, images: Path) -> None:
    """As of `... 2>&1 | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--images", str(images)]
    code = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=write, check=False).returncode
    os.close(write)
    assert code == 0
    assert len(read_csv(tmp_path / "predictions.csv")) == len(list(images.iterdir()))


def test_nothing_scored_is_exit_code_1_with_the_reasons_in_the_rows(tmp_path: Path, model: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, (data, _) in broken_files().items():
        (tmp_path / "images" / name).write_bytes(data)
    done = run(tmp_path, "--model", model, "--images", "images")
    assert done.returncode == 1
    assert all(row["error"] for row in read_csv(tmp_path / "predictions.csv"))
    assert f"0 scored, {len(broken_files())} errors" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["--format", "jsonl", "--embeddings"]], ids=["plain", "embeddings"]
)
def test_a_model_out_of_memory_is_exit_code_2_that_names_the_batch_size(
    arguments: list[str],
    images: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """onnxruntime itself fails: its model wants more bytes than there are addresses."""
    names = (LOGITS_NAME, PROBABILITIES_NAME, EMBEDDINGS_NAME)
    graph = helper.make_graph(
        [helper.make_node("Shape", [INPUT_NAME], ["of input"])]
        + [helper.make_node("Mul", ["of input", "many"], ["large"])]
        + [helper.make_node("ConstantOfShape", ["large"], [name]) for name in names],
        "greedy",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(np.array([2**20, 2**8, 2**8, 2**8]), "many")],
    )
    greedy = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    class Greedy(Predictor):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.session = ort.InferenceSession(greedy.SerializeToString())

    monkeypatch.setattr("serve.main.Predictor", Greedy)
    monkeypatch.chdir(images.parent)
    code = main(["--model", str(model), "--images", str(images), "--batch-size", "3", *arguments])
    assert code == 2
    printed = capsys.readouterr().err
    assert re.search(r"cpu.*\b3\b", printed)
    assert "--batch-size" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "missing.onnx"], ["missing.onnx"]),
        (["--model", "images/0.png"], ["images/0.png", "ONNX"]),
        (["--images", "missing"], ["--images", "'missing'"]),
        (["--images", "empty"], ["'empty'", "0 other"]),
        (["--images", "texts"], ["'texts'", "2 other"]),
        (["--output", "missing/out.csv"], ["--output", "missing/out.csv"]),
        (["--output", "empty"], ["--output", "'empty'"]),
        (["--output", "/proc/out.csv"], ["--output", "'/proc'"]),
        (["--output", "/proc", "--shard", "0/2"], ["--output", "'/proc'"]),
        (["--output", "fifo"], ["--output", "'fifo'"]),
        (["--output", "-"], ["--output", "'-'"]),
        (["--output", "new/"], ["--output", "'new/'"]),
        (["--images", "texts/a.txt", "--output", "texts/a.txt", "--format", "csv"], ["--images"]),
        (["--output", "a.png", "--format", "csv"], ["--output", "a.png"]),
        (["--output", "B.TAR", "--format", "csv"], ["--output", "B.TAR"]),
        (["--submission-values", "class"], ["--sample-submission"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--workers", "-1"], ["--workers -1"]),
        (["--image-timeout", "-1"], ["--image-timeout -1"]),
        (["--image-timeout", "nan"], ["--image-timeout nan"]),
        (["--part-size", "0"], ["--part-size 0"]),
        (["--top-k", "4"], ["--top-k 4", "3"]),
        (["--top-k", "-1"], ["--top-k -1"]),
        (["--shard", "2/2"], ["--shard", "2/2"]),
        (["--shard", "auto/2"], ["JOB_COMPLETION_INDEX"]),
        (["--shard", "0/2", "--output", "images/0.png"], ["images/0.png"]),
        (["--output", "out.json"], ["'.json'", ".csv, .jsonl"]),
        (["--embeddings"], ["--embeddings", "jsonl", "csv"]),
        (["--embeddings", "--format", "jsonl"], ["'embeddings'"]),
        (["--images", "*.nothing"], ["*.nothing"]),
        (["--images", "texts/a.txt"], ["texts/a.txt"]),
        (["--threads", "-1"], ["--threads -1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_arguments_are_exit_code_2_one_line_and_no_output(
    tmp_path: Path, model: Path, images: Path, arguments: list[str], named: list[str]
) -> None:
    for name in ("empty", "texts"):
        (tmp_path / name).mkdir()
    for name in ("texts/a.txt", "texts/b.onnx"):
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, "--model", model, "--images", images, *arguments)  # argparse: the last one counts
    assert done.returncode == 2
    assert all(text in done.stderr for text in named)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("scoring ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_other_formats_by_their_suffix_with_embeddings(tmp_path: Path, images: Path, name: str) -> None:
    model = build_model(tmp_path / "m.onnx", outputs=("logits", "probabilities", "embeddings"))
    (images / "broken.png").write_bytes(b"")
    options = ("--output", name, "--top-k", 1, "--embeddings")
    done = run(tmp_path, "--model", model, "--images", images, *options)
    assert done.returncode == 0, done.stderr
    if name.endswith("jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    else:
        rows = parquet.read_table(tmp_path / name).to_pylist()
    assert [row["label"] for row in rows] == ["red", "green", "blue", None]
    assert [row["embedding"] for row in rows] == [[255, 0, 0], [0, 255, 0], [0, 0, 255], None]
    assert [row["error"] for row in rows] == [None, None, None, "empty file (0 bytes)"]


def test_a_shard_by_kubernetes_number_and_the_merged_whole(
    tmp_path: Path, model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(2):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        options = ("--shard", "auto/2", "--output", "parts", "--batch-size", 2)
        done = run(tmp_path, "--model", model, "--images", images, *options)
        assert done.returncode == 0, done.stderr
        assert f"part-0000{index}-of-00002.csv: {2 - index} scored" in done.stdout
    merge = (sys.executable, REPOSITORY / "serve" / "merge.py")
    done = run(tmp_path, "parts", "--output", "merged.csv", command=merge)
    assert "3 scored, 0 errors" in done.stdout
    assert [row["label"] for row in read_csv(tmp_path / "merged.csv")] == ["red", "green", "blue"]


def test_the_limit_of_pixels_is_raised_by_its_flag_and_resumed_with_another_job(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name, size in (("large.png", (1100, 1000)), ("small.png", (20, 20))):
        Image.new("RGB", size).save(tmp_path / "in" / name)
    output = tmp_path / "scores.csv"
    flags = ["--model", str(model), "--images", str(tmp_path / "in"), "--output", str(output), "--resume"]
    for limit, errors in (("1", 1), ("108", 0), ("1", 1)):
        assert main([*flags, "--max-megapixels", limit]) == 0
        assert ("GB" in capsys.readouterr().err) == (limit == "108")
        with output.open(newline="") as file:
            reasons = [row["error"] for row in csv.DictReader(file) if row["error"]]
        assert len(reasons) == errors
        assert all("--max-megapixels" in reason for reason in reasons)
    assert main([*flags, "--max-megapixels", "nan"]) == 2
    (answer,) = Classifier(model, max_megapixels=1)([tmp_path / "in" / "large.png"])
    assert answer.error
    with pytest.raises(UserError, match="--max-megapixels"):
        Classifier(model, max_megapixels=0)


def test_a_failed_run_leaves_the_predictions_of_the_last_one(tmp_path: Path, model: Path) -> None:
    (tmp_path / "predictions.csv").write_text("yesterday's\n")
    assert run(tmp_path, "--model", model, "--images", "missing").returncode == 2
    assert (tmp_path / "predictions.csv").read_text() == "yesterday's\n"


def test_the_provider_and_its_share_are_printed(tmp_path: Path, model: Path, images: Path) -> None:
    done = run(tmp_path, "--model", model, "--images", images)
    for text in ("red, green, blue", "cpu", "fp32", "4 of 4 nodes", "auto", "cuda"):
        assert text in done.stderr


def test_a_clone_started_by_path_runs_its_own_code_whatever_is_installed(tmp_path: Path) -> None:
    clone = tmp_path / "clone" / "serve"
    shutil.copytree(REPOSITORY / "serve", clone)
    with (clone / "batch.py").open("a") as file:
        file.write("\nprint('the clone is', __file__)\n")
    done = run(tmp_path, "--help", command=(sys.executable, clone / "main.py"))
    assert done.stdout.startswith(f"the clone is {clone / 'batch.py'}\n"), done.stderr


# -- serving stands alone --------------------------------------------------------------------------------

TRAINING_ONLY = ("torch", "torchvision", "mlflow", "pandas", "onnx", "jsonargparse")


def test_serving_imports_nothing_of_training(tmp_path: Path, model: Path, images: Path) -> None:
    unwanted = (*TRAINING_ONLY, "train", "export", "onnxruntime_ep_openvino", "urllib.request")
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['main.py', '--model', {str(model)!r}, '--images', {str(images)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        f"print('imported:', [name for name in {unwanted!r} if name in sys.modules])\n"
    )
    done = run(tmp_path, command=(sys.executable, "-c", program))
    assert "3 scored" in done.stdout, done.stderr
    assert "imported: []" in done.stdout


@pytest.mark.slow
def test_the_base_install_scores_on_a_machine_without_torch(
    tmp_path: Path, model: Path, images: Path
) -> None:
    source, python = tmp_path / "source", tmp_path / "venv" / "bin" / "python"
    for package in ("train", "export", "serve"):
        shutil.copytree(
            REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(REPOSITORY / "pyproject.toml", source)
    (source / "README.md").touch()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", source], check=True, timeout=300
    )
    shutil.rmtree(source)

    program = f"import importlib.util as u; print([n for n in {TRAINING_ONLY!r} if u.find_spec(n)])"
    assert run(tmp_path, command=(python, "-c", program)).stdout == "[]\n"
    done = run(tmp_path, "--model", model, "--images", images, command=(python, "-m", "serve.main"))
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in read_csv(tmp_path / "predictions.csv")] == ["red", "green", "blue"]


def test_help_names_the_flags(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--model" in done.stdout


def test_another_pillow_than_the_verified_one_is_warned_of() -> None:
    """Its resampling changed between major versions, and resized pixels with it."""
    this = ModelMetadata(CLASS_NAMES, Preprocess(), versions={"pillow": PIL.__version__})
    other = ModelMetadata(CLASS_NAMES, Preprocess(), versions={"pillow": "3.1.4"})
    assert resampling_warning(this) == ""
    assert "3.1.4" in resampling_warning(other)
