"""Where and how nano looks a second time when a bad frame is prompted; what it brings: docs/models.md.

The second look is at the mirrored frame, or nearer, at the part of it where the objects are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glesam_ros.validation import FloatArray, UInt8Array

UNCLEAR = (0.15, 0.25)
"""Degradation levels between which the second look gets its half of the mean; below there is none.

Clear frames are answered once, in less time. A step instead of the slope would flicker in the masks of a camera near
it.
"""
AFAR_SIZE = 0.75
"""Long side of a second look at the frame that things may be small in, beside that of the first: several, or what a
lone point means."""
NEAR_SIZE = 0.625
"""Long side of a second look at a part of the frame, or at one thing that fills it, beside that of the first."""
LEAST_SIZE = 320
"""Below this a second look is as large as the first: smaller ones err too much to help."""
MARGIN = 1.5
"""Sides of the part, beside those of what is there."""
LEAST_PART, MOST_PART = 0.3, 0.8
"""Shares of the frame's sides: a smaller part shows too little around a thing, a larger one is looked at whole."""


class Window(NamedTuple):
    """Part of a frame with the frame's aspect, in cells of a grid (h, w) over it.

    `grid` is that (h, w); `left`, `top`, `width` and `height` count cells.
    """

    grid: tuple[int, int]
    left: int
    top: int
    width: int
    height: int

    @property
    def is_whole(self) -> bool:
        """Whether it is the frame."""
        return (self.height, self.width) == self.grid

    @property
    def cells(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def mirrored(self, image: UInt8Array) -> UInt8Array:
        """(H, W, 3) of the whole frame -> (H', W', 3) of the part, at least one pixel, mirrored; a view."""
        rows, columns = (
            _pixels(part, pixels / cells) for part, pixels, cells in zip(self.cells, image.shape, self.grid)
        )
        return image[rows, columns][:, ::-1]

    def prompts(self, xy: FloatArray, labels: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Prompts (B, N, 2) in -1..1 of the frame, labels (B, N) -> the same in the mirrored part.

        Points of the background outside say nothing there: their label becomes -1. Box corners mean the same there.
        """
        h, w = self.grid
        size = np.array([self.width, self.height])
        in_cells = (xy + 1) / 2 * (w, h) - (self.left, self.top)
        moved = ((2 * in_cells / size - 1) * (-1, 1)).astype(np.float32)
        left, right = labels == 2, labels == 3
        moved[left, 0], moved[right, 0] = moved[right, 0], moved[left, 0]
        is_idle = (labels == 0) & (np.abs(moved) > 1).any(-1)
        return moved, np.where(is_idle, np.float32(-1), labels)


def whole(grid: tuple[int, int]) -> Window:
    """The frame itself, in cells of a grid (h, w)."""
    return Window(grid, 0, 0, grid[1], grid[0])


def around(grid: tuple[int, int], extents: NDArray[Any], xy: FloatArray, labels: FloatArray) -> Window:
    """Where all objects are, with some of what is around them; the whole frame where they fill most of it.

    Args:
        grid: (h, w) of the masks.
        extents: (B, 4) xyxy in cells, of the masks of the first look; all 0 where a mask is empty.
        xy: (B, N, 2) prompts in -1..1 of the frame.
        labels: (B, N). An object is where its points and its mask are; a box (2, 3 its corners) counts instead of that.
    """
    h, w = grid
    has_mask = (extents[:, 2] > 0) & ~(labels == 3).any(1)
    corners = extents[has_mask].reshape(-1, 2) / (w, h)
    there = np.concatenate([corners, (xy[labels >= 1] + 1) / 2]).clip(0, 1)
    if not len(there):  # negative points alone
        return whole(grid)
    low, high = there.min(0), there.max(0)
    side = max(MARGIN * float((high - low).max()), LEAST_PART)
    if side > MOST_PART:
        return whole(grid)
    height, width = max(1, round(side * h)), max(1, round(side * w))
    left, top = np.rint((low + high) / 2 * (w, h) - (width / 2, height / 2)).clip(0, (w - width, h - height))
    return Window(grid, int(left), int(top), width, height)


def _pixels(cells: slice, pixels: float) -> slice:
    """Cells of so many pixels each -> the nearest pixels, at least one."""
    last = max(1, round(cells.stop * pixels))
    return slice(min(round(cells.start * pixels), last - 1), last)


def share(level: float) -> float:
    """Weight of the second look in the mean of both at a degradation level in 0..1: 0 for clear frames, else to 0.5."""
    least, full = UNCLEAR
    return 0.5 * min(max((level - least) / (full - least), 0.0), 1.0)


def long_side(first: int, is_near: bool) -> int:
    """Long side of a second look in pixels, beside the `first` one's, before it is rounded to what the model takes."""
    return max(int((NEAR_SIZE if is_near else AFAR_SIZE) * first), min(first, LEAST_SIZE))
