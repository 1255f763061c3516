"""A contest's sample is read as it is, and rows are written as it has them."""

from pathlib import Path

import pytest

from serve.contract.errors import UserError
from serve.outputs.sample import read_sample


@pytest.mark.parametrize(
    ("header", "row", "filled"),
    [
        ("id,label\n", "007,0\n", "007,0.25\n"),
        ("id,label\r\n", "007,0\r\n", "007,0.25\r\n"),
        ("\ufeffid,label\n", "007,0", "007,0.25\n"),
        ("id;label\n", "007;0\n", "007;0.25\n"),
        ("id\tlabel\n", "007\t0\n", "007\t0.25\n"),
        ('"id","label"\n', '"007","0"\n', '"007","0.25"\n'),
        ('"id","label"\n', '"007",0\n', '"007",0.25\n'),
        ("id, label \n", "007, 0\n", "007,0.25\n"),
    ],
)
def test_header_and_rows_keep_their_form(tmp_path: Path, header: str, row: str, filled: str) -> None:
    (tmp_path / "s.csv").write_bytes((header + row).encode())
    sample = read_sample(str(tmp_path / "s.csv"))
    assert (sample.header, sample.columns, sample.ids, sample.values) == (header, ["label"], ["007"], {"0"})
    assert sample.line("007", ["0.25"]) == filled


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_the_encoding_is_kept(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "s.csv").write_bytes("id,label\né,0\n".encode(encoding))
    sample = read_sample(str(tmp_path / "s.csv"))
    assert (sample.encoding, sample.ids) == (encoding, ["é"])
    assert (sample.header + sample.line("é", ["0.25"])) == "id,label\né,0.25\n"


def test_texts_with_delimiters_are_quoted(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text('id,label\n"a,b.jpg",x\n')
    sample = read_sample(str(tmp_path / "s.csv"))
    assert sample.line("a,b.jpg", ['say "x"']) == '"a,b.jpg","say ""x"""\n'


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "two columns"),
        (b"id\n1\n", "'id"),
        (b"1.jpg,0\n2.jpg,0\n", "'1.jpg,0"),
        (b'{"id": 1, "label": 0}\n', "two columns"),
        (b"id,label\n", "no rows"),
        (b"id,label\n1,0\n1,0\n", "line 3"),
        (b"id,label\n1,0,1\n", "line 2"),
        (b"id,label\n,0\n", "line 2"),
        (b'id,label\n"1,0\n', "CSV"),
        (b"PK\x03\x04sample_submission.csv", "zip"),
    ],
)
def test_what_is_no_sample_is_refused(tmp_path: Path, data: bytes, named: str) -> None:
    (tmp_path / "s.csv").write_bytes(data)
    with pytest.raises(UserError, match="--sample-submission") as error:
        read_sample(str(tmp_path / "s.csv"))
    assert named in str(error.value)
    with pytest.raises(UserError, match=r"missing\.csv"):
        read_sample(str(tmp_path / "missing.csv"))
