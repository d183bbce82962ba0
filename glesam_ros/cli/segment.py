"""`glesam segment`: pictures and folders in; masks, overlays and one JSON in COCO results style out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import (
    MODEL_SETTINGS,
    SELECTION_SETTINGS,
    CommandError,
    add_settings,
    numbers,
    open_pipeline,
)
from glesam_ros.picture_files import SUFFIXES, is_cut_short
from glesam_ros.settings import default

if TYPE_CHECKING:
    from glesam_ros.instances import Instances
    from glesam_ros.validation import UInt8Array

# a single picture has no frame before it whose enhancement could go on
SETTINGS = (*MODEL_SETTINGS, *(name for name in SELECTION_SETTINGS if name != "enhance_below"), "overlay_alpha")
FAILURES = (ValueError, RuntimeError, OSError, MemoryError)
"""What one picture may fail with; the others are done all the same."""
ENDINGS = ("_masks.png", "_overlay.jpg")

EPILOG = """\
examples:
  glesam segment night.jpg --out result
  glesam segment photos/ more/one.png -r --out result --enhancement always
  glesam segment cup.jpg --out result --points 320,240 --points 50,60,0
  glesam segment street.jpg --out result --box 10,20,200,180 --box 300,40,420,200

written to --out, for each picture:
  NAME_masks.png      16-bit, the value is the instance id, 0 background, the higher score wins where masks overlap
  NAME_overlay.jpg    the picture with coloured masks, for people
and one results.json for all: a list with one entry an instance in COCO results style,
  image_id, file_name, category_id, segmentation (RLE, whole mask), bbox [x, y, width, height], area, score,
  stability, id (value in NAME_masks.png), degradation (0 clear .. 1), enhanced
read it with pycocotools.mask.decode(entry["segmentation"])."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "segment", help="masks, overlays and JSON of pictures and folders", epilog=EPILOG,
        description="Segment pictures: everything in them, or what points and boxes ask for.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pictures(parser)
    parser.add_argument(
        "--points", action="append", type=_point, default=[], metavar="X,Y[,0|1]",
        help="a point of the object in pixels, 1 (default) inside or 0 outside; repeat for more points of this object",
    )
    parser.add_argument(
        "--box", action="append", type=_box, default=[], metavar="X1,Y1,X2,Y2",
        help="a box around an object in pixels; repeat for more objects",
    )
    add_settings(parser, SETTINGS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Segment all pictures; 1 when one of them failed, each failure is named."""
    from tqdm import tqdm

    pictures = find_pictures(args.paths, args.recursive, args.out)
    keep_pictures(pictures, (args.out / f"{stem}{ending}" for _, stem in pictures for ending in ENDINGS))
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = prompts_of(args.points, args.box)
    pipeline = open_pipeline(args, SETTINGS, enhance_below=min(default("enhance_below"), args.enhance_above))
    results: list[dict[str, Any]] = []
    done, failed, seconds = 0, 0, 0.0
    try:
        for image_id, (path, stem) in enumerate(tqdm(pictures, unit="picture", disable=None), start=1):
            try:
                image = read_picture(path)
                start = time.perf_counter()
                instances = pipeline.segment(image, **prompts)
                seconds += time.perf_counter() - start
            except FAILURES as error:
                failed += 1
                say_skipped("segment", path, error)
                continue
            _write_pictures(args.out / stem, image, instances, args.overlay_alpha)
            results += coco_results(instances, image_id, str(path))
            done += 1
    finally:
        # also of a run that was stopped, unless it would take the place of one that was not
        if done or failed == len(pictures):
            (args.out / "results.json").write_text(json.dumps(results, indent=1))
    pipeline.close()
    speed = f", {1000 * seconds / done:.0f} ms a picture" if done else ""
    print(f"{done} of {len(pictures)} pictures, {len(results)} instances{speed}; results in {args.out}")
    if failed:
        print(f"glesam segment: error: {failed} of {len(pictures)} pictures failed, named above", file=sys.stderr)
    return 1 if failed else 0


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


def coco_results(instances: Instances, image_id: int, file_name: str) -> list[dict[str, Any]]:
    """One entry an instance in COCO results style; `segmentation` is RLE of the whole mask with text counts."""
    import numpy as np
    from pycocotools import mask as coco

    entries = []
    for k in range(len(instances)):
        rle = coco.encode(np.asfortranarray(instances.masks[k], dtype=np.uint8))
        x1, y1, x2, y2 = (float(v) for v in instances.boxes[k])
        entries.append({
            "image_id": image_id,
            "file_name": file_name,
            "category_id": 1,
            "segmentation": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": int(coco.area(rle)),
            "score": round(float(instances.scores[k]), 4),
            "stability": round(float(instances.stability[k]), 4),
            "id": int(instances.ids[k]),
            "degradation": round(instances.degradation, 4),
            "enhanced": instances.enhanced,
        })
    return entries


def prompts_of(points: Iterable[tuple[float, ...]], boxes: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Prompts of the options as arguments of `Pipeline.segment`; empty for everything mode."""
    prompts: dict[str, Any] = {}
    if points:
        prompts["points"] = [p[:2] for p in points]
        prompts["labels"] = [p[2] if len(p) == 3 else 1.0 for p in points]
    if boxes:
        prompts["boxes"] = list(boxes)
    return prompts


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file: links, too."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _write_pictures(stem: Path, image: UInt8Array, instances: Instances, alpha: float) -> None:
    import cv2

    from glesam_ros.overlay import draw_overlay

    stem.parent.mkdir(parents=True, exist_ok=True)
    labels = instances.label_map()
    overlay = draw_overlay(image, instances, alpha, labels)
    for ending, pixels in zip(ENDINGS, (labels, cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR))):
        path = stem.with_name(stem.name + ending)
        done, data = cv2.imencode(path.suffix, pixels)
        if not done:
            raise CommandError(f"{path}: OpenCV could not encode the picture")
        path.write_bytes(data.tobytes())


def _point(text: str) -> tuple[float, ...]:
    values = numbers(text, (2, 3), "X,Y or X,Y,0 or X,Y,1 in pixels")
    if len(values) == 3 and values[2] not in (0, 1):
        raise argparse.ArgumentTypeError(f"expected 1 (inside) or 0 (outside) as third number, got {text!r}")
    return values


def _box(text: str) -> tuple[float, ...]:
    return numbers(text, (4,), "X1,Y1,X2,Y2 in pixels")
