"""Pictures of the commands: found below paths, read, written, never replaced; those that fail are named."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glesam_ros.cli.options import CommandError
from glesam_ros.picture_files import SUFFIXES, is_cut_short

if TYPE_CHECKING:
    from glesam_ros.validation import UInt8Array

FAILURES = (ValueError, RuntimeError, OSError, MemoryError)
"""What one picture may fail with; the others are done all the same."""
JPEG_QUALITY = 95


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that turn pictures into files: PATH, what `find_pictures` takes; --out; -r."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="picture, or folder of pictures")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, none of PATH; made if needed"
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="look into the folders below, too")


def find_pictures(paths: Sequence[Path], recursive: bool, out: Path | None = None) -> list[tuple[Path, Path]]:
    """Pictures named by `paths`, each with the stem of its results: its path below the folder it was found in.

    Args:
        paths: pictures and folders of pictures.
        recursive: look into the folders below, too.
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
        hint = "" if recursive else "; -r looks into the folders below, too"
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


def read_picture(path: Path) -> UInt8Array:
    """A picture file as (H, W, 3) uint8 RGB; EXIF orientation applied, grey repeated, 16 bit scaled, alpha dropped.

    Raises:
        ValueError: not a picture, or cut short.
        OSError: cannot be read.
    """
    import cv2
    import numpy as np

    data = path.read_bytes()
    if not data:
        raise ValueError("expected a picture, got an empty file")
    if is_cut_short(data):
        raise ValueError(f"expected a whole picture, got one cut short after {len(data)} bytes; copy it again")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is not None:
            return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
    except cv2.error as error:
        raise ValueError(f"expected a picture, OpenCV cannot decode it: {str(error).strip()}") from error
    raise ValueError(f"expected a picture ({' '.join(SUFFIXES)}), got a file that OpenCV cannot decode")


def write_picture(path: Path, image: UInt8Array) -> None:
    """Write an (H, W, 3) uint8 RGB picture in the format of the ending of `path`; folders above it are made.

    Raises:
        CommandError: OpenCV could not encode it.
    """
    import cv2

    ending = path.suffix.lower()
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if ending in (".jpg", ".jpeg") else []
    done, data = cv2.imencode(ending, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    if not done:
        raise CommandError(f"{path}: OpenCV could not encode the picture")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file: links, too."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino
