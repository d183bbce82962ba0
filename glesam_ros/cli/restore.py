"""`glesam restore`: bad pictures and folders of them in, restored pictures out."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from glesam_ros.cli.options import VALUE_SETTINGS, add_settings, opened
from glesam_ros.cli.pictures import (
    FAILURES,
    add_pictures,
    find_pictures,
    keep_pictures,
    read_picture,
    say_skipped,
    write_picture,
)
from glesam_ros.picture_files import SUFFIXES
from glesam_ros.value_range import ValueRange

SETTINGS = ("device", "precision")
TEXTS = {
    "device": "Where the model runs; scr-sd21: auto, cuda or cpu.",
    "precision": "Arithmetic; scr-sd21: auto, fp32, fp16 or bf16.",
}
COLOUR_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".pgm")
"""Endings of files that colours can be written to; results of other pictures are PNG."""

EPILOG = """\
examples:
  glesam restore night.jpg --out result
  glesam restore photos/ more/one.png -r --out result
  glesam restore photos/ --out result --classes road car "traffic light"
  glesam restore photos/ --out result --device cuda --precision bf16

Restored pictures lie in --out under the names of their pictures, in the same size and colours, 8 bit; JPEG in quality
95. What --classes names is what the pictures show: it tells the model what to restore. The weights: glesam models get
scr-sd21"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "restore", help="clear pictures of bad ones", epilog=EPILOG,
        description="Restore pictures that are blurred, noisy, compressed or small.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pictures(parser)
    parser.add_argument("--model", default="scr-sd21", metavar="NAME", help="registered name; default: scr-sd21")
    parser.add_argument(
        "--classes", nargs="+", type=_class_name, default=[], metavar="NAME",
        help="what the pictures show, in words, the most important first; default: nothing is said",
    )
    add_settings(parser, (*SETTINGS, *VALUE_SETTINGS), texts=TEXTS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Restore all pictures; 1 when one of them failed, each failure is named."""
    from tqdm import tqdm

    from glesam_ros.semantic import load_restorer

    found = find_pictures(args.paths, args.recursive, args.out)
    pictures = [(path, args.out / result_name(path, stem)) for path, stem in found]
    keep_pictures(pictures, (target for _, target in pictures))
    restorer = opened(load_restorer, args.model, args.device, args.precision)
    failed, seconds = 0, 0.0
    for path, target in tqdm(pictures, unit="picture", disable=None):
        try:
            image = read_picture(path, ValueRange.of(args))
            start = time.perf_counter()
            restored = restorer.restore(image, args.classes)
            seconds += time.perf_counter() - start
        except FAILURES as error:
            failed += 1
            say_skipped("restore", path, error)
            continue
        write_picture(target, restored)
    restorer.close()
    done = len(pictures) - failed
    speed = f", {1000 * seconds / done:.0f} ms a picture" if done else ""
    print(f"{done} of {len(pictures)} pictures{speed}; results in {args.out}")
    if failed:
        print(f"glesam restore: error: {failed} of {len(pictures)} pictures failed, named above", file=sys.stderr)
    return 1 if failed else 0


def result_name(path: Path, stem: Path) -> Path:
    """Name of the restored picture below --out: that of the picture, if colours can be written to such a file.

    Args:
        path: of the picture.
        stem: its name below --out without an ending, as `find_pictures` gives it.
    """
    return stem.with_name(stem.name + (path.suffix if path.suffix.lower() in COLOUR_SUFFIXES else ".png"))


def _class_name(text: str) -> str:
    if not text.strip(" ,_"):
        raise argparse.ArgumentTypeError(f"expected a name in words, got {text!r}")
    return text
