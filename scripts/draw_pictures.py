#!/usr/bin/env python3
"""Draw the pictures of the README from the shipped photographs: camera, without and with enhancement."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from glesam_ros import load_pipeline
from glesam_ros.degradation import degrade
from glesam_ros.overlay import draw_overlay

ROOT = Path(__file__).resolve().parent.parent
ROWS = (("low_light", "coffee"), ("rain", "rocket"), ("motion_blur", "cat"), ("lq", "astronaut"))
"""(degradation at level 3, photograph)."""
SIZE = (480, 360)
GAP = 6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "bad_pictures.jpg")
    args = parser.parse_args()
    without, restored = load_pipeline("nano", enhancement="off"), load_pipeline("nano", enhancement="always")
    rows = []
    for kind, photograph in ROWS:
        clear = cv2.imread(str(ROOT / "glesam_ros" / "demo" / f"{photograph}.jpg"))[..., ::-1]
        clear = np.ascontiguousarray(cv2.resize(clear, (640, 480), interpolation=cv2.INTER_AREA))
        image = degrade(clear, kind, 3, seed=1).image
        tiles = [image, draw_overlay(image, without.segment(image)), draw_overlay(image, restored.segment(image))]
        tiles = [cv2.resize(tile, SIZE, interpolation=cv2.INTER_AREA) for tile in tiles]
        gap = np.full((SIZE[1], GAP, 3), 255, np.uint8)
        row = np.hstack([tiles[0], gap, tiles[1], gap, tiles[2]])
        cv2.putText(row, kind.replace("_", " "), (10, SIZE[1] - 12), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
        rows += [row, np.full((GAP, row.shape[1], 3), 255, np.uint8)]
    head = np.full((36, rows[0].shape[1], 3), 255, np.uint8)
    for k, title in enumerate(("camera", "masks, enhancement off", "masks, enhancement on")):
        cv2.putText(head, title, (k * (SIZE[0] + GAP) + 10, 26), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(args.out), np.vstack([head, *rows])[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
