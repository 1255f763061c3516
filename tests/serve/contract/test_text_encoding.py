"""The encoding of a text that is not UTF-8 is named by what its bytes make in it."""

import pytest

from serve.contract.text_encoding import likely_encodings, text_encoding


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("\uace0\uc591\uc774", "cp949", "cp949"),
        ("\uac15\uc544\uc9c0 1", "euc_kr", "cp949"),
        ("caf\u00e9", "latin-1", "cp1252"),
        ("Stra\u00dfe", "cp1252", "cp1252"),
        ("caf\u00e9", "cp850", "cp850"),
        ("\u043a\u043e\u0448\u043a\u0430", "cp1251", "cp1251"),
        ("\u306d\u3053", "cp932", "cp932"),
    ],
)
def test_the_likeliest_encoding_is_first(text: str, encoding: str, named: str) -> None:
    likely = likely_encodings([text.encode(encoding)])
    assert next(iter(likely.items())) == (named, text)


@pytest.mark.parametrize(
    ("text", "encoding"), [("\u72d7", "gb18030"), ("\u8c93", "big5"), ("\u0142\u00f3d\u017a", "cp1250")]
)
def test_an_encoding_that_cannot_be_recognised_is_among_those_named(text: str, encoding: str) -> None:
    assert likely_encodings([text.encode(encoding)])[encoding] == text


def test_an_encoding_must_fit_all_texts() -> None:
    texts = ["\uace0\uc591\uc774".encode("cp949"), "caf\u00e9".encode("cp1252")]
    assert "cp949" in likely_encodings(texts[:1])
    assert "cp949" not in likely_encodings(texts)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8", "utf-8-sig"])
def test_utf_16_is_known_by_its_first_bytes(encoding: str) -> None:
    data = "path,label\n".encode(encoding)
    assert data.decode(text_encoding(data[:4])) == "path,label\n"
    assert text_encoding(b"") == "utf-8-sig"
