"""`glesam semantic`: pictures and folders in; maps of classes, overlays and one JSON out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import BESIDE_TEXTS, VALUE_SETTINGS, add_settings, opened
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
    from glesam_ros.semantic import SemanticMap
    from glesam_ros.validation import UInt8Array

SETTINGS = ("device", "precision", "overlay_alpha")
CLASSES, CONFIDENCE, OVERLAY = "_classes.png", "_confidence.png", "_overlay.jpg"

EPILOG = """\
examples:
  glesam semantic street.jpg --out result
  glesam semantic photos/ more/one.png -r --out result --overlay-alpha 0.7
  glesam semantic photos/ --out result --model rass-sd21 --device cuda
  glesam semantic photos/ --out result --model runs/mine/export
  glesam semantic photos/ --out result --no-confidence

written to --out, for each picture:
  NAME_classes.png     indexed PNG in the colours of the classes, the value is the number of the class (16 bit grey
                       beyond 256 classes)
  NAME_confidence.png  8 bit, 255 is 1.0
  NAME_overlay.jpg     the picture with coloured classes, for people
and one semantic.json: model, classes, palette, and for each picture file_name, size, confidence (mean), and of each
  class that is there name, share (of the pixels), confidence (mean over them)."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "semantic", help="class of every pixel: maps, overlays and JSON of pictures and folders", epilog=EPILOG,
        description="Say of every pixel what it shows: road, car, person, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pictures(parser)
    parser.add_argument(
        "--model", default="rass-nano", metavar="NAME",
        help="registered name, or folder with rass_nano.onnx and rass_nano.json; default: rass-nano",
    )
    parser.add_argument(
        "--confidence", action=argparse.BooleanOptionalAction, default=True,
        help="write NAME_confidence.png; default: yes",
    )
    add_settings(parser, (*SETTINGS, *VALUE_SETTINGS), texts=BESIDE_TEXTS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Classify all pictures; 1 when one of them failed, each failure is named."""
    from tqdm import tqdm

    from glesam_ros.semantic import load_semantic

    pictures = find_pictures(args.paths, args.recursive, args.out)
    endings = (CLASSES, OVERLAY, *([CONFIDENCE] if args.confidence else []))
    keep_pictures(pictures, (args.out / f"{stem}{ending}" for _, stem in pictures for ending in endings))
    segmenter = opened(load_semantic, args.model, args.device, args.precision)
    args.out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    failed, seconds = 0, 0.0
    try:
        for path, stem in tqdm(pictures, unit="picture", disable=None):
            try:
                image = read_picture(path, ValueRange.of(args))
                start = time.perf_counter()
                found = segmenter.segment(image)
                seconds += time.perf_counter() - start
            except FAILURES as error:
                failed += 1
                say_skipped("semantic", path, error)
                continue
            _write_pictures(args.out / stem, image, found, args.overlay_alpha, args.confidence)
            entries.append({"file_name": str(path), **summary(found)})
    finally:
        # also of a run that was stopped, unless it would take the place of one that was not
        if entries or failed == len(pictures):
            document = {
                "model": segmenter.name, "classes": list(segmenter.classes), "palette": segmenter.palette.tolist(),
                "pictures": entries,
            }
            (args.out / "semantic.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    segmenter.close()
    speed = f", {1000 * seconds / len(entries):.0f} ms a picture" if entries else ""
    print(f"{len(entries)} of {len(pictures)} pictures{speed}; results in {args.out}")
    if failed:
        text = f"glesam semantic: error: {failed} of {len(pictures)} pictures failed, named above"
        print(text, file=sys.stderr)
    return 1 if failed else 0


def summary(found: SemanticMap) -> dict[str, Any]:
    """Size, mean confidence, and of each class that is there, the largest first, share of the pixels and confidence.

    Shares and confidences are 0..1, rounded to 4 digits.
    """
    import numpy as np

    height, width = found.size
    count = len(found.classes)
    pixels = np.bincount(found.labels.ravel(), minlength=count)
    sums = np.bincount(found.labels.ravel(), found.confidence.ravel(), count)
    order = [int(k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]
    return {
        "size": [width, height],
        "confidence": round(float(sums.sum() / pixels.sum()), 4),
        "classes": [
            {
                "class": found.classes[k], "share": round(float(pixels[k] / pixels.sum()), 4),
                "confidence": round(float(sums[k] / pixels[k]), 4),
            }
            for k in order
        ],
    }


def _write_pictures(stem: Path, image: UInt8Array, found: SemanticMap, alpha: float, confidence: bool) -> None:
    import numpy as np

    from glesam_ros.labelled import write_label_map
    from glesam_ros.overlay import draw_classes

    stem.parent.mkdir(parents=True, exist_ok=True)
    write_label_map(stem.with_name(stem.name + CLASSES), found.labels, found.palette)
    write_picture(stem.with_name(stem.name + OVERLAY), draw_classes(image, found, alpha))
    if confidence:
        share = np.round(255 * found.confidence).astype(np.uint8)
        write_picture(stem.with_name(stem.name + CONFIDENCE), share)
