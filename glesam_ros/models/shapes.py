"""What nano's masks may look like: what a box holds, in how many parts they are. What it brings: docs/models.md."""

from __future__ import annotations

import cv2
import numpy as np

from glesam_ros.masks import Extent, Indices, measure
from glesam_ros.models.base import STABILITY_OFFSET
from glesam_ros.validation import FloatArray

ISLAND = 0.5
"""A separate part of a lone point's mask that is smaller than this share of the largest one does not belong to it."""
SPECK = 0.2
"""The same in everything mode: less than with a lone point, for what stands behind something may be in two parts."""
OUTSIDE = 80.0
"""What logits lose outside a box for each length of its side: only certain ones stay positive a twentieth outside.

A hard edge would be better for exact boxes, and worse for those of a detector; to raise what is inside, too, better for
tight boxes and worse for loose ones.
"""


def drop_islands(
    logits: FloatArray, share: float, point: FloatArray | None = None, extent: Extent | None = None
) -> bool:
    """Make separate small parts of a mask background, in place, but not the one under the point.

    Args:
        logits: (h, w) float32.
        share: of the largest part, 0..1; smaller ones go.
        point: (2,) xy in -1..1 of the frame; None where no part is meant.
        extent: of the positive logits, as `masks.measure` gives it; None where it is not at hand.

    Returns:
        Whether there were any.
    """
    left, top, right, bottom = measure(logits > 0)[0] if extent is None else extent
    if left == right:
        return False
    window = logits[top:bottom, left:right]
    count, parts = cv2.connectedComponents((window > 0).view(np.uint8), connectivity=4)
    if count == 2:  # the background and one part
        return False
    sizes = np.bincount(parts.ravel())
    is_small = sizes < share * sizes[1:].max()
    is_small[0] = False
    if point is not None:
        x, y = grid_cells(point, logits.shape)
        if left <= x < right and top <= y < bottom:
            is_small[parts[y - top, x - left]] = False
    # so far below 0 that a stability measured afterwards does not count them either
    window[is_small.take(parts)] = -2 * STABILITY_OFFSET
    return bool(is_small.any())


def grid_cells(points: FloatArray, grid: tuple[int, ...]) -> Indices:
    """Cells (..., 2) xy of a grid (h, w) over the frame that hold the points (..., 2) xy in -1..1."""
    h, w = grid
    return np.floor((points + 1) / 2 * (w, h)).astype(np.intp).clip(0, (w - 1, h - 1))


def keep_to_boxes(logits: FloatArray, xy: FloatArray, labels: FloatArray) -> None:
    """Lower what is outside the box of an object, in place; objects without a box stay.

    Args:
        logits: (B, h, w) float32.
        xy: (B, N, 2) prompts in -1..1 of the frame.
        labels: (B, N); 2 is the upper left corner of a box, 3 the lower right one.
    """
    h, w = logits.shape[1:]
    for k in np.flatnonzero((labels == 3).any(1)):
        (left, top), (right, bottom) = (xy[k][labels[k] == corner][0] for corner in (2, 3))
        outside = np.maximum(_outside(top, bottom, h)[:, None], _outside(left, right, w))
        logits[k] -= OUTSIDE * outside


def _outside(low: float, high: float, cells: int) -> FloatArray:
    """How far the centre of each of so many cells over -1..1 is outside low..high, in lengths of that.

    A range narrower than a cell counts as one cell wide: else a thin thing would have no cell.
    """
    centres = (np.arange(cells, dtype=np.float32) + 0.5) * (2 / cells) - 1
    half = max((high - low) / 2, 1 / cells)
    outside = np.maximum(np.abs(centres - (low + high) / 2) - half, 0) / (2 * half)
    return np.asarray(outside, np.float32)
