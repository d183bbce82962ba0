"""Contact sheets: best, median and worst photographs beside one another, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from glesam_ros.evaluation.metrics import iou
from glesam_ros.evaluation.protocol import Condition, Measurement, Pictures
from glesam_ros.overlay import PALETTE
from glesam_ros.validation import BoolArray, FloatArray, UInt8Array

TILE = (360, 250)
"""Width and height in pixels into which each picture is fitted."""
UNMATCHED = (128, 128, 128)
"""Colour of a mask without a counterpart."""
_GAP, _LINE = 10, 26
_PAPER, _INK = 255, (40, 40, 40)
_FONT, _SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.5
_ALPHA = 0.5


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a sheet, (H, W, 3) uint8 RGB, and the line below it."""

    image: UInt8Array
    caption: str


def choose(
    measurements: Sequence[Measurement], condition: Condition, metric: str, each: int = 2
) -> list[tuple[str, str]]:
    """The photographs where `always` gains most, about the median, and least over `off`.

    Args:
        measurements: of one data set.
        condition: at which the gain is looked at.
        metric: "points_iou" or another that both modes have; its mean over the regions of a photograph counts.
        each: how many of each, fewer where there are not enough photographs.

    Returns:
        ("best", "median" or "worst", name of the photograph), each photograph once, by falling gain.
    """
    gains = {
        m.photograph: float(np.mean(m.values["always", metric]) - np.mean(m.values["off", metric]))
        for m in measurements
        if m.condition == condition
    }
    return ranked(gains, each)


def ranked(gains: dict[str, float], each: int) -> list[tuple[str, str]]:
    """("best", "median" or "worst", name) of `each` first, middle and last names by falling gain, none twice."""
    names = sorted(gains, key=lambda name: (-gains[name], name))
    each = min(each, len(names) // 3) if len(names) >= 3 else 0
    if not each:
        return [("case", name) for name in names]
    middle = (len(names) - each) // 2
    words = {"best": names[:each], "median": names[middle : middle + each], "worst": names[-each:]}
    return [(word, name) for word, chosen in words.items() for name in chosen]


def case_tiles(word: str, pictures: Pictures) -> list[Tile]:
    """A row: frame, degraded frame, masks without and with enhancement, truth; each region in one colour throughout."""
    target, prompt = pictures.target, pictures.prompt
    colours = PALETTE[np.arange(len(target.masks)) % len(PALETTE)]
    before, after = (float(iou(masks, target.masks).mean()) for masks in (pictures.off, pictures.always))
    marks: dict[str, Any] = {prompt: target.points if prompt == "points" else target.boxes}
    clear = pictures.case.photograph.image
    return [
        Tile(clear, f"{word}: {pictures.case.photograph.name}"),
        Tile(pictures.image, pictures.condition.name),
        Tile(paint(pictures.image, pictures.off, colours, **marks), f"off: IoU {100 * before:.1f}"),
        Tile(
            paint(pictures.image, pictures.always, colours, **marks),
            f"enhanced: IoU {100 * after:.1f} ({100 * (after - before):+.1f})",
        ),
        Tile(paint(clear, target.masks, colours), f"truth: {_counted(len(target.masks))}"),
    ]


def paint(
    image: UInt8Array, masks: BoolArray, colours: Any, points: FloatArray | None = None, boxes: FloatArray | None = None
) -> UInt8Array:
    """Masks over their image, the small ones on top, at the size of a tile.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: (K, H, W) bool.
        colours: (K, 3) uint8 RGB.
        points: (K, N, 2) float32 xy in pixels, drawn as dots.
        boxes: (K, 4) float32 xyxy in pixels, drawn as frames.

    Returns:
        (h, w, 3) uint8 RGB, fitted into `TILE`.
    """
    out = fit(image)
    scale = out.shape[1] / image.shape[1], out.shape[0] / image.shape[0]
    around = np.ones((3, 3), np.uint8)
    for k in sorted(range(len(masks)), key=lambda k: -np.count_nonzero(masks[k])):
        small = cv2.resize(255 * masks[k].view(np.uint8), out.shape[1::-1], interpolation=cv2.INTER_AREA) > 127
        colour = np.asarray(colours[k], np.float32)
        out[small] = np.round((1 - _ALPHA) * out[small] + _ALPHA * colour).astype(np.uint8)
        edge = small & (cv2.erode(small.view(np.uint8), around) == 0)
        out[edge] = colours[k]
    for k, corners in enumerate([] if boxes is None else boxes):
        x1, y1, x2, y2 = (round(float(v) * scale[i % 2]) for i, v in enumerate(corners))
        cv2.rectangle(out, (x1, y1), (x2 - 1, y2 - 1), colours[k].tolist(), 2)
    for k, xys in enumerate([] if points is None else points):
        for x, y in xys:
            centre = (round((float(x) + 0.5) * scale[0]), round((float(y) + 0.5) * scale[1]))
            cv2.circle(out, centre, 4, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(out, centre, 3, colours[k].tolist(), -1, cv2.LINE_AA)
    return out


def fit(image: UInt8Array) -> UInt8Array:
    """A copy of the image scaled so that it just fits into `TILE`."""
    scale = min(TILE[0] / image.shape[1], TILE[1] / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.array(cv2.resize(image, size, interpolation=how), np.uint8)


def sheet(rows: Sequence[Sequence[Tile]], title: str) -> UInt8Array:
    """All rows of tiles below one another under a title; (H, W, 3) uint8 RGB on white.

    Raises:
        ValueError: no rows, or rows of different length.
    """
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"rows: expected at least one, all of the same length, got {[len(row) for row in rows]}")
    width, height = TILE
    step = height + _LINE + _GAP
    paper = np.full(
        (2 * _LINE + step * len(rows), _GAP + (width + _GAP) * len(rows[0]), 3), _PAPER, np.uint8
    )
    _write(paper, title, (_GAP, _LINE), 0.7)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            x, y = _GAP + c * (width + _GAP), 2 * _LINE - _GAP + r * step
            small = fit(tile.image)
            x1, y1 = x + (width - small.shape[1]) // 2, y + height - small.shape[0]  # near its caption
            paper[y1 : y1 + small.shape[0], x1 : x1 + small.shape[1]] = small
            _write(paper, _shortened(tile.caption, x + width - x1), (x1, y + height + 18), _SCALE)
    return paper


def _counted(regions: int) -> str:
    return f"{regions} region{'' if regions == 1 else 's'}"


def _write(paper: UInt8Array, text: str, place: tuple[int, int], scale: float) -> None:
    cv2.putText(paper, text, place, _FONT, scale, _INK, 1, cv2.LINE_AA)


def _shortened(text: str, width: int) -> str:
    """The text with its middle left out where it is wider than `width` pixels."""
    kept = text
    half = len(text) // 2
    while cv2.getTextSize(kept, _FONT, _SCALE, 1)[0][0] > width and half > 1:
        half -= 1
        kept = f"{text[:half]}...{text[-half:]}"
    return kept
