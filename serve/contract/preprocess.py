"""From file bytes to pixels: the one definition in the project.

Training evaluates with it, export verifies with it, serving runs it. It needs numpy and Pillow only.

    pixels = Preprocess(mode="crop", size=224, resize_size=256)(load_image(data))  # uint8 [224, 224, 3]
"""

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.archive import read_member, split_member
from serve.contract.colours import sample_bits, to_rgb
from serve.contract.doubts import BEFORE_THE_FILL, BLANK, is_blank, is_one_colour
from serve.contract.errors import UserError
from serve.contract.formats import unread_format
from serve.contract.jpeg import scans_and_end, without_metadata
from serve.contract.orientation import TURNS, orientation, pass_over_metadata

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".avif"}
)
# Pillow's other decoders are not asked: an EPS named .jpg would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 64_000_000  # 8000 x 8000; decoded, Pillow holds 4 bytes a pixel
MAX_FILE_BYTES = 256 * 2**20
# The emptiest JPEG still spends about a bit on each 8x8 block. A file of fewer bytes than pixels / 1024
# ends before its picture does, and libjpeg would fill the rest with grey.
MAX_JPEG_PIXELS_PER_BYTE = 1024
# Progressive JPEGs have about ten. Each goes over all pixels again, and may be a few bytes of the file.
MAX_JPEG_SCANS = 100
# What network disks, operating systems and tools keep beside people's files: thumbnails, deleted files,
# older versions. Plain words that may name a class are none of them.
SYSTEM_FOLDERS = (
    r"@eadir|#recycle|@recycle|@recently-snapshot|[#~]snapshot|\.?@__thumb|@tmp|@sharebin"  # network disks
    r"|\.snap(?:shots?)?|\.zfs|\.recycle|\.glusterfs|\.minio\.sys|\.wdmc|\.tmb"
    r"|lost\+found|\.trash(?:es|-\d+)?|\.thumb(?:nail)?s?"  # Linux
    r"|\$recycle\.bin|system volume information|found\.\d{3}|_vti_cnf|_gsdata_"  # Windows
    r"|__macosx|\.apple(?:double|db|desktop)|network trash folder|temporary items|\.temporaryitems"  # macOS
    r"|\.spotlight-v100|\.fseventsd|\.documentrevisions-v100|\.picasaoriginals"
    r"|\.stversions|\.dropbox\.cache|\.sync|\.git|\.hg|\.svn"  # older versions
    r"|\.ipynb_checkpoints|__pycache__|(?:site|dist)-packages|node_modules"  # Python, JavaScript
)
SYSTEM_PATH = re.compile(rf"(?:^|(?<=/))(?:{SYSTEM_FOLDERS})(?=/)", re.IGNORECASE)
CONFIG_MAP = ("..data", "..20")
"""How the folders begin in which a mounted ConfigMap keeps its files, beside links to them."""
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MODES = ("crop", "squash", "pad")

# We check the size ourselves, before a pixel is decoded, with an error instead of a warning.
Image.MAX_IMAGE_PIXELS = None


class ImageError(UserError):
    """This file is not an image that can be classified; the message says why."""


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file, never blocking on a FIFO or a device, or a member of a tar file.

    Raises:
        ImageError: not a regular file, empty, or above MAX_FILE_BYTES.
        OSError: it cannot be opened or read.
    """
    try:
        file = open(path, "rb", opener=open_nonblocking)  # noqa: SIM115
    except NotADirectoryError:
        inside = split_member(path)
        if inside is None:
            raise
        return _read_member(*inside)
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ImageError("not a regular file")
        if info.st_size == 0:
            raise ImageError("empty file (0 bytes)")
        if info.st_size > MAX_FILE_BYTES:
            raise ImageError(f"file of {info.st_size} bytes is over the limit of {MAX_FILE_BYTES}")
        return file.read(info.st_size)


def _read_member(tar: str, name: str) -> bytes:
    try:
        data = read_member(tar, name, MAX_FILE_BYTES)
    except ValueError as error:
        raise ImageError(str(error)) from error
    if not data:
        raise ImageError("empty file (0 bytes)")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"file is over the limit of {MAX_FILE_BYTES} bytes")
    return data


def open_nonblocking(path: str, flags: int) -> int:
    # Opening a FIFO without a writer returns at once; what was opened is then examined.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_image(data: bytes) -> Image.Image:
    """Open an image file, its pixels unread. Metadata that Pillow cannot read costs no JPEG and no AVIF.

    Raises:
        Exception: Pillow raises nearly anything on damaged bytes.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        if data.startswith(b"\xff\xd8\xff"):
            bare, exif = without_metadata(data)
            image = Image.open(io.BytesIO(bare), formats=("JPEG",))
            image.info["exif"] = exif
            return image
        if data[4:8] == b"ftyp" and b"Exif" in data:  # an item of unknown type is passed over
            return Image.open(io.BytesIO(data.replace(b"Exif", b"Exi\0")), formats=("AVIF",))
        raise


