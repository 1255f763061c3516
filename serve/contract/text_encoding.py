"""Encoding of a text file: UTF-8 or UTF-16 by its first bytes, others by the letters that they give."""

import codecs
import io
import re
from contextlib import suppress
from typing import IO

# cp949 comes twice: EUC-KR lacks its syllables that hardly occur, which texts of other encodings give
OTHERS = ("euc_kr", "cp932", "gb18030", "big5", "cp949", "cp1251")
LATIN = ("cp1252", "cp1250", "cp850")
MOST_NAMED = 4


def text_encoding(head: bytes) -> str:
    """Return the encoding of a text that begins with `head`: UTF-8, or UTF-16 by its mark or zero bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) >= 2 and (head[0] == 0) != (head[1] == 0):
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def open_text(file: IO[bytes], newline: str) -> io.TextIOWrapper:
    """Return a seekable file as text in its encoding; bytes that are not UTF-8 become surrogates."""
    encoding = text_encoding(file.read(4))
    file.seek(0)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(file, encoding, errors, newline=newline)


def is_undecoded(text: str) -> bool:
    """Return whether `text` holds surrogates, which stand for bytes that are not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def likely_encodings(texts: list[bytes]) -> dict[str, str]:
    """Return up to four encodings in which all texts are letters -> the first text in it, the likeliest
    first."""
    has_latin = any(re.search(rb"[A-Za-z]", text) for text in texts)
    found: dict[str, str] = {}
    for codec in (*LATIN, *OTHERS) if has_latin else (*OTHERS, *LATIN):
        with suppress(UnicodeDecodeError):
            decoded = [text.decode(codec) for text in texts]
            letters = all(character.isascii() or character.isalpha() for character in "".join(decoded))
            if letters and decoded[0] not in found.values():
                found.setdefault("cp949" if codec == "euc_kr" else codec, decoded[0])
    return dict(list(found.items())[:MOST_NAMED])


def reads_as(likely: dict[str, str]) -> str:
    """Describe what `likely_encodings` found."""
    names = {"cp1252": "cp1252 (latin-1)"}
    read = [f"{text!r} in {names.get(name, name)}" for name, text in likely.items()]
    return f"reads as {', or as '.join(read)}" if read else "is in no known encoding"
