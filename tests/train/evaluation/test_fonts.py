"""Names in other scripts are drawn where an installed font has them, and can be read where none has."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from train.evaluation import fonts
from train.evaluation.fonts import printable


def make_font(path: Path, family: str, characters: str) -> Path:
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((500, 0), (500, 700)):
        pen.lineTo(corner)
    pen.closePath()
    glyphs = {".notdef": pen.glyph(), **{f"u{ord(c):04X}": pen.glyph() for c in characters}}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(c): f"u{ord(c):04X}" for c in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have no fonts but matplotlib's usual one and those given, which its own list does not know yet."""
    usual = [font for font in fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(fontManager, "ttflist", usual)
    monkeypatch.setitem(mpl.rcParams, "font.family", ["sans-serif"])
    monkeypatch.setattr(fonts, "ADVISED", set())

    def give(*files: Path) -> None:
        monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(file) for file in files])

    fonts._installed.cache_clear()
    fonts._characters.cache_clear()
    give()
    yield give
    fonts._installed.cache_clear()
    fonts._characters.cache_clear()
    fontManager._findfont_cached.cache_clear()


@pytest.mark.filterwarnings("error:Glyph")
def test_fonts_installed_after_matplotlibs_list_was_written_draw_what_they_have(
    tmp_path: Path, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.ttf").write_bytes(b"not a font")
    install(
        tmp_path / "damaged.ttf",
        tmp_path / "removed.ttf",
        make_font(tmp_path / "blank.ttf", "Adobe Blank", "고양이강아지猫"),
        make_font(tmp_path / "korean.ttf", "Some Korean", "고양이강아지"),
        make_font(tmp_path / "one.ttf", "One Korean", "고"),
        make_font(tmp_path / "han.ttf", "Some Han", "猫"),
    )
    for name in ("고양이", "강아지 猫", unicodedata.normalize("NFD", "고양이")):
        assert printable(name) == unicodedata.normalize("NFC", name)
    assert mpl.rcParams["font.family"] == ["sans-serif", "Some Korean", "Some Han"]
    assert capsys.readouterr().out == ""
    figure = Figure()
    figure.suptitle(printable("고양이 cat"))
    figure.savefig(tmp_path / "a.png")


def test_letters_that_no_font_has_are_spelled_out_and_a_package_is_named_once(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable("é\n고양이 ねこ") == "é\ngoyangi neko"
    assert printable("강아지") == "gangaji"
    assert printable("猫.jpg") != printable("犬.jpg")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert "fonts-noto-cjk" in line
    assert line.isascii()


def test_what_no_font_can_draw_is_no_reason_to_warn(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters, invisible ones, and bytes that are not UTF-8: the names differ all the same."""
    names = ["a\tb", "a\x07b", os.fsdecode(b"\xb0\xad"), os.fsdecode(b"\xb0\xae")]
    assert len({printable(name) for name in names}) == len(names)
    assert printable("a\U000e0100") == "a"
    assert printable("кошка, قط, Ελλάδα, naïve") == "кошка, قط, Ελλάδα, naïve"
    assert capsys.readouterr().out == ""
