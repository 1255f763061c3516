"""What hostile or merely odd input was tried, and what must come of it: the source of docs/hostile.md.

    python tests/hostile_images.py

tests/test_hostile_images.py scores every specimen with serve/main.py and checks that the document is this table.
"""

import io
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from serve_model import (
    CLASS_NAMES,
    Colour,
    broken_files,
    encode,
    lying_jpeg,
    png_header,
    probabilities_for,
    solid,
)

from serve.contract.images import MAX_FILE_BYTES

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
IGNORED = "ignored, and counted"
DEPTH = 300


@dataclass(frozen=True)
class Specimen:
    what: str
    name: str
    contents: bytes | Callable[[Path], object]
    """Of the file, or what makes it at this path."""
    outcome: Colour | str
    """The colour whose answer it must get, a part of its error, or IGNORED."""

    def put(self, root: Path) -> None:
        path = root / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(self.contents, bytes):
            path.write_bytes(self.contents)
        else:
            self.contents(path)

    @property
    def described(self) -> str:
        if isinstance(self.outcome, str):
            return self.outcome if self.outcome == IGNORED else f"`{self.outcome}`"
        return CLASS_NAMES[int(probabilities_for(self.outcome).argmax())]


def photograph(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(solid(RED, (64, 32)), "JPEG", exif=exif)


def animation(*colours: Colour) -> bytes:
    frames = [solid(colour) for colour in colours]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: kilobytes, and minutes to decode."""
    data = encode(solid(RED, (3000, 3000)), "JPEG", progressive=True, quality=50)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * count + data[-2:]


def png_with_text(size: int) -> bytes:
    """A PNG whose compressed comment is `size` zeros."""
    whole = encode(solid(GREEN), "PNG")
    chunk = b"zTXtComment\0\0" + zlib.compress(bytes(size))
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return whole[:33] + framed + whole[33:]


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)


def make_forbidden(path: Path) -> None:
    path.write_bytes(encode(solid(RED), "PNG"))
    path.chmod(0)


def make_closed_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.png").write_bytes(encode(solid(RED), "PNG"))
    path.chmod(0)


def deep(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    for _ in range(DEPTH):
        os.mkdir("d")
        os.chdir("d")
    Path("x.png").write_bytes(encode(solid(BLUE), "PNG"))
    os.chdir(here)


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


BROKEN = broken_files()

FILES = [
    Specimen("a plain PNG", "red.png", encode(solid(RED), "PNG"), RED),
    Specimen("a suffix in capitals", "Green.PNG", encode(solid(GREEN), "PNG"), GREEN),
    Specimen("a JPEG in CMYK", "cmyk.jpg", encode(solid(GREEN, (16, 16)).convert("CMYK"), "JPEG", quality=95), GREEN),
    Specimen("16-bit grey", "16.png", encode(Image.new("I;16", (9, 9), 0x2000), "PNG"), (32, 32, 32)),
    Specimen("an animation", "animated.gif", animation(BLUE, RED, RED), BLUE),
    Specimen("a photograph on its side (EXIF)", "rotated.jpg", photograph(6), RED),
    Specimen("30000x1 pixels", "line.png", encode(solid(GREEN, (30000, 1)), "PNG"), GREEN),
    Specimen("the wrong suffix", "really-a-png.jpg", encode(solid(BLUE), "PNG"), BLUE),
    Specimen("a JPEG cut in half", "half.jpg", *BROKEN["truncated.jpg"]),
    Specimen("a PNG cut in half", "half.png", *BROKEN["truncated.png"]),
    Specimen("a PNG with one flipped bit", "damaged.png", *BROKEN["damaged.png"]),
    Specimen("an empty file", "empty.jpg", *BROKEN["empty.jpg"]),
    Specimen("text named .jpg", "text.jpg", *BROKEN["text.jpg"]),
    Specimen("PostScript named .jpg (Pillow would start Ghostscript)", "ps.jpg", *BROKEN["postscript.jpg"]),
    Specimen("a Mac's resource fork", "._red.png", b"\0\5\x16\7Mac OS X", "not an image file of a known format"),
    Specimen("an SVG named .png", "svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image file"),
    Specimen("2 kB of JPEG that claim 8000x8000 pixels", "lying.jpg", *BROKEN["lying.jpg"]),
    Specimen("the same behind a telephone's MPO", "lying-mpo.jpg", lying_jpeg(8000, 8000, "MPO"), "claims 8000x8000 pixels"),
    Specimen("a PNG that claims 100000x100000 pixels", "huge.png", *BROKEN["huge.png"]),
    Specimen("81 megapixels in 10 kB of PNG", "bomb.png", encode(Image.new("1", (9000, 9000)), "PNG"), "9000x9000 pixels are over the limit"),
    Specimen("a PNG of 0x0 pixels", "zero.png", png_header(0, 0), "not an image file of a known format"),
    Specimen("a PNG whose comment unpacks to 100 MB", "comment.png", png_with_text(100_000_000), "Decompressed data too large"),
    Specimen("32-bit grey, which has no defined white", "float.tif", encode(Image.new("F", (4, 4)), "TIFF"), "have no defined white"),
    Specimen("a JPEG of 9 megapixels and 3,000 scans: minutes to decode", "scans.jpg", many_scans(3000), "scans are over the limit of 100; save it anew"),
]  # fmt: skip

NAMES = [
    Specimen("a space before the suffix", "a b .png", encode(solid(RED), "PNG"), RED),
    Specimen("a line end and other scripts", "고양이 한\n마리.png", encode(solid(GREEN), "PNG"), GREEN),
    Specimen("a carriage return", "c\r.png", encode(solid(BLUE), "PNG"), BLUE),
    Specimen("bytes that are not UTF-8", os.fsdecode(b"caf\xe9.png"), encode(solid(BLUE), "PNG"), BLUE),
    Specimen("quotes and commas", 'a "b", c.png', encode(solid(RED), "PNG"), RED),
    Specimen("a spreadsheet's formula", "=cmd|'x'!A1.png", encode(solid(GREEN), "PNG"), GREEN),
    Specimen("a leading dash", "-rf.png", encode(solid(BLUE), "PNG"), BLUE),
    Specimen("255 bytes", "x" * 251 + ".png", encode(solid(RED), "PNG"), RED),
    Specimen("é in one code point", "\u00e9.png", encode(solid(RED), "PNG"), RED),
    Specimen("é in two code points beside it", "e\u0301.png", encode(solid(GREEN), "PNG"), GREEN),
    Specimen("no name before the suffix", ".png", encode(solid(RED), "PNG"), IGNORED),
    Specimen("another suffix", "notes.txt", b"not mine to read", IGNORED),
]

PLACES = [
    Specimen("a folder named .jpg with an image inside", "d.jpg/inside.png", encode(solid(GREEN), "PNG"), GREEN),
    Specimen("a FIFO", "fifo.jpg", os.mkfifo, "not a regular file"),
    Specimen("a socket", "socket.jpg", make_socket, "No such device"),
    Specimen("a link to a device", "zeros.jpg", link("/dev/zero"), "not a regular file"),
    Specimen("a link to a terminal", "tty.jpg", link("/dev/tty"), "No such device"),
    Specimen("a link to a file", "linked.png", link("red.png"), RED),
    Specimen("a link to itself", "self.jpg", link("self.jpg"), "symbolic links"),
    Specimen("a link to nothing", "dangling.jpg", link("nowhere.jpg"), "No such file"),
    Specimen("a link to its own folder", "loop", link("."), "linked folder, not followed"),
    Specimen("a file of 256 MiB and a byte", "sparse.jpg", make_sparse, "is over the limit of"),
    Specimen("a file that may not be read", "forbidden.png", make_forbidden, "Permission denied"),
    Specimen("a folder that may not be entered", "closed", make_closed_folder, "cannot list this folder: Permission denied"),
    Specimen(f"{DEPTH} folders in one another", "d", deep, BLUE),
]  # fmt: skip


def member(name: str, kind: bytes, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


MEMBERS = [
    (member("link.png", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link", "but a symbolic link in a tar file"),
    (member("hard.png", tarfile.LNKTYPE, "red.png"), "a hard link", "but a hard link in a tar file"),
    (member("fifo.png", tarfile.FIFOTYPE), "a FIFO", "but a FIFO in a tar file"),
    (member("null.png", tarfile.CHRTYPE), "a device", "but a device in a tar file"),
]  # fmt: skip
TRAVERSAL = [
    Specimen("a name that climbs out", "../../../climbs.png", encode(solid(RED), "PNG"), RED),
    Specimen("an absolute name", "/absolute.png", encode(solid(GREEN), "PNG"), GREEN),
]


def write_tar(path: Path) -> None:
    """All FILES, NAMES, TRAVERSAL and MEMBERS; the first name once more, at the end, in another colour."""
    with tarfile.open(path, "w") as tar:
        for specimen in [*FILES, *NAMES, *TRAVERSAL]:
            assert isinstance(specimen.contents, bytes)
            data = encode(solid(BLUE), "PNG") if specimen is FILES[0] else specimen.contents
            info = tarfile.TarInfo(specimen.name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info, _, _ in MEMBERS:
            tar.addfile(info)
        info = tarfile.TarInfo(FILES[0].name)
        assert isinstance(FILES[0].contents, bytes)
        info.size = len(FILES[0].contents)
        tar.addfile(info, io.BytesIO(FILES[0].contents))


# Made by test_zoo.py and test_storage.py, which check these outcomes.
WHILE_SCORING = [
    ("a file that is deleted after it was listed", "No such file or directory"),
    ("a file that becomes a folder", "Is a directory"),
    ("a file that becomes a FIFO", "not a regular file"),
    ("a file that becomes another image", "the other image's class"),
    ("a tar file that is written again", "the tar file has changed since it was listed"),
]
DAMAGED_TARS = [
    ("cut short", "unexpected end of data"),
    ("cut between two members", "no end mark at byte"),
    ("a damaged header in the middle", "no end mark at byte"),
    ("a name that claims a gigabyte", "is over the limit"),
    ("a member of negative size", "leads backwards"),
    ("5,000 headers in a chain", "cannot read this tar file to its end"),
]
SERVERS = [
    ("answers 500, 503, 429 or 408", "an error after 4 tries"),
    ("answers 401, 403, 404 or 410", "an error at once"),
    ("breaks off in the middle", "an error after 4 tries"),
    ("never answers", "an error after `--image-timeout`"),
    ("sends a byte now and then", "an error after `--image-timeout`"),
    ("sends without end", "an error at 256 MiB"),
]

INTRODUCTION = """# Hostile input: what was tried, what came out

```
python serve/main.py --model runs/NAME --images DIR --output predictions.csv --max-errors 0.01
```

An input that cannot be read is a row with the reason in its column `error`. Here exit code 4 means that more than 1 % of the
rows are errors.

A table gives the class of the picture that a viewer shows (red, green or blue), or in `this type` a part of the error. Each command
ended with exit code 0, with rows in the order of the names, and no other input lost its answer. `test_hostile_images.py`,
`test_tars.py` and `test_storage.py` test each line; `python tests/hostile_images.py` writes the tables.

- **A decoder or read that hangs** for `--image-timeout` seconds (default 60) costs its image an error row.
- **33 reads that hang at once** end the run with exit code 3: the storage is gone. With 32 decoders hanging, scoring waits until
  one of them ends.
- **A file name that is not UTF-8** is written with backslash escapes: `caf\\udce9.png`.
"""


def table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {what} | {outcome} |" for what, outcome in rows]
    return "\n".join([f"\n## {title}\n", "| tried | class or error |", "|---|---|", *lines]) + "\n"


def document() -> str:
    def described(specimens: list[Specimen]) -> list[tuple[str, str]]:
        return [(specimen.what, specimen.described) for specimen in specimens]

    def errors(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(what, outcome if "'" in outcome else f"`{outcome}`") for what, outcome in rows]

    tar_members = [(what, f"`{error}`") for _, what, error in MEMBERS]
    tar_members += [(s.what, f"{s.described}; nothing is written") for s in TRAVERSAL]
    tar_members.append(("a name that comes twice", "the class of the later member, as of `tar -x`"))
    return INTRODUCTION + "".join(
        [
            table("Files, in a folder and in a tar file", described(FILES)),
            table("Names, in a folder and in a tar file", described(NAMES)),
            table("Places in a folder", described(PLACES)),
            table("Members of a tar file", tar_members),
            table("Changes while scoring", errors(WHILE_SCORING)),
            table("Damaged tar files, scored up to the damage, and an error row", errors(DAMAGED_TARS)),
            table("A server that", SERVERS),
        ]
    )  # fmt: skip


BY_HAND = "\n# What training, exporting and MLflow meet\n"
"""Begins the part of docs/hostile.md that is written by hand."""

if __name__ == "__main__":
    page = Path(__file__).resolve().parents[1] / "docs" / "hostile.md"
    page.write_text(
        document() + BY_HAND + page.read_text(encoding="utf-8").partition(BY_HAND)[2], encoding="utf-8"
    )
