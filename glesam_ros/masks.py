"""Arithmetic of masks: packed into bits, areas, extents, overlaps; and logits at the size of an image."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from glesam_ros.validation import BoolArray, FloatArray

Indices = NDArray[np.intp]
Bits = NDArray[np.uint64]
Counts = NDArray[np.int32]
Extent = tuple[int, int, int, int]
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
"""Bits that are set in a byte."""


def packed(masks: BoolArray) -> Bits:
    """Masks (N, P) as bits, padded to whole words: (N, ceil(P / 64)) uint64."""
    count, cells = masks.shape
    words = np.zeros((count, -(-cells // 64)), np.uint64)
    words.view(np.uint8)[:, : -(-cells // 8)] = np.packbits(masks, axis=1)
    return words


def set_bits(words: Bits) -> Counts:
    """How many bits are set in each row of (N, W) uint64: (N,) int32."""
    # numpy 1 has no such function
    if hasattr(np, "bitwise_count"):
        return row_sums(np.bitwise_count(words))
    octets = words.view(np.uint8)
    return row_sums(cv2.LUT(octets, _BITS) if len(octets) else octets)


def column_bits(words: Bits) -> Counts:
    """How many bits are set in each column of (W, N) uint64: (N,) int32."""
    if hasattr(np, "bitwise_count"):
        counts: Counts = np.add.reduce(np.bitwise_count(words), 0, dtype=np.int32)
        return counts
    return set_bits(np.ascontiguousarray(words.T))


def row_sums(array: np.ndarray[Any, Any]) -> Counts:
    """Sums of the rows of (N, P) uint8 or bool: (N,) int32; numpy takes ten times as long."""
    if not array.size:
        return np.zeros(len(array), np.int32)
    return np.asarray(cv2.reduce(array.view(np.uint8), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S), np.int32)[:, 0]


def areas(masks: BoolArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Pixels of each mask (K, h, w): (K,) int64."""
    return row_sums(masks.reshape(len(masks), math.prod(masks.shape[1:]))).astype(np.int64)


def mask_nms(masks: BoolArray, iou_threshold: float, limit: int, extents: Indices | None = None) -> Indices:
    """Greedy non-maximum suppression by mask IoU.

    Args:
        masks: (K, h, w) bool, best first.
        iou_threshold: a mask that overlaps a better one by more than this is dropped.
        limit: stop after so many.
        extents: (K, 4) of the masks, as `extents_of` gives them; None where they are not at hand.

    Returns:
        Indices of the kept masks, best first.
    """
    if not len(masks):
        return np.zeros(0, np.intp)
    bits = packed(masks.reshape(len(masks), -1))
    area = set_bits(bits)
    extents = extents_of(masks) if extents is None else extents
    near = np.triu(may_overlap(extents, area, extents, area, iou_threshold), 1)
    alive = np.ones(len(masks), np.bool_)
    kept: list[int] = []
    for k in range(len(masks)):
        if not alive[k]:
            continue
        if len(kept) == limit:
            break
        kept.append(k)
        rest = np.flatnonzero(alive & near[k])
        if rest.size:
            both = set_bits(bits[rest] & bits[k])
            alive[rest[both / np.maximum(area[k] + area[rest] - both, 1) > iou_threshold]] = False
    return np.array(kept, np.intp)


def may_overlap(
    first: Indices, first_areas: Counts, second: Indices, second_areas: Counts, iou_threshold: float
) -> BoolArray:
    """(N, M): whether masks can overlap by more than the threshold, from extents (N, 4), (M, 4) and areas alone."""
    ax1, ay1, ax2, ay2 = first.astype(np.float32).T
    bx1, by1, bx2, by2 = second.astype(np.float32).T
    across = np.minimum.outer(ax2, bx2) - np.maximum.outer(ax1, bx1)
    down = np.minimum.outer(ay2, by2) - np.maximum.outer(ay1, by1)
    both = np.minimum(np.maximum(across, 0) * np.maximum(down, 0), np.minimum.outer(first_areas, second_areas))
    return both > iou_threshold * (np.add.outer(first_areas, second_areas) - both)


def upsample_into(mask: BoolArray, logits: FloatArray, extent: Extent | None = None) -> tuple[Extent, int]:
    """Threshold logits at the size of the image, at the cost of the object's window only.

    Equal to ``cv2.resize(logits, (W, H), interpolation=cv2.INTER_LINEAR) > 0``.

    Args:
        mask: (H, W) bool, all False; written in place.
        logits: (h, w) float32 that cover the whole image.
        extent: of the positive logits, as `extents_of` gives it; None where it is not at hand.

    Returns:
        The extent of the mask, xyxy with x2 and y2 exclusive, zeros where it is empty; and its pixels.
    """
    left, top, right, bottom = measure(logits > 0)[0] if extent is None else extent
    if left == right:
        return (0, 0, 0, 0), 0
    left, x, right, scale_x = _window(left, right, logits.shape[1], mask.shape[1])
    top, y, bottom, scale_y = _window(top, bottom, logits.shape[0], mask.shape[0])
    cells = logits[top:bottom, left:right]
    fine = cv2.resize(cells, None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_LINEAR)
    window = mask[y : y + fine.shape[0], x : x + fine.shape[1]]
    np.greater(fine, 0, out=window)
    (x1, y1, x2, y2), area = measure(window)
    return (x + x1, y + y1, x + x2, y + y2) if area else (0, 0, 0, 0), area


def measure(mask: BoolArray) -> tuple[Extent, int]:
    """The extent, xyxy with x2 and y2 exclusive, zeros where nothing is set; and how much is set."""
    # not cv2.boundingRect: that of OpenCV 4.5 is wrong for narrow arrays
    sums = row_sums(mask)
    rows = np.flatnonzero(sums)
    if not rows.size:
        return (0, 0, 0, 0), 0
    y1, y2 = int(rows[0]), int(rows[-1]) + 1
    cols = np.logical_or.reduce(mask[y1:y2], 0)
    return (int(cols.argmax()), y1, len(cols) - int(cols[::-1].argmax()), y2), int(sums.sum())


def extents_of(masks: BoolArray) -> Indices:
    """The extent of each mask (K, h, w), see `measure`: (K, 4)."""
    rows, cols = np.logical_or.reduce(masks, 2), np.logical_or.reduce(masks, 1)
    x1, y1 = cols.argmax(1), rows.argmax(1)
    x2, y2 = cols.shape[1] - cols[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)
    return np.stack([x1, y1, x2, y2], 1) * rows.any(1, keepdims=True)


def _window(first: int, last: int, cells: int, pixels: int) -> tuple[int, int, int, float]:
    """Window around the positive cells first..last (exclusive) along one axis of `cells` scaled to `pixels`.

    It begins where a cell and a pixel begin together, so that it is sampled where the whole image would be.

    Returns:
        First cell, first pixel, last cell (exclusive), pixels a cell.
    """
    # interpolation reaches one cell; the rest makes up for the rounding of the window to whole pixels
    margin = math.ceil(cells / pixels + 0.5)
    unit = cells // math.gcd(cells, pixels)
    start = max(0, first - margin) // unit * unit
    return start, start * pixels // cells, min(cells, last + margin), pixels / cells
