"""A job cut into shards and pieces: every input in exactly one, and only what is whole is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.contract.files import file_sha256
from serve.shards import Job, Manifest, Shard, cut, finished_part, manifest_path

JOB = Job("model", "inputs", 10, {"format": "csv", "top_k": 0})


@given(total=st.integers(0, 10_000), count=st.integers(1, 300), batch_size=st.integers(1, 70))
def test_every_input_is_in_exactly_one_shard_and_batches_are_never_cut(
    total: int, count: int, batch_size: int
) -> None:
    ranges = [Shard(i, count).rows(total, batch_size) for i in range(count)]
    assert [row for rows in ranges for row in rows] == list(range(total))
    assert all(rows.start % batch_size == 0 or rows.start == total for rows in ranges)
    batches = [-(-len(rows) // batch_size) for rows in ranges]
    assert max(batches) - min(batches) <= 1


@given(st.integers(0, 1000), st.integers(0, 3000), st.integers(1, 500), st.integers(1, 70))
def test_pieces_are_of_whole_batches_and_cover_a_shard(
    first_batch: int, length: int, part_size: int, batch_size: int
) -> None:
    rows = range(first_batch * batch_size, first_batch * batch_size + length)
    pieces = list(cut(rows, part_size, batch_size))
    assert [row for piece in pieces for row in piece] == list(rows)
    assert all(piece.start % batch_size == 0 for piece in pieces)
    assert all(len(piece) < part_size + batch_size for piece in pieces)


def test_a_shard_is_named_by_numbers_or_by_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    assert Shard.parse("0/1") == Shard(0, 1)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "7")
    assert Shard.parse("auto/8") == Shard(7, 8)
    assert Shard(7, 8).part_name(".csv") == "part-00007-of-00008.csv"
    assert Shard(123456, 200000).part_name(".jsonl") == "part-123456-of-200000.jsonl"


@pytest.mark.parametrize(
    "text",
    [
        "8/8",
        "-1/8",
        "1",
        "a/b",
        "1/0",
        "/",
        "1/8/9",
        "auto/7",
        "auto/x",
        "auto/",
        "auto/0",
        "²/8",
        "0/1000001",
    ],
)
def test_a_shard_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "7")
    with pytest.raises(ValueError, match=r"--shard"):
        Shard.parse(text)
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX"):
        Shard.parse("auto/8")


def part_with_manifest(folder: Path) -> tuple[Path, Manifest]:
    part = folder / "part-00000-of-00002.csv"
    part.write_text("path\na.jpg\n")
    manifest = Manifest(JOB, 0, 1, 0, file_sha256(part), {"provider": "cpu"})
    manifest.write(part)
    return part, manifest


def test_a_finished_part_is_known_by_its_manifest(tmp_path: Path) -> None:
    part, manifest = part_with_manifest(tmp_path)
    assert finished_part(part, JOB, range(0, 1)) == manifest == Manifest.read(part)


@pytest.mark.parametrize("what", ["model_sha256", "inputs_sha256", "total", "settings"])
def test_a_part_of_another_job_is_not_finished(tmp_path: Path, what: str) -> None:
    part, _ = part_with_manifest(tmp_path)
    assert finished_part(part, replace(JOB, **{what: "other"}), range(0, 1)) is None


def test_other_rows_or_damage_make_a_part_unfinished(tmp_path: Path) -> None:
    part, _ = part_with_manifest(tmp_path)
    assert finished_part(part, JOB, range(0, 2)) is None
    assert finished_part(part, JOB, range(1, 2)) is None
    whole = part.read_bytes()
    for damaged in (whole[:-1], whole + b"b.jpg\n", whole.replace(b"a", b"c"), b""):
        part.write_bytes(damaged)
        assert finished_part(part, JOB, range(0, 1)) is None
    part.unlink()
    assert finished_part(part, JOB, range(0, 1)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"part-00000-of-00002\.csv\.json"),
        ("[]", r"part-00000-of-00002\.csv\.json"),
        ("{}", r"part-00000-of-00002\.csv\.json"),
        ('{"format_version": 1}', r"part-00000-of-00002\.csv\.json"),
        ('{"format_version": 1, "job": {"a": 1}}', r"part-00000-of-00002\.csv\.json"),
        ('{"format_version": 2}', "format_version 2"),
        (None, r"part-00000-of-00002\.csv\.json"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    part, _ = part_with_manifest(tmp_path)
    if text is None:
        manifest_path(part).unlink()
    else:
        manifest_path(part).write_text(text)
    with pytest.raises(ValueError, match=reason):
        Manifest.read(part)
    assert finished_part(part, JOB, range(0, 1)) is None


@pytest.mark.parametrize(
    "changes",
    [{"errors": 2}, {"transient": 1}, {"errors": -1}, {"rows": True}, {"first": "0"}, {"errors": 0.0}],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    part, _ = part_with_manifest(tmp_path)
    values = json.loads(manifest_path(part).read_text())
    manifest_path(part).write_text(json.dumps(values | changes))
    with pytest.raises(ValueError, match=r"first, rows, errors, transient, total"):
        Manifest.read(part)


def test_a_manifest_is_readable_json(tmp_path: Path) -> None:
    part, _ = part_with_manifest(tmp_path)
    values = json.loads(manifest_path(part).read_text())
    assert values["job"]["settings"] == {"format": "csv", "top_k": 0}
    assert (values["first"], values["rows"]) == (0, 1)
