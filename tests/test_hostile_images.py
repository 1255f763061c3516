"""serve/main.py among hostile files: one truthful row for each input, in order, and an end."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile_images as zoo
import numpy as np
import pytest
from hostile_images import FILES, IGNORED, MEMBERS, NAMES, PLACES, TRAVERSAL, Specimen
from serve_model import CLASS_NAMES, build_model, encode, probabilities_for, solid

from serve.batch import score
from serve.contract.archive import plain
from serve.inputs.inventory import printable
from serve.inputs.sources import open_source
from serve.predictor import Predictor

REPOSITORY = Path(__file__).resolve().parents[1]
# The tests may run as root, whom nothing is forbidden: these privileges are dropped.
AS_A_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx")


def run(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "serve" / "main.py"
    prefix = AS_A_USER if os.geteuid() == 0 else []
    return subprocess.run(
        [*prefix, sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(row: dict[str, str], specimen: Specimen) -> None:
    probabilities = [row[f"probability_{name}"] for name in CLASS_NAMES]
    if isinstance(specimen.outcome, str):
        assert specimen.outcome in row["error"], specimen
        assert [row["label"], row["probability"], *probabilities] == [""] * 5, specimen
        return
    expected = probabilities_for(specimen.outcome)
    assert row["error"] == "", specimen
    assert row["label"] == CLASS_NAMES[int(expected.argmax())]
    np.testing.assert_allclose(np.array(probabilities, float), expected, atol=0.02, err_msg=specimen.what)
    assert row["probability"] == max(probabilities, key=float)


def row_name(specimen: Specimen) -> str:
    if specimen.name == "d":
        return "d/" * zoo.DEPTH + "x.png"
    return specimen.name + ("/" if specimen.name == "closed" else "")


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 2), (7, 4), (32, 0)])
def test_a_hostile_folder(tmp_path: Path, model: Path, batch_size: int, workers: int) -> None:
    root = tmp_path / "zoo"
    root.mkdir()
    specimens = [*FILES, *NAMES, *PLACES]
    for specimen in specimens:
        specimen.put(root)
    options = ("--batch-size", batch_size, "--workers", workers, "--image-timeout", 2)
    done = run(tmp_path, "--model", model, "--images", "zoo", "--output", "out.csv", *options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    inputs = {row_name(s): s for s in specimens if s.outcome != IGNORED}
    rows = rows_of(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [printable(name) for name in sorted(inputs)]
    for name, row in zip(sorted(inputs), rows, strict=True):
        check(row, inputs[name])
    assert "ignored 2 files" in done.stderr


@pytest.mark.parametrize("workers", [1, 4])
def test_a_hostile_tar_file(tmp_path: Path, model: Path, workers: int) -> None:
    zoo.write_tar(tmp_path / "zoo.tar")
    before = sorted(tmp_path.rglob("*"))
    options = ("--workers", workers, "--image-timeout", 2)
    done = run(tmp_path, "--model", model, "--images", "zoo.tar", "--output", "out.csv", *options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out.csv"])
    assert "1 inputs" in done.stderr

    links = [Specimen(what, info.name, b"", error) for info, what, error in MEMBERS]
    specimens = [s for s in [*FILES, *NAMES, *TRAVERSAL, *links] if s.outcome != IGNORED]
    inputs = {f"zoo.tar/{plain(s.name)}": s for s in specimens}
    rows = rows_of(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [printable(name) for name in sorted(inputs)]
    for name, row in zip(sorted(inputs), rows, strict=True):
        check(row, inputs[name])


def test_files_that_change_after_they_were_listed(tmp_path: Path, model: Path) -> None:
    names = [f"{letter}.png" for letter in "abcde"]
    for name in names:
        (tmp_path / name).write_bytes(encode(solid(zoo.RED), "PNG"))
    source = open_source(str(tmp_path))
    for name in names[:3]:
        (tmp_path / name).unlink()
    (tmp_path / "b.png").mkdir()
    os.mkfifo(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(encode(solid(zoo.BLUE), "PNG"))
    rows = list(score(Predictor(model, "cpu", 1), source.inventory.entries(), source.read, 2, 2))
    assert [row.path for row in rows] == names
    assert [row.error for row in rows[:3]] == [outcome for _, outcome in zoo.WHILE_SCORING[:3]]
    for row, colour in zip(rows[3:], (zoo.BLUE, zoo.RED), strict=True):
        np.testing.assert_allclose(row.probabilities, probabilities_for(colour), rtol=1e-5)


@pytest.mark.slow
def test_the_time_limit_counts_no_time_in_which_the_process_stood_still(
    tmp_path: Path, model: Path
) -> None:
    """A laptop that slept, a pod that was frozen: the storage did not hang."""
    images = tmp_path / "images"
    images.mkdir()
    data = zoo.many_scans(20)  # about a third of a second
    for number in range(3):
        (images / f"{number}.jpg").write_bytes(data)
    arguments = ["--model", model, "--images", images, "--output", tmp_path / "out.csv"]
    command = [sys.executable, REPOSITORY / "serve" / "main.py", *arguments, "--image-timeout", 3]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("scoring ")
    time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 0
    assert [row["error"] for row in rows_of(tmp_path / "out.csv")] == ["", "", ""]


def test_the_document_says_what_the_tests_check() -> None:
    made, mark, by_hand = (
        (REPOSITORY / "docs" / "hostile.md").read_text(encoding="utf-8").partition(zoo.BY_HAND)
    )
    assert made == zoo.document(), "run: python tests/hostile_images.py"
    assert mark
    files = {path.name: path for path in (REPOSITORY / "tests").rglob("test_*.py")}
    tested = files["test_tars.py"].read_text(encoding="utf-8")
    assert [reason for _, reason in zoo.DAMAGED_TARS if reason not in tested] == []
    rows = [line for line in by_hand.splitlines() if line.startswith("| ")]
    named = {row.split("|")[3].strip() for row in rows} - {"test"}
    assert named - set(files) == set()
