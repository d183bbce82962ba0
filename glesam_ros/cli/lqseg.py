"""`glesam lqseg`: build, check and sum up data sets of clear and degraded pictures with their masks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from glesam_ros.cli.options import CommandError, add_action, positive, progress

NAMED_FAULTS = 5
"""So many faults are printed; errors.jsonl has all."""

EPILOG = """\
examples:
  glesam lqseg build --from coco --images train2017 --annotations instances_train2017.json --out lqseg_train
  glesam lqseg build --from folder --images MSRA10K --annotations MSRA10K --binary --out lqseg_msra
  glesam lqseg build --from bsds --images bsds500/images --annotations bsds500/regions --split test --out lqseg_bsds
  glesam lqseg verify lqseg_train
  glesam lqseg info lqseg_train

sources (--from):
  coco     COCO or LVIS JSON: polygons and RLE; crowd regions are left out
  folder   pictures and masks of the same name; a mask is binary or a label map, 0 is no object; of an indexed PNG the
           index is the label
  ade20k   as folder; a label is the category
  bsds     masks <name>_<k>.png, the whole picture segmented by annotator k
A build that was stopped goes on with the same command. What is malformed is named in errors.jsonl, the rest goes on."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "lqseg", help="build and check data sets of degraded pictures", epilog=EPILOG,
        description="LQSeg data sets from annotated pictures: clear, degraded, masks, manifest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = add_action(actions, "lqseg", "build", "build a data set, or go on with one that was stopped")
    build.add_argument(
        "--from", dest="source", required=True, choices=("coco", "folder", "ade20k", "bsds"), help="kind of the source"
    )
    build.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the clear pictures")
    build.add_argument(
        "--annotations", type=Path, required=True, metavar="PATH", help="COCO or LVIS JSON file, or folder of masks"
    )
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or one to go on with")
    build.add_argument(
        "--levels", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="how bad; default: 1 2 3"
    )
    build.add_argument(
        "--kinds", nargs="+", default=["lq"], metavar="KIND",
        help="lq (LQSeg), low_light, rain, ...; a wrong name is answered with all; default: lq",
    )
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of the data set; default: 0")
    build.add_argument(
        "--split", default="train", metavar="NAME",
        help="name of the split; NAME.txt beside the folder of pictures, where there is one, chooses them "
        "(not for coco); default: train",
    )
    build.add_argument("--limit", type=positive(int), metavar="N", help="take the first N pictures only")
    build.add_argument("--workers", type=positive(int), default=1, metavar="N", help="threads; default: 1")
    build.add_argument("--binary", action="store_true", help="for folder: masks are grey, above 127 is the object")
    build.add_argument("--strict", action="store_true", help="exit with 1 when anything was malformed")
    build.set_defaults(func=run_build)
    for name, run, text in (
        ("verify", run_verify, "check the checksum of every file"), ("info", run_info, "say what is in a data set")
    ):
        action = add_action(actions, "lqseg", name, text)
        action.add_argument("folder", type=Path, metavar="DIR", help="folder of the data set")
        action.set_defaults(func=run)


def run_build(args: argparse.Namespace) -> int:
    """Build; 1 when no picture could be used, or with --strict when anything was malformed."""
    from glesam_ros.lqseg.build import ERRORS, BuildOptions, build

    options = BuildOptions(
        args.source, args.images, args.annotations, tuple(args.levels), tuple(args.kinds), args.seed, args.split,
        args.limit, args.binary,
    )
    try:
        summary = build(options, args.out, args.workers, progress("picture"))
    except ValueError as error:
        raise CommandError(str(error)) from error
    counts = summary.counts
    print(
        f"{counts['images']} pictures, {counts['degraded']} degraded, {counts['instances']} instances in {args.out}"
    )
    for fault in summary.faults[:NAMED_FAULTS]:
        where = fault.file if fault.annotation is None else f"{fault.file}, {fault.annotation}"
        print(f"glesam lqseg: left out: {where}: {fault.kind}: {fault.message}", file=sys.stderr)
    if summary.faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts["faults"].items())
        print(f"glesam lqseg: {len(summary.faults)} malformed: {kinds}; see {args.out / ERRORS}", file=sys.stderr)
    if not counts["images"]:
        raise CommandError("expected at least one picture with a mask, got none")
    return 1 if args.strict and summary.faults else 0


def run_verify(args: argparse.Namespace) -> int:
    """Check all files; 1 when something is wrong, each is named."""
    from glesam_ros.lqseg.verify import verify

    try:
        problems = verify(args.folder, progress("file"))
    except ValueError as error:
        raise CommandError(str(error)) from error
    for problem in problems:
        print(f"glesam lqseg: {problem}", file=sys.stderr)
    print(f"{args.folder}: {f'{len(problems)} problems' if problems else 'all files are as built'}")
    return 1 if problems else 0


def run_info(args: argparse.Namespace) -> int:
    """Print settings and counts."""
    from glesam_ros.datasets import read_lqseg_info

    try:
        info = read_lqseg_info(args.folder)
    except ValueError as error:
        raise CommandError(str(error)) from error
    counts = dict(info["counts"])
    counts["faults"] = ", ".join(f"{n} {kind}" for kind, n in counts["faults"].items()) or "none"
    for name, value in {**info["settings"], "categories": len(info["categories"]), **counts}.items():
        print(f"{name:21} {value if not isinstance(value, list) else ' '.join(map(str, value))}")
    return 0
