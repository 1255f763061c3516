"""One row for each input, in order, and never another file's answer, whatever fails beside it."""

import csv
import os
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from serve_model import (
    CLASS_NAMES,
    broken_files,
    build_model,
    colour_of,
    encode,
    noise,
    probabilities_for,
    solid,
)

from serve.batch import Row, atomic_writer, check_kaggle, score, write_csv, write_kaggle
from serve.predictor import Predictor

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(build_model(tmp_path_factory.mktemp("model") / "model.onnx"), "cpu", threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, each of its own colour, and every kind of broken file."""
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        image = solid(colour_of(number), (8 + number, 48 - number))
        (root / f"{number}.png").write_bytes(encode(image, "PNG"))
    for name, (data, _) in broken_files().items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "fifo.jpg")
    return root


BROKEN = [*broken_files(), "fifo.jpg", "missing.jpg"]


def broken_at(*positions: int) -> list[str]:
    """NUM_IMAGES files, with broken ones of all kinds at these positions."""
    return [
        BROKEN[i % len(BROKEN)] if i in positions else f"{NUM_IMAGES - 1 - i}.png"
        for i in range(NUM_IMAGES)
    ]


ARRANGEMENTS = {
    "none": broken_at(),
    "the first": broken_at(0),
    "the last": broken_at(NUM_IMAGES - 1),
    "every second": broken_at(*range(0, NUM_IMAGES, 2)),
    "all but one": broken_at(*(i for i in range(NUM_IMAGES) if i != 20)),
    "a whole batch": broken_at(*range(7, 14)),
    "all": broken_at(*range(NUM_IMAGES)),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("batch_size", "decode_threads"), [(1, 1), (2, 8), (7, 2), (32, 4), (100, 3)])
def test_every_file_gets_its_own_answer_whatever_its_neighbours_are(
    predictor: Predictor, folder: Path, arrangement: str, batch_size: int, decode_threads: int
) -> None:
    paths = ARRANGEMENTS[arrangement]
    rows = list(score(predictor, folder, paths, batch_size, decode_threads))
    assert [row.path for row in rows] == paths
    for row in rows:
        if row.path in BROKEN:
            assert row.error
            assert row.probabilities is None
        else:
            assert row.error == ""
            expected = probabilities_for(colour_of(int(Path(row.path).stem)))
            np.testing.assert_allclose(row.probabilities, expected, rtol=1e-5)


def test_rows_kept_are_not_overwritten_by_later_batches(predictor: Predictor, folder: Path) -> None:
    first = next(rows := score(predictor, folder, ARRANGEMENTS["none"], 2, 2))
    assert first.probabilities is not None
    before = first.probabilities.copy()
    list(rows)
    np.testing.assert_array_equal(first.probabilities, before)


def test_each_error_row_says_what_is_wrong_with_that_file(predictor: Predictor, folder: Path) -> None:
    reasons = {name: reason for name, (_, reason) in broken_files().items()}
    reasons |= {"fifo.jpg": "not a regular file", "missing.jpg": "No such file"}
    rows = {row.path: row.error for row in score(predictor, folder, list(reasons), 4, 2)}
    for name, reason in reasons.items():
        assert reason in rows[name]


def test_no_files_no_rows(predictor: Predictor, folder: Path) -> None:
    assert list(score(predictor, folder, [], 8, 2)) == []


@pytest.mark.parametrize(("batch_size", "decode_threads"), [(0, 1), (-1, 1), (1, 0), (1, -2)])
def test_sizes_below_one_are_refused(
    predictor: Predictor, folder: Path, batch_size: int, decode_threads: int
) -> None:
    with pytest.raises(ValueError, match=f"batch_size {batch_size} .*decode_threads {decode_threads} must"):
        next(score(predictor, folder, ["0.png"], batch_size, decode_threads))


def test_memory_is_two_batches_whatever_the_number_of_files(tmp_path: Path) -> None:
    size, batch_size, threads = 256, 4, 2
    (tmp_path / "x.jpg").write_bytes(encode(noise(20, 20), "JPEG"))
    predictor = Predictor(build_model(tmp_path / "m.onnx", size=size), "cpu", threads=1)
    pixels = size * size * 3
    tracemalloc.start()  # sees numpy's arrays
    try:
        rows = score(predictor, tmp_path, ["x.jpg"] * 80, batch_size, threads)
        scored = sum(not row.error for row in rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scored == 80
    # two buffers, and what each thread is resizing; all 80 images would be 80 * pixels
    assert peak < (2 * batch_size + 4 * threads + 2) * pixels


def test_a_consumer_that_stops_leaves_no_thread_behind(predictor: Predictor, folder: Path) -> None:
    rows = score(predictor, folder, ARRANGEMENTS["none"], 4, 3)
    next(rows)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    rows.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


# -- writing ---------------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with atomic_writer(output) as file:
        file.write("고양이\n")
        file.flush()
        assert not output.exists()
    assert output.read_text(encoding="utf-8") == "고양이\n"
    assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_while_writing_leaves_nothing_new(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old.csv").write_text("yesterday's\n")
    for name in ("old.csv", "new.csv"):
        with pytest.raises(error), atomic_writer(tmp_path / name) as file:  # noqa: PT012
            file.write("half of to")
            raise error
    assert os.listdir(tmp_path) == ["old.csv"]
    assert (tmp_path / "old.csv").read_text() == "yesterday's\n"


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Two pods can run the same job at once, on a shared folder, both with process id 1."""
    output = tmp_path / "out.csv"
    with atomic_writer(output) as first:
        first.write("first, a longer text\n")
        with atomic_writer(output) as second:
            second.write("second\n")
        assert output.read_text() == "second\n"
    assert output.read_text() == "first, a longer text\n"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_a_finished_file_can_be_read_by_others(tmp_path: Path) -> None:
    with atomic_writer(tmp_path / "out.csv"):
        pass
    (tmp_path / "plain").touch()
    assert (tmp_path / "out.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """/dev/stdout is a link: it must not become a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "latest.csv").symlink_to("folder/out.csv")
    with atomic_writer(tmp_path / "latest.csv") as file:
        file.write("x")
    assert (tmp_path / "latest.csv").is_symlink()
    assert (tmp_path / "folder" / "out.csv").read_text() == "x"


Writer = Callable[[TextIO], Iterator[Row]]


def written(path: Path, write: Writer) -> list[list[str]]:
    with atomic_writer(path) as file:
        list(write(file))
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def row_of(path: str, *probabilities: float) -> Row:
    return Row(path, np.array(probabilities, np.float32))


def csv_rows(tmp_path: Path, rows: Iterable[Row], class_names: tuple[str, ...]) -> list[list[str]]:
    return written(tmp_path / "out.csv", lambda file: write_csv(file, rows, class_names))


def test_csv_columns(tmp_path: Path) -> None:
    rows = [row_of("a.jpg", 0.125, 0.5, 0.375), Row("b.jpg", error="truncated")]
    csv_rows(tmp_path, rows, CLASS_NAMES)
    assert (tmp_path / "out.csv").read_bytes() == (
        b"path,label,probability,probability_red,probability_green,probability_blue,error\n"
        b"a.jpg,green,0.5,0.125,0.5,0.375,\n"
        b"b.jpg,,,,,,truncated\n"
    )


STRANGE = ["a b.jpg", "a,b.jpg", 'a"b.jpg', "a\nb.jpg", "a\r\nb.jpg", "a\rb.jpg", "고양이.jpg", "=1+1.jpg"]


def test_any_file_name_and_class_name_is_one_cell(tmp_path: Path) -> None:
    rows = [row_of(name, 0.25, 0.75) for name in STRANGE] + [Row(name, error=name) for name in STRANGE]
    table = csv_rows(tmp_path, rows, ("a, b", "dog\n"))
    assert table[0] == ["path", "label", "probability", "probability_a, b", "probability_dog\n", "error"]
    assert table[1:] == [
        *([name, "dog\n", "0.75", "0.25", "0.75", ""] for name in STRANGE),
        *([name, "", "", "", "", name] for name in STRANGE),
    ]


def test_a_file_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    rows = [row_of(os.fsdecode(b"caf\xe9.jpg"), 0, 1)]
    assert csv_rows(tmp_path, rows, ("a", "b"))[1][0] == r"caf\udce9.jpg"


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=5))
def test_probabilities_read_back_as_the_same_float32(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    probabilities = np.array(values, np.float32)
    names = tuple("abcde"[: len(values)])
    table = csv_rows(tmp_path_factory.getbasetemp(), [Row("x", probabilities)], names)
    np.testing.assert_array_equal(np.array(table[1][3:-1], np.float32), probabilities)
    assert table[1][1] == names[int(np.argmax(probabilities))]
    assert np.float32(table[1][2]) == probabilities.max()


def test_writers_pass_every_row_on(tmp_path: Path) -> None:
    rows = [row_of("a.jpg", 0, 1), Row("b.jpg", error="no")]
    with atomic_writer(tmp_path / "x") as file:
        assert list(write_csv(file, rows, ("a", "b"))) == rows
        assert list(write_kaggle(file, rows, labels=False)) == rows


def test_kaggle_has_the_second_class_probability_or_the_class_number(tmp_path: Path) -> None:
    rows = [row_of("test/1.jpg", 0.875, 0.125), row_of("2.b.png", 0.25, 0.75), Row("3.jpg", error="empty")]

    def table(labels: bool) -> list[list[str]]:
        return written(tmp_path / "out.csv", lambda file: write_kaggle(file, rows, labels))

    assert table(labels=False) == [["id", "label"], ["1", "0.125"], ["2.b", "0.75"], ["3", ""]]
    assert table(labels=True) == [["id", "label"], ["1", "0"], ["2.b", "1"], ["3", ""]]


def test_kaggle_refuses_what_it_cannot_hold() -> None:
    paths = ["a/1.jpg", "a/2.jpg"]
    check_kaggle(paths, num_classes=2, labels=False)
    check_kaggle(paths, num_classes=9, labels=True)
    with pytest.raises(ValueError, match="the model has 3 classes: add --labels or use --format csv"):
        check_kaggle(paths, num_classes=3, labels=False)
    for twin in ("b/1.jpg", "a/1.png"):
        with pytest.raises(ValueError, match=re.escape(f"'a/1.jpg' and '{twin}' have the same id '1'")):
            check_kaggle([*paths, twin], num_classes=2, labels=True)


def test_answers_that_are_not_numbers_are_errors_not_labels(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(os.listdir(folder))[:4]
    honest = predictor.predict
    broken = next(i for i, row in enumerate(score(predictor, folder, paths, 4, 2)) if not row.error)

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        answers = honest(pixels).copy()
        answers[0] = np.nan  # of the first readable file
        return answers

    monkeypatch.setattr(predictor, "predict", predict)
    rows = list(score(predictor, folder, paths, 4, 2))
    assert rows[broken].error == "the model's probabilities are not finite"
    assert rows[broken].probabilities is None