def _whole(image: Image.Image) -> Image.Image:
    image.load()
    return image


def load_image(
    data: bytes,
    decode: Callable[[Image.Image], Image.Image] = _whole,
    doubts: list[str] | None = None,
) -> Image.Image:
    """Decode an image file to RGB, upright. `decode` reads the pixels of the opened file.

    EXIF orientation is applied; grey, palette and CMYK become RGB; transparency is laid over white;
    16-bit grey keeps its top 8 bits; of an animation the first frame is taken. Colour profiles (ICC) are
    not applied, in training as in serving.

    Args:
        doubts: takes a sentence where the picture comes out, but looks wrong.

    Raises:
        ImageError: unreadable, truncated as far as the decoder can tell (a JPEG that ends early with a
            proper end mark cannot be told), above MAX_PIXELS, or of a kind without a defined white.
    """
    try:
        image, turn, doubt = _decode(data, decode, doubts is not None)
        if doubts is not None and doubt:
            doubts.append(doubt)
        return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out of memory while decoding") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        message = str(error) or type(error).__name__
        if "cannot identify image file" in message:
            message = f"not an image file of a known format{unread_format(data)}"
        raise ImageError(message) from error


def _decode(
    data: bytes, decode: Callable[[Image.Image], Image.Image], check: bool
) -> tuple[Image.Image, Image.Transpose | None, str]:
    """(RGB, how to turn it upright, what is suspicious about it)"""
    with open_image(data) as image:
        _check_size(image, data)
        bits = sample_bits(image, data)
        pass_over_metadata(image)
        whole = image.size
        decoded = decode(image)
        rgb, doubt = to_rgb(decoded, image, data, bits)
        if check and not doubt and is_one_colour(rgb, but=BEFORE_THE_FILL):
            if image.size != whole and decode is not _whole:  # made smaller, a fine pattern is one too
                doubt = _decode(data, _whole, check)[2]
            elif is_blank(rgb, image, data):
                doubt = BLANK
        return rgb, TURNS.get(orientation(image)), doubt


def _check_size(image: Image.Image, data: bytes) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels are over the limit of {MAX_PIXELS}; scale it down")
    if image.format in ("JPEG", "MPO"):  # MPO: with a second picture behind it, as telephones write them
        if width * height > MAX_JPEG_PIXELS_PER_BYTE * len(data):
            raise ImageError(f"claims {width}x{height} pixels in {len(data)} bytes: truncated")
        # Counting marks is quick, and counts those of thumbnails and videos too.
        if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
            scans, _ = scans_and_end(data)
            if scans > MAX_JPEG_SCANS:
                raise ImageError(f"{scans} scans are over the limit of {MAX_JPEG_SCANS}; save it anew")


