"""A submission has the sample's header, ids and order, and a value in each row."""

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from written import row_of

from serve.contract.errors import UserError
from serve.inputs.inventory import Entry, Inventory
from serve.outputs.layout import Layout, Row
from serve.outputs.sample import read_sample
from serve.outputs.submission import Submission, make_submission

PETS = ("cat", "dog")


def submission(folder: Path, text: str, images: Iterable[str | Entry]) -> Submission:
    (folder / "s.csv").write_bytes(text.encode())
    inventory = Inventory.sort(Entry(image) if isinstance(image, str) else image for image in images)
    return make_submission(read_sample(str(folder / "s.csv")), PETS, "", inventory)


def sample_of(*ids: str) -> str:
    return "id,label\n" + "".join(f"{text},0.5\n" for text in ids)


@pytest.mark.parametrize(
    ("ids", "images"),
    [
        (("b.jpg", "a.jpg"), ("a.jpg", "b.jpg")),
        (("10", "9", "007"), ("007.jpg", "10.jpg", "9.png")),
        (("test/2.jpg", "test/1.jpg"), ("test/1.jpg", "test/2.jpg")),
        (("test/2", "test/1"), ("test/1.jpg", "test/2.jpg")),
        (("2", "1"), ("deep/1.jpg", "other/2.jpg")),
        (("2.jpg", "1.jpg"), ("images.tar/1.jpg", "images.tar/2.jpg")),
        (("data\\test\\2.jpg", "./test/1.jpg"), ("1.jpg", "2.jpg")),
        (("2.png", "1.png"), ("1.jpg", "2.JPG")),
        (("a.b.2", "a.b.1"), ("a.b.1.jpg", "a.b.2.jpg")),
        (("e\u0301", "f"), ("\u00e9.jpg", "f.jpg")),
    ],
)
def test_each_id_finds_its_image(tmp_path: Path, ids: tuple[str, ...], images: tuple[str, ...]) -> None:
    made = submission(tmp_path, sample_of(*ids), images)
    file = io.BytesIO()
    writer = made.form.open_writer(file, Layout(PETS))
    for number, entry in enumerate(made.inventory.entries()):
        writer.write(row_of(entry.name, 1 - number / 8, number / 8))
    writer.close()
    rows = [f"{text},{number / 8}\n" for number, text in enumerate(ids)]
    assert file.getvalue().decode() == "id,label\n" + "".join(rows)
    assert made.left_out == []


def test_images_that_the_sample_does_not_name_have_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Entry("1", problem="linked folder, not followed")
    made = submission(tmp_path, sample_of("2", "1"), ["1.jpg", "2.jpg", "3.jpg", folder])
    assert [entry.name for entry in made.inventory.entries()] == ["2.jpg", "1.jpg"]
    made.print_start()
    printed = capsys.readouterr().err
    assert "'3.jpg'" in printed
    assert "linked folder" in printed
    assert "'dog'" in printed


@pytest.mark.parametrize(
    ("ids", "images", "named"),
    [
        (("1", "2", "3"), ("1.jpg", "2.jpg"), ["1 of 3", "'3'", "'1.jpg'"]),
        (("1",), ("a/1.jpg", "b/1.jpg"), ["'a/1.jpg'", "'b/1.jpg'", "'1'"]),
        (("1",), ("1.jpg", "1.png"), ["'1.jpg'", "'1.png'"]),
        (("1", "./1"), ("1.jpg",), ["same image"]),
        (("1",), ("0001.jpg",), ["'1'", "'0001.jpg'"]),
    ],
)
def test_an_id_without_its_own_image_is_an_error(
    tmp_path: Path, ids: tuple[str, ...], images: tuple[str, ...], named: list[str]
) -> None:
    with pytest.raises(UserError, match="--sample-submission") as error:
        submission(tmp_path, sample_of(*ids), images)
    assert all(name in str(error.value) for name in named)


def test_the_whole_path_decides_where_names_repeat(tmp_path: Path) -> None:
    made = submission(tmp_path, sample_of("b/1", "a/1"), ["a/1.jpg", "b/1.jpg"])
    assert [entry.name for entry in made.inventory.entries()] == ["b/1.jpg", "a/1.jpg"]


def test_an_unreadable_image_has_a_value_and_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(i) for i in range(30)]
    made = submission(tmp_path, sample_of(*names), [f"{name}.jpg" for name in names])
    file = io.BytesIO()
    writer = made.form.open_writer(file, Layout(PETS))
    for name in names:
        writer.write(Row(f"{name}.jpg", error="truncated"))
    writer.close()
    assert file.getvalue().decode() == sample_of(*names)
    printed = capsys.readouterr().err.splitlines()
    assert "'0.jpg'" in printed[0]
    assert "truncated" in printed[0]
    assert len(printed) < 25
    assert "30" in printed[-1]
