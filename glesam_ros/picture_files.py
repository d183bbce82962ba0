"""Picture files: what counts as one, lists of them, whether one is whole, its pixels and back."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings that count as pictures in a folder, in lower case."""

# the next marker in entropy-coded data: 0xFF before anything but stuffing (00), a restart (D0..D7) or fill (FF)
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def listed(listing: Path) -> list[str]:
    """Names of pictures in a text file, one a line; lines without a name do not count.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read, or is not UTF-8.
    """
    return [name for line in listing.read_text(encoding="utf-8-sig").splitlines() if (name := line.strip())]


def without_ending(name: str) -> str:
    """The name of a picture without its ending, where it has one; what follows another point stays."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else name


def end_of_jpeg(data: bytes) -> int | None:
    """Where the end marker of a JPEG is; None where it lacks. What follows it does not count."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return found.start()
        # segments with a length are jumped over: an EXIF thumbnail has an end marker of its own
        if marker not in (0x01, 0xD8):
            at += int.from_bytes(data[at : at + 2], "big")
    return None


def is_cut_short(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker or a PNG its end chunk; OpenCV 4 fills the rest with grey in silence.

    What follows the picture, such as the film of a motion photo, does not count.
    """
    if data.startswith(b"\xff\xd8"):
        return end_of_jpeg(data) is None
    return data.startswith(b"\x89PNG") and b"IEND" not in data


def is_indexed(data: bytes) -> bool:
    """Whether a PNG holds indices into colours of its own; OpenCV gives these colours in their place."""
    return data.startswith(b"\x89PNG") and data[25:26] == b"\x03"  # the type of colour in its header


def decoded(data: bytes, flags: int) -> NDArray[Any]:
    """Pixels of a picture file as OpenCV reads it with `flags` (cv2.IMREAD_...): (H, W, 3) BGR, or what is in the file.

    Raises:
        ValueError: no picture, or one that is cut short.
    """
    import cv2
    import numpy as np

    if not data:
        raise ValueError("expected a picture, got an empty file")
    if is_cut_short(data):
        raise ValueError(f"expected a whole picture, got one cut short after {len(data)} bytes; copy it again")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f"expected a picture, OpenCV cannot decode it: {str(error).strip()}") from error
    if image is None:
        raise ValueError(f"expected a picture ({' '.join(SUFFIXES)}), got a file that OpenCV cannot decode")
    return image


def encoded(file: Path, image: NDArray[Any], quality: int = 95) -> bytes:
    """What to write to `file`, whose ending is the format.

    Args:
        file: path or name.
        image: (H, W) or (H, W, 3) BGR.
        quality: of a JPEG, 0..100.

    Raises:
        OSError: OpenCV cannot encode it, for example a side that is longer than the format has; names the file.
    """
    import cv2

    ending = file.suffix.lower()
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if ending in (".jpg", ".jpeg") else []
    why = ""
    try:
        done, data = cv2.imencode(ending, image, options)
    except cv2.error as error:
        done, why = False, f": {str(error).strip()}"
    if not done:
        got = f"{image.shape[1]}x{image.shape[0]} pixels{why}"
        raise OSError(f"{file}: expected a picture that OpenCV can encode, got {got}; scale it down")
    return data.tobytes()
