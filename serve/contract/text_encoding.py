"""Encoding of a text file: UTF-8 or UTF-16 by its first bytes, others guessed from the words they give."""

import codecs
import re
import unicodedata

# Encoding -> scripts of the texts it is used for, the likeliest first
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
    """Return the encoding of a text that begins with `head`: UTF-8, or UTF-16 by its mark or zero bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) >= 2 and (head[0] == 0) != (head[1] == 0):
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def is_undecoded(text: str) -> bool:
    """Return whether `text` holds surrogates, which stand for bytes that are not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def likely_encodings(texts: list[bytes]) -> dict[str, str]:
    """Return up to four encodings in which all texts are words of one script -> the first text in it."""
    latin = any(re.search(rb"[A-Za-z]", text) for text in texts)
    found: dict[str, str] = {}
    for name in sorted(ENCODINGS, key=lambda name: latin != (ENCODINGS[name] == ("LATIN",))):
        text = _decode(texts, name)
        if text is not None and text not in found.values():
            found[name] = text
    if "cp949" in found and _decode(texts, "cp949", "euc_kr") is None:  # syllables that hardly occur
        found["cp949"] = found.pop("cp949")
    return dict(list(found.items())[:4])


def reads_as(likely: dict[str, str]) -> str:
    """Describe what `likely_encodings` found."""
    names = {"cp1252": "cp1252 (latin-1)"}
    read = [f"{text!r} in {names.get(name, name)}" for name, text in likely.items()]
    return f"reads as {', or as '.join(read)}" if read else "is in no known encoding"


def _decode(texts: list[bytes], name: str, codec: str = "") -> str | None:
    """Return the first text, or None if any text is no word of the encoding's scripts."""
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
