"""Pictures of the commands: found below paths, read, written, never replaced; those that fail are named."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import CommandError
from glesam_ros.picture_files import SUFFIXES, decoded, encoded
from glesam_ros.value_range import OWN_RANGE, ValueRange

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glesam_ros.validation import UInt8Array

FAILURES = (ValueError, RuntimeError, OSError, MemoryError)
"""What one picture may fail with; the others are done all the same."""

_FILM = "a film; take its frames out: ffmpeg -i FILM frames/%06d.png"
_BAG = "a recorded bag: glesam bag"
NO_PICTURES = {
    **dict.fromkeys((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"), _FILM),
    **dict.fromkeys((".bag", ".db3", ".mcap"), _BAG),
}
"""Endings of what is taken for pictures by mistake: what it is, and the way from there."""


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that turn pictures into files: PATH, what `find_pictures` takes; --out; -r."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="picture, or folder of pictures")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, none of PATH; made if needed"
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="look into the folders below, too")


def find_pictures(
    paths: Sequence[Path], recursive: bool | None = None, out: Path | None = None
) -> list[tuple[Path, Path]]:
    """Pictures named by `paths`, each with the stem of its results: its path below the folder it was found in.

    Args:
        paths: pictures and folders of pictures.
        recursive: look into the folders below, too; None of a command that has no option for it.
        out: where results will be written; what lies there is no picture of a folder above it.

    Raises:
        CommandError: a path does not exist, there is no picture at all, or one of the folders is `out`.
    """
    found: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            results = None if out is None else Path(os.path.relpath(out.resolve(), path.resolve()))
            if results == Path():
                raise CommandError(f"--out {out}: expected another folder than that of the pictures")
            inside = sorted(p for p in path.glob("**/*" if recursive else "*") if p.suffix.lower() in SUFFIXES)
            names = ((p, p.relative_to(path)) for p in inside if p.is_file())
            found += [(p, name) for p, name in names if results is None or results not in name.parents]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise CommandError(f"{path}: no such picture or folder")
    if not found:
        kinds = " ".join(SUFFIXES)
        hint = "; -r looks into the folders below, too" if recursive is False else ""
        raise CommandError(f"no picture ({kinds}) in {', '.join(map(str, paths))}{hint}")
    stems: set[Path] = set()
    result = []
    for path, name in found:
        stem = name.with_suffix("")
        if stem in stems:  # a.jpg and a.png, or the same name from two folders: results must not overwrite
            base = name.with_name(name.name.replace(".", "_"))
            tries = (base.with_name(f"{base.name}_{n}" if n else base.name) for n in range(len(found) + 1))
            stem = next(s for s in tries if s not in stems)
        stems.add(stem)
        result.append((path, stem))
    return result


def keep_pictures(pictures: Iterable[tuple[Path, Path]], results: Iterable[Path]) -> None:
    """Refuse to write results over the pictures.

    Args:
        pictures: what `find_pictures` gave.
        results: files that will be written.

    Raises:
        CommandError: one of them would replace a picture.
    """
    sources = {_identity(path): path for path, _ in pictures}
    for file in results:
        if file.exists() and (path := sources.get(_identity(file))):
            raise CommandError(f"{file}: expected another folder than that of {path}, which would be replaced")


def say_skipped(command: str, path: Path, error: Exception) -> None:
    """Name a picture that failed, beside the bar of the progress."""
    from tqdm import tqdm

    # Python's own MemoryError has no text
    tqdm.write(f"glesam {command}: skipped {path}: {str(error) or 'out of memory'}", file=sys.stderr)


def read_picture(path: Path, values: ValueRange = OWN_RANGE) -> UInt8Array:
    """A picture file as (H, W, 3) uint8 RGB; EXIF orientation applied, grey repeated, alpha dropped.

    Args:
        path: the file.
        values: what is black and white of pictures of 16 bits or floats.

    Raises:
        ValueError: not a picture, or cut short; or floats that are not finite.
        OSError: cannot be read.
    """
    import cv2
    import numpy as np

    if what := NO_PICTURES.get(path.suffix.lower()):
        raise ValueError(f"expected a picture, got {what}")
    # OpenCV makes no colours of grey floats, so that is left to the end
    pixels = decoded(path.read_bytes(), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            raise ValueError("expected finite values, got NaN or infinity")
        pixels = values.to_byte(pixels)
    if pixels.ndim == 2:
        pixels = np.dstack([pixels] * 3)
    # not cv2.cvtColor: that of OpenCV 4.5 refuses a lone pixel
    return np.ascontiguousarray(pixels[..., ::-1], np.uint8)


def write_picture(path: Path, image: NDArray[Any], quality: int = 95) -> None:
    """Write (H, W, 3) uint8 RGB or (H, W) grey in the format of the ending of `path`; folders above it are made.

    `quality`, 0..100, is that of a JPEG.

    Raises:
        OSError: it cannot be encoded or written.
    """
    import numpy as np

    data = encoded(path, np.ascontiguousarray(image[..., ::-1]) if image.ndim == 3 else image, quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file: links, too."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino
