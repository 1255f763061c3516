"""Names in any script for figures: drawn with installed fonts that have them, else spelled out."""

import logging
import unicodedata
from functools import cache

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager, get_font

# These have a box, or nothing, for every character.
NO_FONTS = ("lastresort", "adobeblank", "fallback")
EAST_ASIAN = {"BOPOMOFO", "CJK", "FULLWIDTH", "HALFWIDTH", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA"}
ADVISED: set[str] = set()
"""Packages that a warning has named; one line for each is enough."""


def printable(text: str) -> str:
    """Return `text` as figures can draw it, and add installed fonts that it needs to matplotlib's fallback
    list.

    Letters that no installed font has are spelled out, as far as Unicode names their sounds (고양이 becomes
    goyangi); other characters become their code points. Boxes would make all names look alike.
    """
    # A name from a Mac is decomposed: fonts have the syllable, not its parts. Bytes that are not UTF-8 are
    # lone surrogates, which no font can draw.
    text = unicodedata.normalize("NFC", text.encode("utf-8", "backslashreplace").decode())
    missing = _missing(text)
    if missing:
        _add_fonts({ord(c) for c in missing if not unicodedata.category(c).startswith("C")})
        missing = _missing(text)
        _advise(missing)
    return "".join(_spelled(c) if c in missing else c for c in text)


def _missing(text: str) -> set[str]:
    have = [_characters(family) for family in mpl.rcParams["font.family"]]
    return {c for c in text if c != "\n" and not any(ord(c) in characters for characters in have)}


def _add_fonts(missing: set[int]) -> None:
    """Add the fewest families that have the missing characters; of equals a sans-serif one."""
    installed = _installed() if missing else ()
    while missing and installed:
        best = max(installed, key=lambda family: (len(missing & _characters(family)), _is_sans(family)))
        if not missing & _characters(best):
            return
        mpl.rcParams["font.family"] = [*mpl.rcParams["font.family"], best]
        missing = missing - _characters(best)


def _is_sans(family: str) -> bool:
    return any(word in family.lower() for word in ("sans", "gothic"))


@cache
def _installed() -> tuple[str, ...]:
    """Return the families of all fonts, also of those installed after matplotlib wrote its list."""
    listed = {str(font.fname) for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in listed:
            try:
                fontManager.addfont(path)
            except Exception:  # damaged, or of coloured pictures: no font may end a finished run
                continue
    families = sorted({font.name for font in fontManager.ttflist})
    return tuple(f for f in families if not any(n in f.lower().replace(" ", "") for n in NO_FONTS))


@cache
def _characters(family: str) -> frozenset[int]:
    """Return the code points of the font that matplotlib takes for this family."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports every family without a regular weight
    try:
        return frozenset(get_font(fontManager.findfont(FontProperties(family=[family]))).get_charmap())
    except Exception:  # removed since it was listed, or damaged
        return frozenset()
    finally:
        logger.setLevel(level)


def _spelled(character: str) -> str:
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if category == "Cf" or name.startswith("VARIATION SELECTOR"):
        return ""  # it has no shape of its own
    sound = name.rpartition(" ")[2].lower()  # HANGUL SYLLABLE GO
    if category in ("Lo", "Mc", "Mn") and sound.isalpha():
        return sound
    return f"<U+{ord(character):04X}>"


def _advise(missing: set[str]) -> None:
    """Name packages with the missing characters; in ASCII, which every terminal shows."""
    for character in sorted(missing):
        script = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
        kind = unicodedata.category(character)[0]
        if kind == "C" or not script or script == "VARIATION":
            continue
        package = "fonts-noto-cjk" if script in EAST_ASIAN else "fonts-noto-core"
        package = "fonts-symbola" if kind == "S" and script not in EAST_ASIAN else package
        if package not in ADVISED:
            ADVISED.add(package)
            print(
                f"warning: figures spell out {script.capitalize()} characters in names, which no installed "
                f"font has; install such a font, for instance the package {package}",
                flush=True,
            )
