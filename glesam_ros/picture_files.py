"""What counts as a picture file, and whether one is whole."""

from __future__ import annotations

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings that count as pictures in a folder, in lower case."""


def is_cut_short(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker or a PNG its end chunk; OpenCV 4 fills the rest with grey in silence."""
    if data.startswith(b"\xff\xd8"):
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return data.startswith(b"\x89PNG") and b"IEND" not in data[-4096:]