@dataclass(frozen=True)
class Preprocess:
    """How an image of any size becomes the network's `size` x `size` input. Plain values only."""

    mode: str = "crop"
    """crop: the short side becomes `resize_size`, then the central `size` square. squash: both sides become
    `size`. pad: the long side becomes `size`, the rest is black."""
    size: int = 224
    """Height and width of the result, in pixels."""
    resize_size: int = 256
    """Short side before the central crop, in pixels; at least `size`. Used by mode crop only."""
    interpolation: str = "bilinear"
    """bilinear, bicubic or lanczos; always antialiased."""

    def __post_init__(self) -> None:
        if type(self.size) is not int or type(self.resize_size) is not int:
            raise TypeError(f"preprocess sizes {self.size!r} and {self.resize_size!r}")
        if self.mode not in MODES:
            raise UserError(f"preprocess mode {self.mode!r} is none of {', '.join(MODES)}")
        if self.interpolation not in RESAMPLING:
            known = ", ".join(RESAMPLING)
            raise UserError(f"interpolation {self.interpolation!r} is none of {known}")
        if not 1 <= self.size <= 4096:
            raise UserError(f"preprocess size {self.size} is outside 1..4096 pixels")
        if self.mode == "crop" and not self.size <= self.resize_size <= 8192:
            raise UserError(
                f"preprocess resize_size {self.resize_size} is outside {self.size} (size)..8192 pixels"
            )

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB image of any size -> uint8 [size, size, 3]."""
        out = (self.size, self.size)
        resample = RESAMPLING[self.interpolation]
        if self.mode == "pad":
            # not ImageOps.contain: it makes a line of 30000x1 an image of no pixels, so all would be black
            width, height = (max(1, round(side / max(image.size) * self.size)) for side in image.size)
            resized = image.resize((width, height), resample)
            canvas = Image.new("RGB", out)
            canvas.paste(resized, ((self.size - resized.width) // 2, (self.size - resized.height) // 2))
            return np.asarray(canvas)
        box = self._crop_box(*image.size) if self.mode == "crop" else None
        return np.asarray(image.resize(out, resample, box=box))

    def _crop_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The central crop in source coordinates (left, upper, right, lower).

        Resizing this box in one call equals torchvision's Resize(resize_size), CenterCrop(size) to within
        two grey levels, at 1.8 times the speed, and needs no huge intermediate image for a 30000x1 one.
        Bicubic and lanczos can differ by more where they overshoot black or white: Pillow clips between
        its two passes, and since version 13 chooses their order by the sizes of the call.
        """
        short = min(width, height)
        resized_w = int(self.resize_size * width / short)
        resized_h = int(self.resize_size * height / short)
        left = round((resized_w - self.size) / 2)
        upper = round((resized_h - self.size) / 2)
        scale_x, scale_y = width / resized_w, height / resized_h
        return (
            left * scale_x,
            upper * scale_y,
            min((left + self.size) * scale_x, width),
            min((upper + self.size) * scale_y, height),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises UserError on an unknown or missing field: a newer file must not be half understood."""
        fields = set(cls.__dataclass_fields__)
        if set(values) != fields:
            raise UserError(f"preprocess fields {sorted(values)} are not {sorted(fields)}")
        return cls(**values)


@dataclass(frozen=True)
class Listing:
    """What `list_images` found below a folder; every path is relative, with forward slashes."""

    paths: list[str]
    """Files with an image suffix, sorted by code point."""
    problems: dict[str, str]
    """Folders that were not entered (a link, not readable) and why."""
    ignored: Counter[str]
    """How many files have which other suffix, in lower case; hidden files and the system's have none."""
    system: Counter[str] = field(default_factory=Counter)
    """How many system folders, which were not entered, have which name."""


def list_images(root: str | os.PathLike[str], recursive: bool = True) -> Listing:
    """All files below `root` whose suffix is an image's, whatever their kind: opening decides.

    Linked folders are reported, not followed: links can lead out and round in circles.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: `root` itself cannot be listed.
    """
    paths: list[str] = []
    problems: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    system: Counter[str] = Counter()
    for name, kind, problem in walk_images(root, recursive):
        base = name.rpartition("/")[2]
        if problem:
            problems[name] = problem
        elif kind == "image":
            paths.append(name)
        elif kind == "system":
            system[base] += 1
        else:
            unseen = base.startswith(".") or base.lower() in SYSTEM_FILES
            ignored["" if unseen else os.path.splitext(base)[1].lower()] += 1
    return Listing(sorted(paths), problems, ignored, system)


def walk_images(
    root: str | os.PathLike[str], recursive: bool = True
) -> Iterator[tuple[str, Literal["image", "other", "folder", "system"], str]]:
    """(relative path, kind, problem or "") as `list_images` sorts them, in the order of the disk.

    A system folder is named and not entered. Only the names of folders not entered yet are held in memory.
    """
    waiting = [""]  # no recursion: folders can be nested more deeply than Python's calls
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(Path(root) / prefix) as scan:
                for entry in scan:
                    name = prefix + entry.name
                    linked = _is_linked_folder(entry)
                    if linked or entry.is_dir(follow_symlinks=False):
                        if not recursive:
                            continue
                        if entry.name.startswith(CONFIG_MAP):
                            continue
                        if system_folder(entry.name + "/"):
                            yield name, "system", ""
                        elif linked and not _is_of_config_map(entry.path):
                            yield name, "folder", "linked folder, not followed"
                        else:
                            waiting.append(name + "/")
                    elif has_image_suffix(name):
                        yield name, "image", ""
                    else:
                        yield name, "other", ""
        except OSError as error:
            if not prefix:
                raise
            yield prefix, "folder", f"cannot list this folder: {error.strerror}"


def system_folder(path: str) -> str:
    """`path` up to its first system folder; "" when it leads through none. A folder's own ends with "/"."""
    found = SYSTEM_PATH.search(path)
    return path[: found.end()] if found else ""


def has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_of_config_map(link: str) -> bool:
    """Whether a linked folder is one of a mounted ConfigMap: NAME -> ..data/NAME, ..data -> ..TIME."""
    data = os.path.join(os.path.dirname(link), "..data")
    target = os.readlink(link)
    if not (target.startswith("..data/") and os.path.islink(data)):
        return False
    time = os.readlink(data)
    inside = os.path.join(os.path.realpath(data), target.removeprefix("..data/"))
    return time.startswith("..20") and "/" not in time and os.path.realpath(link) == inside


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself
        return False
