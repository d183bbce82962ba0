"""What counts as a picture file, and whether one is whole."""

from __future__ import annotations

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings that count as pictures in a folder, in lower case."""


def is_cut_short(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker or a PNG its end chunk; OpenCV 4 fills the rest with grey in silence.

    What follows the picture, such as the film of a motion photo, does not count.
    """
    if data.startswith(b"\xff\xd8"):
        return data.find(b"\xff\xd9", _scan_of(data)) < 0
    return data.startswith(b"\x89PNG") and b"IEND" not in data


def _scan_of(data: bytes) -> int:
    """Where the first scan of a JPEG begins; behind the data where there is none.

    The segments before are stepped over, since a thumbnail in one has an end marker of its own; in a scan it cannot be,
    0xff is stuffed there.
    """
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        if marker == 0xFF:  # fills
            at += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # these have no length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)
