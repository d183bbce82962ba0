"""Ids that stay with their objects from frame to frame."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from glesam_ros.instances import MAX_ID, Instances
from glesam_ros.masks import Bits, Counts, Indices, may_overlap, packed, set_bits
from glesam_ros.validation import BoolArray, FloatArray, UInt8Array

SAME = 0.4
"""Masks of one object overlap by more than this (IoU)."""
GRID = 120
"""Masks are compared on a grid of at least this many cells along the short side of an image that has so many."""
FINE = 4
"""Cells of up to so many pixels a side: models have no thinner parts of masks, so that one pixel tells."""
THIN = 4
"""Masks of fewer cells than so many times the longer side of their box may have parts that are thinner than a cell."""
LOST = 15
"""Frames for which an object that is not seen is remembered."""
MOST = 512
"""Objects that are remembered at most, those seen last."""


class IdKeeper:
    """Gives each object the id that it had before, one keeper for each camera.

    An object is known by the overlap of its mask with the last one it had: pairs are taken from the highest IoU down,
    as long as it exceeds `SAME`. So ids hold while an object moves by less than about half its size between frames, and
    through up to `LOST` frames without it; there is no model of motion or looks. A new object gets the next id, and
    after `MAX_ID` the first that is not in use.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, with id 1."""
        self._size = 0, 0
        self._next = 1
        self._ids = np.zeros(0, np.int32)
        self._unseen = np.zeros(0, np.intp)
        self._bits: Bits = np.zeros((0, 0), np.uint64)
        self._areas = np.zeros(0, np.int32)
        self._extents = np.zeros((0, 4), np.intp)

    def update(self, instances: Instances) -> Instances:
        """The same instances of the next frame, in the same order, with ids that go on; another size begins anew."""
        step = max(1, min(instances.size) // GRID)
        extents = _cells(instances.boxes, step)
        bits = packed(_coarse(instances, extents, step))
        areas = set_bits(bits)
        if instances.size != self._size:
            self.forget()
            self._size, self._bits = instances.size, bits[:0]
        known, found = self._matches(bits, areas, extents)
        ids = np.zeros(len(instances), np.int32)
        ids[found] = self._ids[known]
        new = np.flatnonzero(ids == 0)
        ids[new] = self._new_ids(len(new))

        lost = np.ones(len(self._ids), np.bool_)
        lost[known] = False
        lost &= self._unseen < LOST
        keep = np.flatnonzero(lost)
        keep = keep[np.argsort(self._unseen[keep], kind="stable")][: max(0, MOST - len(ids))]
        self._unseen = np.concatenate([np.zeros(len(ids), np.intp), self._unseen[keep] + 1])
        self._ids = np.concatenate([ids, self._ids[keep]])
        self._bits = np.concatenate([bits, self._bits[keep]])
        self._areas = np.concatenate([areas, self._areas[keep]])
        self._extents = np.concatenate([extents, self._extents[keep]])
        return dataclasses.replace(instances, ids=ids)

    def _matches(self, bits: Bits, areas: Counts, extents: Indices) -> tuple[Indices, Indices]:
        """Rows of what is known, and of these masks, that are the same objects."""
        known, found = np.nonzero(may_overlap(self._extents, self._areas, extents, areas, SAME))
        both = set_bits(self._bits[known] & bits[found])
        overlap = both / np.maximum(self._areas[known] + areas[found] - both, 1)
        order = np.lexsort((self._unseen[known], -overlap))
        pairs: dict[int, int] = {}
        taken: set[int] = set()
        for k in order[overlap[order] > SAME].tolist():
            i, j = int(known[k]), int(found[k])
            if i not in taken and j not in pairs:
                pairs[j] = i
                taken.add(i)
        return np.array(list(pairs.values()), np.intp), np.array(list(pairs), np.intp)

    def _new_ids(self, count: int) -> list[int]:
        in_use = set(self._ids.tolist())
        new: list[int] = []
        while len(new) < count:
            if self._next not in in_use:
                new.append(self._next)
            self._next = self._next % MAX_ID + 1
        return new


def _coarse(instances: Instances, extents: Indices, step: int) -> BoolArray:
    """Cells of `step` x `step` pixels whose first pixel is in each mask, within its `extents` (K, 4): (K, P).

    Where cells are large, those whose upper edge it touches; of thin masks, whose horizontal parts may lie between
    these edges, also those whose left edge it touches.
    """
    height, width = (-(-side // step) for side in instances.size)
    coarse = np.zeros((len(instances), height, width), np.bool_)
    across, down = np.ones((1, step), np.uint8), np.ones((step, 1), np.uint8)
    # most of a mask is empty
    for mask, whole, (x1, y1, x2, y2) in zip(coarse, instances.masks, extents.tolist()):
        pixels = whole[y1 * step : y2 * step, x1 * step : x2 * step].view(np.uint8)
        if pixels.size:
            rows = pixels[::step]
            cells = (_largest(rows, across) if step > FINE else rows)[:, ::step]
            if step > FINE and np.count_nonzero(cells) < THIN * max(cells.shape):
                cells = cells | _largest(pixels[:, ::step], down)[::step]
            mask[y1:y2, x1:x2] = cells
    return coarse.reshape(len(coarse), height * width)


def _largest(pixels: UInt8Array, window: UInt8Array) -> UInt8Array:
    """(H, W) -> the largest pixel of each window, which begins at its pixel, (H, W)."""
    return np.asarray(cv2.dilate(np.ascontiguousarray(pixels), window, anchor=(0, 0)))


def _cells(boxes: FloatArray, step: int) -> Indices:
    """Boxes (K, 4) xyxy in pixels -> those around their cells of `step` pixels, none before the first of the image."""
    return np.concatenate([np.maximum(boxes[:, :2], 0) // step, -(-boxes[:, 2:] // step)], 1).astype(np.intp)
