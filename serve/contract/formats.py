"""The suffixes of images, and the names of formats that are not read, with what to do: nobody has to guess
why a file is left out."""

import os
import re
from collections import Counter
from typing import Any

from serve.contract.command_line import command
from serve.contract.packed import SUFFIXES, packed_by_content

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".avif", ".heic", ".heif", ".hif"}
)
BRANDS = {  # of the boxes that HEIF, AVIF and videos are made of; HEIC is read (heic.py)
    b"mif": "HEIF",
    b"msf": "HEIF",
    b"avi": "AVIF that is damaged, or that this Pillow cannot read",
    b"crx": "CR3, a raw photograph",
}
BEGINNINGS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"II\xbc": "JPEG XR",
    b"8BPS": "Photoshop",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"FUJIFILMCCD-RAW": "RAF, a raw photograph",
    b"\0\0\1\0": "a Windows icon",
    **dict.fromkeys(
        (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
        "a damaged TIFF, or one of a kind that is not read (float, bands, bits, compression)",
    ),
    b"\xff\xd8\xff": "a damaged JPEG, or one of a kind that is not read (12 bits, no height)",
    b"\x89PNG": "a damaged PNG: make it again",
    b"GIF8": "a damaged GIF: make it again",
    bytes(132): "zeros, as an interrupted copy leaves them: copy it again",
    b"P7": "PAM",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"<svg": "SVG",
    b"<!doctype html": "a web page: download the picture itself",
    b"<html": "a web page: download the picture itself",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file with git lfs pull",
}
UNREAD_SUFFIX = re.compile(
    r"\.(?:jxl|jxr|jp2|j2k|jp[fx]|psd|exr|hdr|svg|ico|icns|cur|tga|pcx|p[bn]m|dcm|dds|qoi|svs|ndpi"
    r"|apng|pjp(?:eg)?|jif|mpo|dib|dng|cr[23]|nef|nrw|arw|raf|orf|rw2|srw|pef)"
)
"""Suffixes of pictures that must be converted first."""
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
NO_SUFFIX = "without a suffix"
MOST_SHOWN = 60  # bytes of a text
# photo.jpg.1, photo.jpg_large, photo.jpg!d and "photo.jpg " as downloads leave them; not photo.jpg.txt
NEARLY_A_SUFFIX = re.compile(rf"\.({'|'.join(s[1:] for s in IMAGE_SUFFIXES)})([^a-z0-9.]\w*|\.\d+)$")
ARRAYS = re.compile(r"\.(?:arrow|tfrec(?:ord)?s?(?:-\d+-of-\d+)?|mdb|np[yz]|mat|h5|hdf5|pkl)")
CURES = {
    "convert {}, for instance by magick mogrify -format jpg FILES": UNREAD_SUFFIX,
    "unpack {}": re.compile("|".join(re.escape(s) for s in (*SUFFIXES, ".tar") if s != ".parquet")),
    f"convert {{}} by {command('train/data/convert_parquet.py')} FOLDER --output SHARDS": re.compile(
        r"\.parquet"
    ),
    "write the images in {} as files": ARRAYS,
    "rename images {}, as in NAME.jpg": re.compile(f"{NO_SUFFIX}|{NEARLY_A_SUFFIX.pattern}"),
    "take frames from {}, for instance by ffmpeg": re.compile(r"\.(?:mp4|m4v|mov|avi|mkv|webm)"),
}
"""How to make images of files -> the suffixes of such files."""


def count_by_name(counts: Counter[str]) -> str:
    """Return the most frequent names with their counts, as in "cat 3, dog 1"."""
    listed = [f"{name or 'hidden'} {count}" for name, count in counts.most_common(5)]
    return ", ".join([*listed, "..."] if len(counts) > 5 else listed)


def unread_format(data: bytes) -> str:
    """Describe a file that no decoder knows by its first bytes, with the way out; "": unknown."""
    name = BRANDS.get(data[8:11], "a video: take pictures from it") if data[4:8] == b"ftyp" else ""
    start = data[:32].lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # a byte order mark and spaces
    for beginning, known in BEGINNINGS.items():
        if data.startswith(beginning) or start.startswith(beginning):
            name = name or known
    if not name and (packed := packed_by_content(data)):
        name = f"{packed.kind}: unpack it"
    if data[128:132] == b"DICM":
        name = "DICOM"
    text = data[:MOST_SHOWN].decode(errors="replace").rstrip("\ufffd")  # the last letter may be cut
    letters = "".join(text.split())
    if not name and letters and letters.isprintable() and "\ufffd" not in letters:
        name = f"text: {text.strip()!r}"
    if not name:
        return ""
    return f" but {name}" + ("" if ": " in name else "; convert it to JPEG or PNG")


# TIFF's tags
REDUCED, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, PLANES = 254, 258, 259, 262, 273, 284
TILES, CHILDREN, SAMPLE_FORMAT, SUBSAMPLING = 324, 330, 339, 530
UNCOMPRESSED, YCBCR, WHITE_IS_ZERO, SIGNED = 1, 6, 0, 2


def unread_tiff(tags: Any) -> str:
    """Return why a TIFF that Pillow opens is not read, by the tags of its first picture; "": it is."""
    bits, photometric = set(tags.get(BITS, ())), tags.get(PHOTOMETRIC)
    if tags.get(REDUCED) in (1, 3) and (tags.next or CHILDREN in tags):
        return "begins with a thumbnail (a raw photograph?): convert the picture behind it to JPEG or PNG"
    if bits == {8} and SIGNED in tags.get(SAMPLE_FORMAT, ()):
        return "signed pixels have no defined white; save unsigned ones"
    if tags.get(COMPRESSION, 1) == UNCOMPRESSED and (
        (photometric == YCBCR and tags.get(SUBSAMPLING) != (1, 1))
        or (tags.get(PLANES) == 2 and (bits != {8} or photometric == WHITE_IS_ZERO))
        or 0 in tags.get(STRIPS, tags.get(TILES, ()))
    ):
        return (
            "uncompressed and of a kind that Pillow misreads (subsampled YCbCr, planes of other than 8 "
            "bits, missing strips): save it with compression"
        )
    return ""


def kind_of_other(name: str) -> str:
    """Return what a file without an image's suffix is counted as: its suffix in lower case or
    NO_SUFFIX, "" for hidden files and those of the system."""
    base = name.rpartition("/")[2]
    if base.startswith(".") or base.lower() in SYSTEM_FILES:
        return ""
    nearly = NEARLY_A_SUFFIX.search(base.lower())
    return nearly[0] if nearly else os.path.splitext(base)[1].lower() or NO_SUFFIX


def unread_pictures(ignored: Counter[str]) -> list[str]:
    """Return `describe_ignored` of those files that are pictures by their suffix."""
    patterns = UNREAD_SUFFIX, NEARLY_A_SUFFIX
    return describe_ignored(
        Counter({kind: n for kind, n in ignored.items() if any(p.fullmatch(kind) for p in patterns)})
    )


def describe_ignored(ignored: Counter[str]) -> list[str]:
    """Return a line about files that are no images by their suffix, with the cure, if there are some."""
    kinds = Counter({suffix: count for suffix, count in ignored.items() if suffix})
    if not kinds:
        return []
    line = f"{kinds.total()} files are no images by their suffix ({count_by_name(kinds)})"
    for cure, pattern in CURES.items():
        if suffixes := [suffix for suffix, _ in kinds.most_common() if pattern.fullmatch(suffix)]:
            line += f"; {cure.format(', '.join(suffixes))}"
    return [line]
