"""`glesam segment`: pictures and folders in; masks, overlays and one JSON in COCO results style out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import (
    MODEL_SETTINGS,
    SELECTION_SETTINGS,
    VALUE_SETTINGS,
    add_settings,
    numbers,
    open_pipeline,
)
from glesam_ros.cli.pictures import (
    FAILURES,
    add_pictures,
    find_pictures,
    keep_pictures,
    read_picture,
    say_skipped,
    write_picture,
)
from glesam_ros.value_range import ValueRange

if TYPE_CHECKING:
    from glesam_ros.instances import Instances
    from glesam_ros.validation import UInt8Array

# a single picture has no frame before it whose enhancement could go on
SETTINGS = (*MODEL_SETTINGS, *(name for name in SELECTION_SETTINGS if name != "enhance_below"), "overlay_alpha")
ENDINGS = ("_masks.png", "_overlay.jpg")

EPILOG = """\
examples:
  glesam segment night.jpg --out result
  glesam segment photos/ more/one.png -r --out result --enhancement always
  glesam segment cup.jpg --out result --points 320,240 --points 50,60,0
  glesam segment street.jpg --out result --box 10,20,200,180 --box 300,40,420,200

written to --out, for each picture:
  NAME_masks.png      16-bit, the value is the instance id, 0 background; where masks overlap the better ranked lies on
                      top, of --points and --box the smaller
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
    add_settings(parser, (*SETTINGS, *VALUE_SETTINGS))
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Segment all pictures; 1 when one of them failed, each failure is named."""
    from tqdm import tqdm

    pictures = find_pictures(args.paths, args.recursive, args.out)
    keep_pictures(pictures, (args.out / f"{stem}{ending}" for _, stem in pictures for ending in ENDINGS))
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = prompts_of(args.points, args.box)
    pipeline = open_pipeline(args, SETTINGS)
    results: list[dict[str, Any]] = []
    done, failed, seconds = 0, 0, 0.0
    try:
        for image_id, (path, stem) in enumerate(tqdm(pictures, unit="picture", disable=None), start=1):
            try:
                image = read_picture(path, ValueRange.of(args))
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


def _write_pictures(stem: Path, image: UInt8Array, instances: Instances, alpha: float) -> None:
    from glesam_ros.overlay import draw_overlay

    labels = instances.label_map()
    masks, overlay = (stem.with_name(stem.name + ending) for ending in ENDINGS)
    write_picture(masks, labels)
    write_picture(overlay, draw_overlay(image, instances, alpha, labels))


def _point(text: str) -> tuple[float, ...]:
    values = numbers(text, (2, 3), "X,Y or X,Y,0 or X,Y,1 in pixels")
    if len(values) == 3 and values[2] not in (0, 1):
        raise argparse.ArgumentTypeError(f"expected 1 (inside) or 0 (outside) as third number, got {text!r}")
    return values


def _box(text: str) -> tuple[float, ...]:
    return numbers(text, (4,), "X1,Y1,X2,Y2 in pixels")
