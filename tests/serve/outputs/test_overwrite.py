"""A file of the user's is never replaced without --overwrite; predictions are."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_model import broken_files, build_model, encode, solid

from serve import main as serve_main
from serve.merge import main as merge_main

Score = Callable[..., int]
SUBMISSION = ("--sample-submission", "sample.csv")
LABELS = b"path,label\na.png,cat\n"
FOREIGN = {
    "labels": LABELS,
    "labels with a probability": b"path,label,probability\na.png,cat,1\n",
    "soft labels": b"path,label,probability_cat,probability_dog\na.png,cat,1,0\n",
    "predictions with a column of notes": b"path,label,probability,probability_red,notes,error\n",
    "predictions that a spreadsheet saved": b"path,label,probability,probability_red,error\r\n",
    "predictions with a byte order mark": b"\xef\xbb\xbfpath,label,probability,probability_red,error\n",
    "labels of the sample's ids": b"id,label\na,0\n",
    "names of the sample's ids": b"id,label\na,dog\n",
    "a submission, which may be another model's": b"id,label\na,0.25\n",
    "JSON": b'{"path": 1}\n',
    "JSON in JSON": b'{"path":' + b"[" * 100_000 + b"\n",
    "a number": b"7\n",
    "a quote left open": b'path,"label\n',
    "a binary file": bytes(range(256)) * 9,
    "a file that begins as Parquet": b"PAR1" + bytes(99),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model.onnx", ("red", "green\nor blue"))


@pytest.fixture
def score(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.csv").write_text("id,label\na,0.5\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(solid((255, 0, 0)), "PNG"))

    def run(*arguments: object) -> int:
        fixed = ("--model", model, "--images", tmp_path / "in", "--workers", 1)
        return serve_main.main([str(part) for part in (*fixed, *arguments)])

    return run


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("how", [(), ("--resume",), SUBMISSION], ids=["plain", "resume", "submission"])
def test_what_is_not_ours_is_kept(
    tmp_path: Path, score: Score, name: str, how: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_bytes(FOREIGN[name])
    assert score("--output", output, *how) == 2
    assert output.read_bytes() == FOREIGN[name]
    assert "--overwrite" in capsys.readouterr().err
    assert score("--output", output, *how, "--overwrite") == 0
    assert output.read_bytes() != FOREIGN[name]


@pytest.mark.parametrize(
    "how",
    [
        ("out.csv",),
        ("out.csv", "--resume"),
        ("out.csv", "--top-k", "2"),
        ("out.jsonl",),
        ("out.jsonl", "--top-k", "1"),
        ("out.parquet",),
        ("parts", "--shard", "0/1"),
    ],
    ids=" ".join,
)
def test_the_same_command_replaces_its_own_output(
    tmp_path: Path, score: Score, how: tuple[str, ...]
) -> None:
    (tmp_path / "in" / "b.png").write_bytes(broken_files()["empty.jpg"][0])
    for _ in range(2):
        assert score("--output", tmp_path / how[0], *how[1:]) == 0


def test_an_empty_file_a_link_and_another_format_of_ours_are_written(tmp_path: Path, score: Score) -> None:
    made, link = tmp_path / "made.csv", tmp_path / "link.csv"
    made.touch()
    link.symlink_to(made)
    for arguments in ((link,), (made, "--format", "jsonl"), (made, *SUBMISSION)):
        assert score("--output", *arguments) == 0
    assert link.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_bytes(LABELS)
    assert score("--output", link) == 2
    assert (tmp_path / "labels.csv").read_bytes() == LABELS


@pytest.mark.parametrize(
    "how", [("out.csv", "--resume"), ("parts", "--shard", "0/1")], ids=["file", "shard"]
)
def test_a_users_json_file_is_not_replaced_by_a_manifest(
    tmp_path: Path, score: Score, how: tuple[str, ...]
) -> None:
    (tmp_path / "parts").mkdir()
    place = "parts/part-00000-of-00001.csv.json" if how[0] == "parts" else "out.csv.json"
    (tmp_path / place).write_text('{"mine": 1}')
    assert score("--output", tmp_path / how[0], *how[1:]) == 2
    assert (tmp_path / place).read_text() == '{"mine": 1}'


def test_a_merged_file_replaces_neither_labels_nor_inputs(tmp_path: Path, score: Score) -> None:
    assert score("--output", tmp_path / "parts", "--shard", "0/1") == 0
    labels = tmp_path / "labels.csv"
    labels.write_bytes(LABELS)
    command = [str(tmp_path / "parts"), "--output", str(labels)]
    assert merge_main(command) == 2
    assert labels.read_bytes() == LABELS
    assert merge_main([*command, "--overwrite"]) == 0
    assert merge_main(command) == 0


def test_with_overwrite_the_input_itself_is_still_no_output(
    tmp_path: Path, score: Score, model: Path
) -> None:
    listed = tmp_path / "list.csv"
    listed.write_bytes(b"path\nin/a.png\n")
    assert score("--images", listed, "--output", listed, "--overwrite") == 2
    assert listed.read_bytes() == b"path\nin/a.png\n"
    before = model.read_bytes()
    assert score("--output", model, "--format", "csv", "--overwrite") == 2
    assert model.read_bytes() == before


def test_standard_output_into_a_file_works_as_before(tmp_path: Path, score: Score) -> None:
    target = os.open(tmp_path / "redirected", os.O_CREAT | os.O_WRONLY)
    try:
        assert score("--output", f"/proc/self/fd/{target}") == 0
    finally:
        os.close(target)
    assert (tmp_path / "redirected").read_bytes().startswith(b"path,label,")
