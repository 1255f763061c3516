"""How the bytes of a text file are to be read, as far as they say so."""

import codecs
import re
import unicodedata

# Encoding -> scripts of what it is used for, the likeliest first
ENCODINGS = {
    "cp949": ("HANGUL",),
    "cp932": ("HIRAGANA", "KATAKANA", "CJK"),
    "gb18030": ("CJK",),
    "big5": ("CJK",),
    "cp1252": ("LATIN",),
    "cp1250": ("LATIN",),
    "cp850": ("LATIN",),
    "macintosh": ("LATIN",),
    "cp1251": ("CYRILLIC",),
    "cp1253": ("GREEK",),
    "cp1255": ("HEBREW",),
    "cp1256": ("ARABIC",),
    "cp874": ("THAI",),
}
MIXED_WITH_LATIN = {"HANGUL", "HIRAGANA", "KATAKANA", "CJK", "LATIN"}


def text_encoding(head: bytes) -> str:
    """Of a text that begins with these bytes: UTF-8, or UTF-16 by its mark or its zero bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) >= 2 and (head[0] == 0) != (head[1] == 0):
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def is_undecoded(text: str) -> bool:
    """Whether bytes that are no UTF-8 are kept in it."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def likely_encodings(texts: list[bytes]) -> dict[str, str]:
    """At most four encodings in which all these texts are words of one script -> the first text in it."""
    latin = any(re.search(rb"[A-Za-z]", text) for text in texts)
    found: dict[str, str] = {}
    for name in sorted(ENCODINGS, key=lambda name: latin != (ENCODINGS[name] == ("LATIN",))):
        text = _decoded(texts, name)
        if text is not None and text not in found.values():
            found[name] = text
    if "cp949" in found and _decoded(texts, "cp949", "euc_kr") is None:  # syllables that hardly occur
        found["cp949"] = found.pop("cp949")
    return dict(list(found.items())[:4])


def reads_as(likely: dict[str, str]) -> str:
    """What `likely_encodings` found, in words."""
    called = {"cp1252": "cp1252 (latin-1)"}
    read = [f"{text!r} in {called.get(name, name)}" for name, text in likely.items()]
    return f"reads as {', or as '.join(read)}" if read else "is in no encoding that is known here"


def _decoded(texts: list[bytes], name: str, codec: str = "") -> str | None:
    """The first text; None if one of them is no word of the encoding's scripts."""
    scripts = ENCODINGS[name]
    try:
        decoded = [text.decode(codec or name) for text in texts]
    except UnicodeDecodeError:
        return None
    for text in decoded:
        odd = [c for c in text if not c.isascii()]
        if not all(unicodedata.name(c, "").startswith(scripts) for c in odd):
            return None
        if odd and not MIXED_WITH_LATIN & set(scripts) and re.search("[A-Za-z]", text):
            return None
        if not all(word in (word.lower(), word.upper(), word.title()) for word in re.findall(r"\w+", text)):
            return None
    return decoded[0]
