"""Ids that stay with their objects from frame to frame."""

from __future__ import annotations

import dataclasses

import numpy as np

from glesam_ros.instances import MAX_ID, Instances
from glesam_ros.models.proposals import Bits, Counts, Indices, packed, set_bits
from glesam_ros.validation import BoolArray, FloatArray

SAME = 0.4
"""Masks of one object overlap by more than this (IoU)."""
GRID = 120
"""Masks are compared on a grid with at least this many points along the short side of an image that has so many."""
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
        self._boxes = np.zeros((0, 4), np.float32)

    def update(self, instances: Instances) -> Instances:
        """The same instances of the next frame, in the same order, with ids that go on; another size begins anew."""
        if instances.size != self._size:
            self.forget()
            self._size = instances.size
        bits = packed(_coarse(instances))
        areas = set_bits(bits)
        if not len(self._ids):
            self._bits = bits[:0]
        known, found = self._matches(bits, areas, instances.boxes)
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
        self._boxes = np.concatenate([instances.boxes, self._boxes[keep]])
        return dataclasses.replace(instances, ids=ids)

    def _matches(self, bits: Bits, now: Counts, boxes: FloatArray) -> tuple[Indices, Indices]:
        """Rows of what is known, and rows of `bits`, whose areas are `now`, that are the same objects."""
        before = self._areas
        near = _touch(self._boxes, boxes) & (np.minimum.outer(before, now) > SAME * np.maximum.outer(before, now))
        known, found = np.nonzero(near)
        both = set_bits(self._bits[known] & bits[found])
        overlap = both / np.maximum(before[known] + now[found] - both, 1)
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


def _coarse(instances: Instances) -> BoolArray:
    """Every n-th pixel of every n-th row of each mask, see `GRID`: (K, P)."""
    step = max(1, min(instances.size) // GRID)
    height, width = (-(-side // step) for side in instances.size)
    coarse = np.zeros((len(instances), height, width), np.bool_)
    # most of a mask is empty
    for mask, whole, (x1, y1, x2, y2) in zip(coarse, instances.masks, _cells(instances.boxes, step)):
        mask[y1:y2, x1:x2] = whole[y1 * step : y2 * step : step, x1 * step : x2 * step : step]
    return coarse.reshape(len(coarse), height * width)


def _cells(boxes: FloatArray, step: int) -> list[list[int]]:
    """Boxes xyxy in pixels -> those around their cells of `step` pixels, within the image from its first cell on."""
    first = np.maximum(boxes[:, :2], 0) // step
    found: list[list[int]] = np.concatenate([first, -(-boxes[:, 2:] // step)], 1).astype(int).tolist()
    return found


def _touch(first: FloatArray, second: FloatArray) -> BoolArray:
    """(N, M): whether boxes (N, 4) and (M, 4), xyxy, have pixels in common."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = first.T[..., None], second.T[:, None]
    return (ax1 < bx2) & (bx1 < ax2) & (ay1 < by2) & (by1 < ay2)
