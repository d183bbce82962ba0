#!/usr/bin/env python3
"""Draw the pictures of docs/semantic.md from the photograph beside them, with networks of a training run.

    python scripts/draw_semantic.py --base runs/rass_nano/base --scr runs/rass_nano/scr

base and scr are folders that `glesam_ros.training.rass_nano_export` wrote from base.pt and scr.pt; the last network is
the one of the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.degradation import degrade
from glesam_ros.models.rass_nano import RassNano
from glesam_ros.overlay import draw_classes
from glesam_ros.semantic import SemanticSegmenter

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WORSE = (("clear", 0), ("lq", 3), ("low_light", 3), ("rain", 3))
"""Columns of the first picture: degradation and level."""
SCORED = "tree"
SIZE = (400, 267)
GAP = 6
Array = NDArray[Any]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="trained on clear pictures only")
    parser.add_argument("--scr", type=Path, required=True, help="the same with SCR merged")
    args = parser.parse_args()
    photograph = cv2.imread(str(IMAGES / "pagoda.jpg"))[..., ::-1]
    frames = [degrade(photograph, kind, level, 1).image if level else photograph for kind, level in WORSE]
    base, scr, rass = (SemanticSegmenter(RassNano("cpu", weights=folder)) for folder in (args.base, args.scr, None))
    rows = [frames, *([draw_classes(frame, net.segment(frame), 0.65) for frame in frames] for net in (base, rass))]
    names = [kind.replace("_", " ") + (f", level {level}" if level else "") for kind, level in WORSE]
    save(IMAGES / "semantic.jpg", names, ["camera", "trained on clear pictures", "rass-nano"], rows)
    bad = frames[1]
    scores = [score_map(net, frame) for net, frame in ((base, photograph), (base, bad), (scr, bad), (rass, bad))]
    titles = [f"{SCORED}: clear picture", "bad picture", "bad picture, SCR merged", "bad picture, RASS"]
    save(IMAGES / "semantic_scores.jpg", titles, [""], [scores])


def score_map(segmenter: SemanticSegmenter, image: Array) -> Array:
    """(h, w, 3) uint8 RGB: probability of the class `SCORED`, dark blue 0, yellow 1."""
    logits = segmenter.model.logits(image)
    exponential = np.exp(logits - logits.max(0))
    share = exponential[segmenter.classes.index(SCORED)] / exponential.sum(0)
    return cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]


def save(path: Path, columns: list[str], rows: list[str], tiles: list[list[Array]]) -> None:
    """Write a table of pictures, with a title above each column and in each row."""
    width = len(columns) * (SIZE[0] + GAP) - GAP
    head = np.full((36, width, 3), 255, np.uint8)
    for k, title in enumerate(columns):
        cv2.putText(head, title, (k * (SIZE[0] + GAP) + 8, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.75, (0, 0, 0), 2)
    lines = [head]
    for title, row in zip(rows, tiles, strict=True):
        line = np.full((SIZE[1] + GAP, width, 3), 255, np.uint8)
        for k, tile in enumerate(row):
            x = k * (SIZE[0] + GAP)
            line[: SIZE[1], x : x + SIZE[0]] = cv2.resize(tile, SIZE, interpolation=cv2.INTER_AREA)
        cv2.putText(line, title, (8, SIZE[1] - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.75, (0, 0, 0), 4)
        cv2.putText(line, title, (8, SIZE[1] - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.75, (255, 255, 255), 2)
        lines.append(line)
    cv2.imwrite(str(path), np.vstack(lines)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
