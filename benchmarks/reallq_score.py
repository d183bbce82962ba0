"""How well the score of `glesam reallq pick` tells bad pictures from clear ones, beside the level of nano alone.

For each degradation: the share of steps clear, 1, 2, 3 of a picture at which the number rises, and the probability that
a degraded picture has a higher one than another, clear picture (area under the ROC curve). With --real, the same
probability for a folder of real bad pictures. Ties count half.

    python benchmarks/reallq_score.py DATA/coco_small/images --list DATA/coco_small/test.json --limit 40 \\
        --real DATA/lowlight_photos
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glesam_ros import load_pipeline
from glesam_ros.cli.pictures import find_pictures, read_picture
from glesam_ros.degradation import degrade, names
from glesam_ros.reallq.quality import Quality, measure, score

NUMBERS = {
    "score": score,
    "score without level": lambda quality: score(dataclasses.replace(quality, level=0.0)),
    "level alone": lambda quality: quality.level,
}


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clear", type=Path, help="folder of clear pictures")
    parser.add_argument("--list", type=Path, help="COCO JSON or list of names that chooses among them")
    parser.add_argument("--real", type=Path, help="folder of real bad pictures")
    parser.add_argument("--kinds", nargs="+", default=list(names()), help="degradations; default: all")
    parser.add_argument("--limit", type=int, help="first so many clear pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    pipeline = load_pipeline("nano", device="cpu", enhancement="off")

    def quality_of(image: np.ndarray) -> Quality:
        return measure(image, lambda picture: pipeline.encode(picture).degradation)

    paths = [path for path, _ in find_pictures([args.clear])]
    if args.list:
        wanted = _listed(args.list)
        paths = [path for path in paths if path.stem in wanted]
    images = [read_picture(path) for path in paths[: args.limit]]
    clear = [quality_of(image) for image in tqdm(images, desc="clear", disable=None)]
    rows = []
    if args.real:
        found = [quality_of(read_picture(path)) for path, _ in find_pictures([args.real])]
        rows.append({"kind": args.real.name, **{
            name: {"above_clear": [_above(list(map(number, found)), list(map(number, clear)))]}
            for name, number in NUMBERS.items()
        }})
    for kind in args.kinds:
        levels = [clear]
        for level in (1, 2, 3):
            levels.append([
                quality_of(degrade(image, kind, level, args.seed + k).image)
                for k, image in enumerate(tqdm(images, desc=f"{kind} {level}", disable=None))
            ])
        row = {"kind": kind}
        for name, number in NUMBERS.items():
            values = np.array([[number(quality) for quality in level] for level in levels])
            row[name] = {
                "rises": float((np.diff(values, axis=0) > 0).mean()),
                "above_clear": [_above(values[k], values[0]) for k in (1, 2, 3)],
            }
        rows.append(row)
    heads = " | ".join(f"{name}: rises, above clear 1 / 2 / 3" for name in NUMBERS)
    print(f"{len(images)} clear pictures\n\n| | {heads} |")
    print("|---|" + "---|" * len(NUMBERS))
    for row in rows:
        print(f"| {row['kind']} | " + " | ".join(_cell(row[name]) for name in NUMBERS) + " |")
    if args.json:
        args.json.write_text(json.dumps({"pictures": len(images), "rows": rows}, indent=1) + "\n")
    return 0


def _listed(path: Path) -> set[str]:
    if path.suffix == ".json":
        return {Path(entry["file_name"]).stem for entry in json.loads(path.read_text())["images"]}
    return set(path.read_text().split())


def _above(bad: list[float], clear: list[float]) -> float:
    """Probability that one of `bad` is above one of `clear`, ties half."""
    difference = np.subtract.outer(np.asarray(bad), np.asarray(clear))
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def _cell(figures: dict) -> str:
    above = " / ".join(f"{value:.3f}" for value in figures["above_clear"])
    return f"{100 * figures['rises']:.0f} %, {above}" if "rises" in figures else above


if __name__ == "__main__":
    sys.exit(main())
