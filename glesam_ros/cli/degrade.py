"""`glesam degrade`: pictures in; degraded pictures with what was sampled, or a preview sheet of all kinds, out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.cli.options import CommandError, degradation, positive, seed
from glesam_ros.cli.pictures import FAILURES, find_pictures, keep_pictures, read_picture, say_skipped, write_picture

if TYPE_CHECKING:
    from glesam_ros.validation import UInt8Array

PARAMETERS = "degraded.json"
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")
SHEET_PICTURES = 8
"""At most so many stand side by side on a sheet."""
LABEL_HEIGHT = 24
GAP = 4

EPILOG = """\
examples:
  glesam degrade photo.jpg --kind rain --level 3 --seed 7 --out out
  glesam degrade photos/ more/one.png -r --kinds lq fog --levels 1 3 --out out
  glesam degrade photo.jpg --sheet sheet.png                  all kinds and levels on one labelled picture
  glesam degrade photo.jpg --sheet sheet.png --kinds lq rain
  glesam degrade --list                                       the kinds, and which training never sees

written to --out: NAME_KIND-LEVEL.png for each picture, kind and level, the size of the picture, and one degraded.json:
  a list with one entry a file: picture, file, kind, level, seed, parameters (what was sampled)
The same picture, kind, level and seed give the same bits on the same numpy and OpenCV.
The sheet shows each picture at --size, degraded at that size, so that noise and blocks are seen pixel by pixel."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "degrade", help="rain, fog, night, blur, ... for pictures, or a preview sheet of them", epilog=EPILOG,
        description="Make pictures worse as LQSeg and as robots see them, in three levels.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="picture, or folder of pictures")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the degraded pictures, made if needed")
    parser.add_argument(
        "--sheet", type=_sheet, metavar="FILE", help=f"preview sheet to write ({' '.join(SHEET_SUFFIXES)})"
    )
    parser.add_argument("--list", action="store_true", help="print the kinds")
    parser.add_argument("-r", "--recursive", action="store_true", help="look into the folders below, too")
    parser.add_argument(
        "--kind", "--kinds", dest="kinds", nargs="+", type=_kind, metavar="KIND",
        help="of degradation, see --list; default: all",
    )
    parser.add_argument(
        "--level", "--levels", dest="levels", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3],
        help="how bad, 1 light to 3 severe; default: 1 2 3",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of each picture; default: 0")
    parser.add_argument(
        "--size", type=positive(int), default=400, metavar="PX",
        help="long side of a picture on the sheet; a smaller picture stays as it is; default: 400",
    )
    parser.set_defaults(func=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Degrade, draw the sheet or list the kinds; 1 when a picture failed, each is named."""
    if args.list:
        _print_kinds()
        return 0
    if not args.paths or (args.out is None and args.sheet is None):
        args.usage_error("expected pictures and --out DIR or --sheet FILE, or --list alone")
    from glesam_ros.degradation import names

    kinds, levels = list(dict.fromkeys(args.kinds or names())), sorted(set(args.levels))
    pictures = find_pictures(args.paths, args.recursive, args.out)
    if args.sheet is not None and len(pictures) > SHEET_PICTURES:
        raise CommandError(f"--sheet: expected at most {SHEET_PICTURES} pictures, got {len(pictures)}; name fewer")
    files: list[Path] = [args.sheet] if args.sheet is not None else []
    earlier: list[dict[str, Any]] = []
    if args.out is not None:
        files += [args.out / _file(stem, kind, level) for _, stem in pictures for kind in kinds for level in levels]
        earlier = _earlier(args.out / PARAMETERS)
    keep_pictures(pictures, files)
    failures: list[Path] = []
    blocks: list[UInt8Array] = []
    entries: list[dict[str, Any]] = []
    try:
        for path, stem, image in _read(pictures, failures):
            try:
                if args.out is not None:
                    # one by one: what was written has its entry, also where the next fails
                    for entry in _write_degraded(args.out, path, stem, image, kinds, levels, args.seed):
                        entries.append(entry)
                if args.sheet is not None:
                    blocks.append(sheet_block(_shrunk(image, args.size), path.name, kinds, levels, args.seed))
            except (ValueError, MemoryError) as error:
                failures.append(path)
                say_skipped("degrade", path, error)
    finally:  # also of a run that was stopped
        if entries:
            written = {entry["file"] for entry in entries}
            others = [entry for entry in earlier if entry["file"] not in written]
            (args.out / PARAMETERS).write_text(json.dumps(others + entries, indent=1) + "\n")
    done = len(pictures) - len(failures)
    if done and args.out is not None:
        print(f"{done} of {len(pictures)} pictures, {len(entries)} degraded; {PARAMETERS} and results in {args.out}")
    if done and args.sheet is not None:
        write_picture(args.sheet, _side_by_side(blocks))
        print(f"{done} of {len(pictures)} pictures, {len(kinds)} kinds, levels {levels}; sheet {args.sheet}")
    if failures:
        raise CommandError(f"{len(failures)} of {len(pictures)} pictures failed, named above")
    return 0


def sheet_block(image: UInt8Array, name: str, kinds: Sequence[str], levels: Sequence[int], seed: int) -> UInt8Array:
    """The part of a preview sheet that shows one picture: clear on top, then a row a kind, a column a level.

    Args:
        image: (H, W, 3) uint8 RGB.
        name: of the picture, for the label of the clear one.
        kinds: names of `glesam_ros.degradation.names()`.
        levels: 1..3.
        seed: of each degraded picture.

    Returns:
        (rows * (LABEL_HEIGHT + H + GAP), len(levels) * (W + GAP), 3) uint8 RGB, where rows is 1 + len(kinds).
    """
    import numpy as np

    from glesam_ros.degradation import HELD_OUT_KINDS, degrade

    rows = [[_tile(image, f"clear: {name}"), *[_tile(None, "", image.shape[:2])] * (len(levels) - 1)]]
    for kind in kinds:
        held_out = ", held out" if kind in HELD_OUT_KINDS else ""
        rows.append([_tile(degrade(image, kind, level, seed).image, f"{kind} {level}{held_out}") for level in levels])
    return np.concatenate([np.concatenate(row, 1) for row in rows], 0)


def _tile(image: UInt8Array | None, label: str, size: tuple[int, int] = (0, 0)) -> UInt8Array:
    """A picture, or white of `size` (height, width), below its label."""
    import cv2
    import numpy as np

    height, width = size if image is None else image.shape[:2]
    tile = np.full((LABEL_HEIGHT + height + GAP, width + GAP, 3), 255, np.uint8)
    cv2.putText(tile, label, (2, LABEL_HEIGHT - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    if image is not None:
        tile[LABEL_HEIGHT : LABEL_HEIGHT + height, :width] = image
    return tile


def _side_by_side(blocks: Sequence[UInt8Array]) -> UInt8Array:
    import numpy as np

    height = max(block.shape[0] for block in blocks)
    padded = [np.pad(b, ((0, height - b.shape[0]), (0, GAP), (0, 0)), constant_values=255) for b in blocks]
    return np.concatenate(padded, 1)


def _read(pictures: Sequence[tuple[Path, Path]], failures: list[Path]) -> Iterator[tuple[Path, Path, UInt8Array]]:
    """The pictures that can be read, each with its path and stem; the others are named and added to `failures`."""
    from tqdm import tqdm

    for path, stem in tqdm(pictures, unit="picture", disable=None):
        try:
            image = read_picture(path)
        except FAILURES as error:
            failures.append(path)
            say_skipped("degrade", path, error)
            continue
        yield path, stem, image


def _write_degraded(
    out: Path, path: Path, stem: Path, image: UInt8Array, kinds: Sequence[str], levels: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """Write one picture in all kinds and levels; the entry of `PARAMETERS` of each file once it is there."""
    from glesam_ros.degradation import degrade

    for kind in kinds:
        for level in levels:
            degraded = degrade(image, kind, level, seed)
            file = _file(stem, kind, level)
            write_picture(out / file, degraded.image)
            yield {
                "picture": str(path), "file": file.as_posix(), "kind": kind, "level": level, "seed": seed,
                "parameters": degraded.parameters,
            }


def _earlier(path: Path) -> list[dict[str, Any]]:
    """Entries of earlier runs, of pictures that are there."""
    try:
        old = json.loads(path.read_text()) if path.exists() else []
        return [entry for entry in old if (path.parent / entry["file"]).exists()]
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path}: expected the list of an earlier run; remove it, or take another --out") from error


def _file(stem: Path, kind: str, level: int) -> Path:
    return stem.with_name(f"{stem.name}_{kind}-{level}.png")


def _shrunk(image: UInt8Array, long_side: int) -> UInt8Array:
    import cv2
    import numpy as np

    height, width = image.shape[:2]
    factor = long_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _print_kinds() -> None:
    from glesam_ros.degradation import HELD_OUT_KINDS, names
    from glesam_ros.degradation.robot import EFFECTS

    for kind in names():
        about = (EFFECTS[kind].__doc__ or "").split("\n")[0]
        print(f"{kind:16}{'held out' if kind in HELD_OUT_KINDS else 'training':10}{about}".rstrip())
    print("\nheld out: training never shows it, see glesam_ros.degradation.HELD_OUT_KINDS")


def _kind(text: str) -> str:
    try:
        return degradation(text)
    except argparse.ArgumentTypeError as error:
        hint = "; name pictures before --kind" if Path(text).exists() else ""
        raise argparse.ArgumentTypeError(f"{error}{hint}") from None


def _sheet(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {' or '.join(SHEET_SUFFIXES)}, got {text!r}")
    return path
