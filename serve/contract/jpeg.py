"""The segments of a JPEG's first picture; telephones write previews, depth maps and videos behind it."""

import re

MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # within a scan 0 or a restart (d0 to d7) follows each ff
START, END, SCAN, EXIF = 0xD8, 0xD9, 0xDA, 0xE1
APPLICATION = (*range(0xE0, 0xF0), 0xFE)  # segments of programs, and comments
PROFILE, XMP = b"ICC_PROFILE\0", b"http://ns.adobe.com/xap/1.0/\0"
COLOURS = (0xE0, 0xEE)  # JFIF's and Adobe's, which say how to read the colours


def scans_and_end(data: bytes) -> tuple[int, int]:
    """Return how many scans the first picture has, and where it ends.

    As libjpeg reads it: what a segment holds is passed over, and so is rubbish between segments.
    """
    scans = at = 0
    while found := MARKER.search(data, at):
        marker, at = found[0][1], found.end()
        if marker == END:
            return scans, at
        if marker == START:
            continue
        scans += marker == SCAN
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return scans, len(data)


def without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Return the file without comments and blocks of programs, and its EXIF block.

    The colour profile stays, as does XMP, which may hold the orientation."""
    kept, exif = [data[:2]], b""
    start = at = 2
    while found := MARKER.search(data, at):
        marker, start = found[0][1], found.start()
        if marker in (SCAN, END):
            break
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
        body = data[found.end() + 2 : at]
        if marker == EXIF and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif (
            marker not in APPLICATION
            or (marker in COLOURS and len(body) >= 12)
            or (body.startswith((PROFILE, XMP)) and len(body) > len(PROFILE) + 2)  # numbers of its parts
        ):
            kept.append(data[start:at])
    return b"".join(kept) + data[start:], exif
